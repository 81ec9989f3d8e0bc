"""Check the pool's offsets and runs against an array that numbers its elements, and the books of the rows."""

from itertools import product

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dejavu.kv.layout import PoolLayout, RowMap, Window, cut

LAYOUTS = [
    PoolLayout(4, first_layer=2, num_layers=3, block_size=4, first_head=1, num_heads=2, head_dim=3, itemsize=2),
    PoolLayout(5, first_layer=0, num_layers=1, block_size=3, first_head=0, num_heads=1, head_dim=1, itemsize=4),
    PoolLayout(12, first_layer=7, num_layers=2, block_size=1, first_head=4, num_heads=3, head_dim=2, itemsize=1),
]


def numbered_pool(layout):
    """Give a pool whose every byte's number is in it: shape + [itemsize]."""
    return np.arange(layout.total_bytes).reshape(*layout.shape, layout.itemsize)


def expand(runs):
    """Give the byte numbers of the runs, in order."""
    return [
        byte for start, size in zip(runs.offset, runs.num_bytes, strict=True) for byte in range(start, start + size)
    ]


def assert_no_neighbours(runs):
    assert all(runs.num_bytes > 0)
    assert not any(runs.offset[:-1] + runs.num_bytes[:-1] == runs.offset[1:])


@pytest.mark.parametrize("layout", LAYOUTS)
def test_offsets_and_sizes_are_those_of_a_c_order_array(layout):
    pool = np.zeros(layout.shape, dtype=f"u{layout.itemsize}")
    assert layout.strides == pool.strides
    assert layout.total_bytes == pool.nbytes
    assert layout.block_bytes == pool[0].nbytes
    assert layout.layer_bytes == pool[0, 0].nbytes
    assert layout.plane_bytes == pool[0, 0, 0].nbytes
    assert layout.token_bytes == pool[0, 0, 0, 0].nbytes
    assert layout.head_bytes == pool[0, 0, 0, 0, 0].nbytes
    assert layout.bytes_per_token == pool[0, :, :, 0].nbytes
    numbers = numbered_pool(layout)
    for index in np.ndindex(layout.shape[:5]):
        block, layer, plane, token, head = index
        offset = layout.offset(block, layer + layout.first_layer, plane, token, head + layout.first_head)
        assert offset == numbers[index][0, 0]


def test_a_layer_or_head_of_another_rank_is_a_bug():
    layout = LAYOUTS[0]
    with pytest.raises(AssertionError):
        layout.offset(0, 5, 0, 0, 1)
    with pytest.raises(AssertionError):
        layout.offset(0, 2, 0, 0, 0)
    with pytest.raises(AssertionError):
        layout.layer_runs(1, [0], 0, 1)
    with pytest.raises(AssertionError):
        layout.block_runs([0, 4])
    with pytest.raises(AssertionError):
        layout.token_runs([-1], 0, 1)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("blocks", [[], [3], [0, 1, 2], [2, 1, 0], [3, 0, 1]])
def test_block_runs(layout, blocks):
    runs = layout.block_runs(blocks)
    assert expand(runs) == numbered_pool(layout)[blocks].ravel().tolist()
    assert_no_neighbours(runs)


def row_bytes(layout, blocks, start, stop, window):
    """Give the byte numbers of a row's tokens in canonical order, token by token."""
    numbers = numbered_pool(layout)
    heads = slice(window.first_head - layout.first_head, window.last_head - layout.first_head)
    return [
        byte
        for layer, plane, token in product(
            range(window.first_layer - layout.first_layer, window.last_layer - layout.first_layer),
            range(2),
            range(start, stop),
        )
        for byte in numbers[blocks[token // layout.block_size], layer, plane, token % layout.block_size, heads].ravel()
    ]


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("blocks", [[2, 0, 3], [0, 1, 2]])
def test_row_runs(layout, blocks):
    whole = layout.window
    for start, stop in product(range(3 * layout.block_size + 1), repeat=2):
        if start > stop:
            continue
        runs = layout.token_runs(blocks, start, stop)
        assert expand(runs) == row_bytes(layout, blocks, start, stop, whole)
        assert_no_neighbours(runs)
        for layer in range(whole.first_layer, whole.last_layer):
            runs = layout.layer_runs(layer, blocks, start, stop)
            part = Window(layer, layer + 1, whole.first_head, whole.last_head)
            assert expand(runs) == row_bytes(layout, blocks, start, stop, part)
            assert_no_neighbours(runs)
        part = Window(whole.last_layer - 1, whole.last_layer, whole.last_head - 1, whole.last_head)
        runs = layout.token_runs(blocks, start, stop, part)
        assert expand(runs) == row_bytes(layout, blocks, start, stop, part)
        assert_no_neighbours(runs)


def test_one_token_is_two_short_runs_per_layer_and_a_whole_block_is_one():
    layout = LAYOUTS[0]
    runs = layout.token_runs([1, 3], 5, 6)
    assert runs.num_bytes.tolist() == [layout.token_bytes] * 2 * layout.num_layers
    assert np.diff(runs.offset).tolist() == [layout.plane_bytes] * (2 * layout.num_layers - 1)
    assert layout.token_runs([1, 3], 4, 8).num_bytes.tolist() == [layout.block_bytes]


def test_token_bases_find_each_rows_block():
    layout = LAYOUTS[0]
    table = np.array([[3, 1, -1], [0, -1, -1], [2, -1, -1]])
    expected = [layout.offset(1, 2, 0, 2, 1), layout.offset(0, 2, 0, 0, 1)]
    assert layout.token_bases(table, np.array([6, 0])).tolist() == expected
    with pytest.raises(AssertionError):
        layout.token_bases(table, np.array([6, 4]))  # row 1 has no second block


@settings(database=None)
@given(st.lists(st.tuples(st.integers(0, 40), st.integers(0, 20)), max_size=6), st.integers(1, 9))
def test_cut_at_multiples(spans, size):
    starts = np.array([start for start, _ in spans], dtype=np.int64)
    stops = starts + np.array([length for _, length in spans], dtype=np.int64)
    expected = [
        (i, part[0], part[-1] + 1)
        for i, (start, length) in enumerate(spans)
        for cell in range(100)
        if (part := [token for token in range(start, start + length) if token // size == cell])
    ]
    assert list(zip(*cut(starts, stops, size), strict=True)) == expected


def test_windows_intersect_and_clip():
    one, other = Window(2, 6, 0, 4), Window(5, 9, 3, 8)
    assert one.intersect(other) == Window(5, 6, 3, 4)
    assert one.intersect(Window(6, 9, 0, 4)).is_empty
    assert one.intersect(Window(0, 9, 4, 8)).is_empty
    assert one.clip_layers(3, None) == Window(3, 6, 0, 4)
    assert one.clip_layers(0, 4) == Window(2, 4, 0, 4)
    assert one.clip_layers(7, None).is_empty


def test_a_row_gets_blocks_and_gives_them_back():
    rows = RowMap(num_microbatches=2, num_rows=3, max_blocks=4, block_size=16)
    rows.append(1, 2, [7, 2])
    rows.append(1, 2, [9])
    rows.append(0, 0, [0])
    assert rows.blocks(1, 2).tolist() == [7, 2, 9]
    assert rows.capacity(1, 2) == 48
    assert rows.capacity(0, 1) == 0
    rows.mark_valid(1, 2, 40)
    assert rows.length.tolist() == [[0, 0, 0], [0, 0, 40]]
    assert rows.table[1].tolist() == [[-1] * 4, [-1] * 4, [7, 2, 9, -1]]
    assert rows.release(1, 2) == [7, 2, 9]
    assert rows.length[1, 2] == 0
    assert rows.capacity(1, 2) == 0
    rows.append(0, 1, [2, 7])
    assert rows.blocks(0, 1).tolist() == [2, 7]


def test_a_row_map_never_lends_a_block_twice_nor_marks_tokens_without_memory():
    rows = RowMap(num_microbatches=1, num_rows=2, max_blocks=2, block_size=4)
    rows.append(0, 0, [1])
    for blocks in ([1], [2, 2], [-1], [3, 4, 5]):
        with pytest.raises(AssertionError):
            rows.append(0, 1, blocks)
    assert rows.blocks(0, 1).tolist() == []
    with pytest.raises(AssertionError):
        rows.mark_valid(0, 0, 5)
