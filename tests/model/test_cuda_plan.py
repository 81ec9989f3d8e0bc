"""Check what the host tells the device before a pass against naive loops."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from dejavu.model.batch import Batch
from dejavu.model.cuda_plan import (
    SHORTEST_ITEM,
    BlockTables,
    ItemCutter,
    StepLayout,
    plan_prompts,
    write_step,
)


def check_items(items, lengths):
    seen = [np.zeros(length, int) for length in lengths]
    for index, (row, start, stop, share) in enumerate(items):
        if row < 0:
            continue
        assert start < stop
        seen[row][start:stop] += 1
        first, count = share & 0xFFFF, share >> 16
        assert first <= index < first + count
        assert set(items[first : first + count, 0]) == {row}
        assert first + count == len(items) or items[first + count, 0] != row
    assert all((tokens == 1).all() for tokens in seen)


@given(st.lists(st.integers(2, 3000), min_size=1, max_size=40), st.integers(1, 140))
def test_items_cover_every_token_once(lengths, spare):
    cutter = ItemCutter(len(lengths) + spare)
    for step in (0, 1, 2, 70):  # the kept parts stay right while the rows grow
        grown = np.array(lengths) + step
        check_items(cutter.cut(grown), grown)


def test_items_share_the_work():
    items = ItemCutter(35).cut(np.array([2048, 64]))
    sizes = (items[:, 2] - items[:, 1])[items[:, 0] >= 0]
    assert sizes.max() <= 2 * SHORTEST_ITEM


def batch(context, blocks, num_new=None):
    return Batch(None, num_new or [1] * len(context), context, blocks, list(range(len(context))))


def test_step_words():
    layout = StepLayout(num_rows=4, num_items=7, table_words=40)
    words = np.full(layout.num_words, 77, np.int32)
    blocks = [[5, 3, 9], [8], [2, 7]]
    count = write_step(layout, batch([40, 3, 17], blocks), BlockTables(), ItemCutter(7), words)
    assert words[4:8].tolist() == [40, 3, 17, -1]
    starts = words[8:11]
    assert [words[layout.tables_start + s :][: len(b)].tolist() for s, b in zip(starts, blocks, strict=True)] == blocks
    assert count == layout.tables_start + 6
    assert layout.items_start % 4 == 0
    items = words[layout.items_start : layout.tables_start].reshape(-1, 4)
    assert [(row, stop) for row, _, stop, _ in items.tolist() if row >= 0] == [(0, 41), (1, 4), (2, 18)]


def test_tables_follow_the_lists():
    tables, blocks = BlockTables(), [[4, 5], [7]]
    assert [array.tolist() for array in tables.arrays(blocks)] == [[0, 2], [4, 5, 7]]
    blocks[0].append(9)
    assert [array.tolist() for array in tables.arrays(blocks)] == [[0, 3], [4, 5, 9, 7]]
    blocks[1][0] = 6
    assert [array.tolist() for array in tables.arrays(blocks)] == [[0, 3], [4, 5, 9, 6]]
    assert tables.arrays([[4, 5, 9], [6]])[1] is tables.arrays(blocks)[1]


@pytest.mark.parametrize("context", [[0, 0, 0], [0, 20, 3]])
def test_prompts(context):
    num_new, blocks, num_layers, block_size = [5, 1, 30], [[3], [9, 1], [4, 0, 7, 8]], 3, 16
    plan = plan_prompts(batch(context, blocks, num_new), num_layers, block_size)

    def slot(row, position):
        return blocks[row][position // block_size] * num_layers * 2 * block_size + position % block_size

    new = [(row, context[row] + j) for row in range(3) for j in range(num_new[row])]
    everything = [(row, j) for row in range(3) for j in range(context[row] + num_new[row])]
    assert plan.positions.tolist() == [position for _, position in new]
    assert plan.slots.tolist() == [slot(*token) for token in new]
    assert plan.row_slots.tolist() == ([slot(*token) for token in everything] if any(context) else [])
    assert plan.query_starts.tolist() == [0, 5, 6, 36]
    lengths = [c + n for c, n in zip(context, num_new, strict=True)]
    assert plan.key_starts.tolist() == [0, *np.cumsum(lengths)]
    assert (plan.longest_query, plan.longest_row) == (30, max(lengths))
