"""Lay out what the host tells the device before a pass: pure arithmetic on numpy.

A token step of `num_rows` rows (the batch's, padded) reads int32 words in this order; the kernels' arguments are views
of them. A padded row has context -1, so nothing is read or stored for it.

    token_ids [num_rows]   context [num_rows]   table_starts [num_rows]   longest [1]   tables [...]

`tables` holds the block ids of all rows one after the other, `table_starts` where each row's begin. The attention
kernel cuts rows into items of at most `longest` tokens, which is chosen so that there are at most `num_items`.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from dejavu.model.batch import Batch

SHORTEST_ITEM = 64  # tokens: below that, adding the parts costs more than a part
MOST_TABLES = 1024  # batches whose tables are kept

Words = NDArray[np.int32]


@dataclass(frozen=True, slots=True)
class StepLayout:
    """Say where the words of a token step lie; `table_words` is the room for all tables."""

    num_rows: int
    num_items: int
    table_words: int

    @property
    def tables_start(self) -> int:
        """Give the first word of the tables."""
        return 3 * self.num_rows + 1

    @property
    def num_words(self) -> int:
        """Count the words."""
        return self.tables_start + self.table_words


class BlockTables:
    """Turn a batch's lists of blocks into one array, once as long as their contents stay."""

    __slots__ = ("_known",)

    def __init__(self) -> None:
        self._known: dict[tuple[int, ...], tuple[list[list[int]], Words, Words]] = {}

    def arrays(self, blocks: list[list[int]]) -> tuple[Words, Words]:
        """Give where each row's blocks start among all, and all; batches are told apart by their rows' first blocks."""
        key = tuple([row[0] for row in blocks])
        known = self._known.get(key)
        if known is not None and known[0] == blocks:
            return known[1:]
        sizes = np.array([len(row) for row in blocks])
        starts = (np.cumsum(sizes) - sizes).astype(np.int32)
        tables = np.array([block for row in blocks for block in row], dtype=np.int32)
        if len(self._known) > MOST_TABLES:
            self._known.clear()
        self._known[key] = [list(row) for row in blocks], starts, tables
        return starts, tables


def longest_item(num_tokens: int, num_rows: int, num_items: int) -> int:
    """Give the length at which rows of `num_tokens` tokens in all are cut, however they share them."""
    assert num_rows < num_items, "a row has an item at least"
    return max(SHORTEST_ITEM, -(-num_tokens // (num_items - num_rows)))  # each row's last item may be nearly empty


def write_step(layout: StepLayout, batch: Batch, tables: BlockTables, words: Words) -> int:
    """Write a token step's words, but for the token ids, and give how many there are."""
    num_rows, given = layout.num_rows, batch.num_rows
    starts, blocks = tables.arrays(batch.blocks)
    words[num_rows : num_rows + given] = batch.context
    words[num_rows + given : 2 * num_rows] = -1
    words[2 * num_rows : 2 * num_rows + given] = starts
    words[layout.tables_start - 1] = longest_item(sum(batch.context) + given, given, layout.num_items)
    stop = layout.tables_start + len(blocks)
    assert stop <= layout.num_words, "the tables' room is that of the longest rows"
    words[layout.tables_start : stop] = blocks
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
