"""Lay out what the host tells the device before a pass, and cut token rows into items: pure arithmetic on numpy.

A token step of `num_rows` rows (the batch's, padded) reads int32 words in this order; the kernels' arguments are views
of them. A padded row has context -1 and no items, so nothing is read or stored for it.

    token_ids [num_rows]   context [num_rows]   table_starts [num_rows]   items [num_items, 4]   tables [...]

`tables` holds the block ids of all rows one after the other, `table_starts` where each row's begin. An item is
(row, start, stop, first | count << 16): tokens [start, stop) of a row, which is cut into `count` items from `first` on;
items that are not used have row -1.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from dejavu.model.batch import Batch

ITEM_WORDS = 4
SHORTEST_ITEM = 64  # tokens: below that, adding the parts costs more than a part

Words = NDArray[np.int32]


@dataclass(frozen=True, slots=True)
class StepLayout:
    """Say where the words of a token step lie; `table_words` is the room for all tables."""

    num_rows: int
    num_items: int
    table_words: int

    @property
    def items_start(self) -> int:
        """Give the first word of the items, which is a multiple of 4: kernels read an item at once."""
        return -(-3 * self.num_rows // ITEM_WORDS) * ITEM_WORDS

    @property
    def tables_start(self) -> int:
        """Give the first word of the tables."""
        return self.items_start + ITEM_WORDS * self.num_items

    @property
    def num_words(self) -> int:
        """Count the words."""
        return self.tables_start + self.table_words


class BlockTables:
    """Turn rows' lists of blocks into arrays, once as long as a list's contents stay."""

    __slots__ = ("_known",)

    def __init__(self) -> None:
        self._known: dict[int, tuple[list[int], Words]] = {}

    def array(self, blocks: list[int]) -> Words:
        """Give a row's block ids; rows are told apart by their first block, which no two rows share."""
        known = self._known.get(blocks[0])
        if known is not None and known[0] == blocks:
            return known[1]
        array = np.array(blocks, dtype=np.int32)
        self._known[blocks[0]] = (list(blocks), array)
        return array


def cut_items(lengths: NDArray[np.int64], num_items: int) -> Words:
    """Cut rows of `lengths` tokens into at most `num_items` items of nearly one length: int32 [num_items, 4]."""
    assert len(lengths) <= num_items, "a row has an item at least"
    longest = max(SHORTEST_ITEM, -(-int(lengths.sum()) // num_items))
    counts = -(-lengths // longest)
    while counts.sum() > num_items:
        longest += max(1, longest // 16)
        counts = -(-lengths // longest)
    rows = np.repeat(np.arange(len(lengths)), counts)
    firsts = np.cumsum(counts) - counts
    places = np.arange(len(rows)) - firsts[rows]
    each = -(-lengths // counts)[rows]  # even parts of a row
    items = np.full((num_items, ITEM_WORDS), -1, dtype=np.int32)
    used = items[: len(rows)]
    used[:, 0] = rows
    used[:, 1] = np.minimum(places * each, lengths[rows])
    used[:, 2] = np.minimum((places + 1) * each, lengths[rows])
    used[:, 3] = firsts[rows] | counts[rows] << 16
    return items


def write_step(layout: StepLayout, batch: Batch, tables: BlockTables, words: Words) -> int:
    """Write a token step's words, but for the token ids, and give how many there are."""
    num_rows, given = layout.num_rows, batch.num_rows
    context = np.array(batch.context, dtype=np.int64)
    arrays = [tables.array(blocks) for blocks in batch.blocks]
    sizes = np.array([len(array) for array in arrays])
    ends = np.cumsum(sizes)
    words[num_rows : num_rows + given] = context
    words[num_rows + given : 2 * num_rows] = -1
    words[2 * num_rows : 2 * num_rows + given] = ends - sizes
    words[layout.items_start : layout.tables_start] = cut_items(context + 1, layout.num_items).ravel()
    stop = layout.tables_start + int(ends[-1])
    assert stop <= layout.num_words, "the tables' room is that of the longest rows"
    np.concatenate(arrays, out=words[layout.tables_start : stop])
    return stop


@dataclass(frozen=True, slots=True)
class PromptPlan:
    """Hold where the tokens of a pass with prompts stand, by token of the pass, and what each row attends to.

    `slots` are places in the pool, as rows of [.., kv_heads * head_dim] in layer 0: for the new tokens, and in
    `row_slots` for all tokens of all rows, one row after the other (empty where no row has a context).
    """

    positions: NDArray[np.int32]
    slots: NDArray[np.int64]
    row_slots: NDArray[np.int64]
    query_starts: NDArray[np.int32]
    key_starts: NDArray[np.int32]
    longest_query: int
    longest_row: int


def plan_prompts(batch: Batch, num_layers: int, block_size: int) -> PromptPlan:
    """Plan a pass over pool [block, num_layers, 2, block_size, ...]."""
    num_new, context = np.array(batch.num_new), np.array(batch.context)
    lengths = context + num_new
    per_row = [
        _row_slots(blocks, length, num_layers, block_size)
        for blocks, length in zip(batch.blocks, lengths.tolist(), strict=True)
    ]
    has_context = bool(context.any())
    new = [slots[start:] for slots, start in zip(per_row, batch.context, strict=True)]
    positions = [np.arange(start, stop, dtype=np.int32) for start, stop in zip(context, lengths, strict=True)]
    return PromptPlan(
        np.concatenate(positions),
        np.concatenate(new),
        np.concatenate(per_row) if has_context else np.empty(0, np.int64),
        _starts(num_new),
        _starts(lengths),
        int(num_new.max()),
        int(lengths.max()),
    )


def _row_slots(blocks: list[int], length: int, num_layers: int, block_size: int) -> NDArray[np.int64]:
    assert len(blocks) * block_size >= length, "a row's blocks are enough for its tokens"
    tokens = np.arange(length)
    slots: NDArray[np.int64] = (
        np.array(blocks, dtype=np.int64)[tokens // block_size] * (num_layers * 2 * block_size) + tokens % block_size
    )
    return slots


def _starts(counts: NDArray[np.int64]) -> NDArray[np.int32]:
    starts = np.zeros(len(counts) + 1, dtype=np.int32)
    np.cumsum(counts, out=starts[1:])
    return starts
