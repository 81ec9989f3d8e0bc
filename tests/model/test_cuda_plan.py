"""Check what the host tells the device before a pass against naive loops."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from dejavu.model.batch import Batch
from dejavu.model.cuda_plan import (
    SHORTEST_ITEM,
    BlockTables,
    StepLayout,
    longest_item,
    plan_prompts,
    write_step,
)


@given(st.lists(st.integers(2, 5000), min_size=1, max_size=64), st.integers(1, 200))
def test_items_are_enough(lengths, spare):
    num_items = len(lengths) + spare
    longest = longest_item(sum(lengths), len(lengths), num_items)
    assert sum(-(-length // longest) for length in lengths) <= num_items
    assert longest == SHORTEST_ITEM or longest <= -(-sum(lengths) // spare)


def batch(context, blocks, num_new=None):
    return Batch(None, num_new or [1] * len(context), context, blocks, list(range(len(context))))


def test_step_words():
    layout = StepLayout(num_rows=4, num_items=7, table_words=40)
    words = np.full(layout.num_words, 77, np.int32)
    blocks = [[5, 3, 9], [8], [2, 7]]
    count = write_step(layout, batch([40, 3, 1700], blocks), BlockTables(), words)
    assert words[4:8].tolist() == [40, 3, 1700, -1]
    starts = words[8:11]
    assert [words[layout.tables_start + s :][: len(b)].tolist() for s, b in zip(starts, blocks, strict=True)] == blocks
    assert count == layout.tables_start + 6
    assert words[12] == -(-(41 + 4 + 1701) // 4)


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
