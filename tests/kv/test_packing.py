"""Check the canonical order against an array that is sliced row by row, and that both ends agree on it."""

from itertools import pairwise, product

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dejavu.kv.layout import PoolLayout, Window
from dejavu.kv.packing import PackedStep, pack
from dejavu.kv.plan import Resharding
from dejavu.kv.side import CacheSide, RankCache, Selection

NUM_LAYERS, NUM_HEADS, HEAD_DIM = 5, 6, 2
ROWS = {"a": 19, "b": 5, "c": 8}
CACHE = {  # what each row's cache holds: [layer, k/v, token, head, dim], numbered
    row: (i * 12000 + np.arange(NUM_LAYERS * 2 * n * NUM_HEADS * HEAD_DIM, dtype=np.uint16)).reshape(
        NUM_LAYERS, 2, n, NUM_HEADS, HEAD_DIM
    )
    for i, (row, n) in enumerate(ROWS.items())
}
SELECTIONS = [
    Selection.of({"a": (0, 19), "b": (0, 5), "c": (0, 8)}),
    Selection.of({"c": (2, 7), "a": (3, 18), "b": (4, 4)}, 1, 4),
    Selection.of({"b": (4, 5), "c": (7, 8), "a": (16, 17)}),
    Selection.of({"a": (15, 19), "b": (0, 3), "c": (7, 8)}, 0, 3),
    Selection.of({"b": (3, 3)}),
    Selection.of({}),
]


def make_side(seed, stages, tp, block_size):
    count = sum(-(-n // block_size) for n in ROWS.values())
    ids = np.random.default_rng(seed).permutation(count + 3)
    rows, used = {}, 0
    for row, n in ROWS.items():
        rows[row] = ids[used : used + -(-n // block_size)]
        used += -(-n // block_size)
    each = NUM_HEADS // tp
    layouts = [
        PoolLayout(count + 3, l0, l1 - l0, block_size, h * each, each, HEAD_DIM, 2)
        for (l0, l1), h in product(pairwise(stages), range(tp))
    ]
    return CacheSide(tuple(RankCache(i, layout) for i, layout in enumerate(layouts)), rows)


def fill_pool(side, layout):
    """Give a pool that holds the rows' cache, block by block."""
    pool = np.full(layout.shape, 65535, dtype=np.uint16)
    w = layout.window
    for row, blocks in side.rows.items():
        for token in range(ROWS[row]):
            part = CACHE[row][w.first_layer : w.last_layer, :, token, w.first_head : w.last_head]
            pool[blocks[token // layout.block_size], :, :, token % layout.block_size] = part
    return pool.reshape(-1).view(np.uint8)


def pack_directly(window, selection):
    """Give the bytes in canonical order, cut from the rows' cache."""
    w = window
    return b"".join(
        CACHE[row][layer, :, start:stop, w.first_head : w.last_head].tobytes()
        for layer in range(w.first_layer, w.last_layer)
        for row, start, stop in zip(selection.rows, selection.start, selection.stop, strict=True)
    )


def move(pieces, source, target):
    for a, b, n in zip(pieces.source.tolist(), pieces.target.tolist(), pieces.nbytes.tolist(), strict=True):
        assert min(a, b) >= 0
        assert n > 0
        assert a + n <= len(source)
        assert b + n <= len(target)
        target[b : b + n] = source[a : a + n]


SIDES = [((0, 5), 1, 16), ((0, 2, 5), 2, 4), ((0, 1, 3, 5), 3, 3), ((0, 1, 2, 3, 5), 1, 1), ((0, 4, 5), 6, 6)]


@pytest.mark.parametrize("selection", SELECTIONS)
@pytest.mark.parametrize("one", SIDES)
def test_what_one_side_scatters_the_other_gathers(one, selection):
    source = make_side(1, *one)
    sent = {each.rank: fill_pool(source, each.layout) for each in source.ranks}
    for shape in SIDES:
        target = make_side(2, *shape)
        # neither end reads the other's rows
        sender = Resharding(source, CacheSide(target.ranks, {}))
        receiver = Resharding(CacheSide(source.ranks, {}), target)
        direct = Resharding(source, target).plan(selection)
        packed = {}
        for rank, pool in sent.items():
            for pair in [pair for pair in sender.select(selection) if pair.source_rank == rank]:
                packing = pack(sender.source, pair.source, pair.window, selection)
                packed[rank, pair.target_rank] = np.full(packing.num_bytes, 99, dtype=np.uint8)
                move(packing.pieces, pool, packed[rank, pair.target_rank])
                assert packed[rank, pair.target_rank].tobytes() == pack_directly(packing.window, selection)
        assert {pair: len(each) for pair, each in packed.items()} == {
            (t.source_rank, t.target_rank): t.num_bytes for t in direct.transfers
        }
        for each in target.ranks:
            wanted, got = (np.full(each.layout.total_bytes, 77, dtype=np.uint8) for _ in range(2))
            for pair in [pair for pair in receiver.select(selection) if pair.target_rank == each.rank]:
                packing = pack(receiver.target, pair.target, pair.window, selection)
                move(packing.pieces.inverse, packed[pair.source_rank, each.rank], got)
            for transfer in direct.received_by(each.rank):
                move(transfer.pieces(), sent[transfer.source_rank], wanted)
            assert got.tobytes() == wanted.tobytes()


@settings(max_examples=100, deadline=None, database=None)
@given(st.sampled_from(SIDES), st.sampled_from(SELECTIONS), st.integers(1, 3000), st.data())
def test_chunks_fit_the_staging_buffer_and_make_up_the_packed_bytes(shape, selection, staging_bytes, data):
    side = make_side(4, *shape)
    layout = data.draw(st.sampled_from(side.ranks)).layout
    heads = sorted(data.draw(st.lists(st.integers(0, layout.num_heads), min_size=2, max_size=2, unique=True)))
    whole = layout.window
    window = Window(whole.first_layer, whole.last_layer, whole.first_head + heads[0], whole.first_head + heads[1])
    packing = pack(side, layout, window, selection)
    pool, expected, got = fill_pool(side, layout), pack_directly(window, selection), b""
    assert packing.token_bytes == window.num_heads * HEAD_DIM * 2
    for chunk in packing.chunks(staging_bytes):
        assert chunk.start == len(got)
        assert 0 < chunk.pieces.total_bytes <= staging_bytes
        staging = np.full(chunk.pieces.total_bytes, 99, dtype=np.uint8)
        move(chunk.pieces, pool, staging)
        got += staging.tobytes()
        size = packing.chunk_bytes(staging_bytes)
        assert chunk.pieces.total_bytes == min(size, len(expected) - chunk.start)
        assert size % packing.token_bytes == 0 or size == staging_bytes < packing.token_bytes
    assert got == expected


@pytest.mark.parametrize("shape", SIDES)
def test_pieces_are_the_fewest(shape):
    side = CacheSide(make_side(4, *shape).ranks, {"b": [1, 2, 3, 4, 5]})
    for each in side.ranks:
        pieces = pack(side, each.layout, each.layout.window, Selection.of({"b": (0, 5)})).pieces
        assert not (pieces.source[1:] == pieces.source[:-1] + pieces.nbytes[:-1]).any()
        assert (pieces.target == np.cumsum(pieces.nbytes) - pieces.nbytes).all()


def test_a_whole_block_packs_as_one_piece():
    side = make_side(1, (0, 2, 5), 2, 4)
    layout = side.ranks[0].layout
    packing = pack(side, layout, layout.window, Selection.of({"a": (4, 8)}))
    assert packing.pieces.nbytes.tolist() == [layout.block_bytes]


def test_a_prefix_completes_layers():
    side = make_side(1, (0, 5), 1, 4)
    layout = side.ranks[0].layout
    packing = pack(side, layout, Window(1, 4, 2, 4), SELECTIONS[0])
    each = 32 * 2 * 2 * HEAD_DIM * 2
    assert packing.layer_bytes == each
    assert [packing.count_layers(n) for n in (0, each - 1, each, 2 * each + 5, 3 * each)] == [0, 0, 1, 2, 3]
    single = [pack(side, layout, Window(n, n + 1, 2, 4), SELECTIONS[0]) for n in range(1, 4)]
    assert sum(part.num_bytes for part in single) == packing.num_bytes


@pytest.mark.parametrize("shape", SIDES)
def test_a_repeated_step_packs_as_its_selection(shape):
    side = make_side(3, *shape)
    rows = ("c", "a", "b")
    table = np.array([[*side.rows[row], *[-1] * 20][:20] for row in rows])
    for each in side.ranks:
        whole = each.layout.window
        half = Window(whole.first_layer, whole.last_layer, whole.first_head, whole.first_head + 1)
        pool = fill_pool(side, each.layout)
        for window, position in product((whole, half), ([0, 0, 0], [7, 18, 4], [3, 11, 2])):
            packing = PackedStep(each.layout, window).packing(table, np.array(position))
            packed = np.full(packing.num_bytes, 99, dtype=np.uint8)
            move(packing.pieces, pool, packed)
            spans = {row: (p, p + 1) for row, p in zip(rows, position, strict=True)}
            assert packed.tobytes() == pack_directly(window, Selection.of(spans))
