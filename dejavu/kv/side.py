"""Describe one side of a transfer: a whole pipeline's cache, and which tokens of it are meant."""

from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Self

import numpy as np

from dejavu.kv.layout import Ints, PoolLayout, Window

Row = Hashable  # a mapping's key type is invariant, so mappings of rows have keys of type Any


@dataclass(frozen=True, slots=True)
class RankCache:
    """Name a rank and the layout of its pool."""

    rank: int
    layout: PoolLayout


@dataclass(frozen=True, slots=True, eq=False)
class CacheSide:
    """Describe a whole pipeline's cache: the ranks' pools, and each row's block ids, shared by all of them.

    `rows` maps a row's key (what both sides call it: a request) to its block ids in the order of its tokens. It is
    read when a plan is made, so it may change between plans; a side that only gathers or scatters through packed
    staging may leave the other's empty. The ranks' rectangles must tile their bounding box of layers and heads.
    """

    ranks: tuple[RankCache, ...]
    rows: Mapping[Any, Sequence[int] | Ints]

    def __post_init__(self) -> None:
        layouts = [each.layout for each in self.ranks]
        assert len({each.rank for each in self.ranks}) == len(layouts) > 0, "a rank appears twice, or none does"
        assert len({(each.block_size, each.head_bytes, each.itemsize) for each in layouts}) == 1, layouts
        windows = [each.window for each in layouts]
        assert all(windows[i].intersect(w).is_empty for j, w in enumerate(windows) for i in range(j)), windows
        area = sum(w.num_layers * w.num_heads for w in windows)
        box = bounding_window(windows)
        assert area == box.num_layers * box.num_heads, (windows, box)

    @property
    def block_size(self) -> int:
        """Count the tokens of a block."""
        return self.ranks[0].layout.block_size

    def find_blocks(self, rows: Sequence[Row], owner: Ints, token: Ints) -> Ints:
        """Give the block id of token `token[i]` of row `rows[owner[i]]`; asserts that there is one, in every pool."""
        tables = [np.asarray(self.rows[row], dtype=np.int64) for row in rows]
        sizes = np.array([len(table) for table in tables], dtype=np.int64)
        index = token // self.block_size
        assert (index < sizes[owner]).all(), "a selected token lies behind its row's blocks"
        flat = np.concatenate([*tables, np.empty(0, dtype=np.int64)])
        blocks: Ints = flat[(np.cumsum(sizes) - sizes)[owner] + index]
        num_blocks = min(each.layout.num_blocks for each in self.ranks)
        assert len(blocks) == 0 or (blocks.min() >= 0 and blocks.max() < num_blocks), (blocks, num_blocks)
        return blocks


def bounding_window(windows: Sequence[Window]) -> Window:
    """Give the smallest window that contains all of them."""
    return Window(
        min(w.first_layer for w in windows),
        max(w.last_layer for w in windows),
        min(w.first_head for w in windows),
        max(w.last_head for w in windows),
    )


@dataclass(frozen=True, slots=True, eq=False)
class Selection:
    """Choose tokens [start[i], stop[i]) of row rows[i], in layers [first_layer, last_layer) (None: to the last).

    `start` and `stop` are int64 [num_rows]; a row appears once. The rows' order is part of the canonical order.
    """

    rows: tuple[Row, ...]
    start: Ints
    stop: Ints
    first_layer: int = 0
    last_layer: int | None = None

    def __post_init__(self) -> None:
        assert len(self.rows) == len(self.start) == len(self.stop) == len(set(self.rows)), self.rows
        assert ((self.start >= 0) & (self.start <= self.stop)).all(), (self.start, self.stop)

    @classmethod
    def of(cls, spans: Mapping[Any, tuple[int, int]], first_layer: int = 0, last_layer: int | None = None) -> Self:
        """Choose tokens [start, stop) of each row of `spans`, in its order."""
        bounds = np.array(list(spans.values()), dtype=np.int64).reshape(-1, 2)
        return cls(tuple(spans), bounds[:, 0], bounds[:, 1], first_layer, last_layer)

    @property
    def num_tokens(self) -> int:
        """Count the tokens of all rows."""
        return int((self.stop - self.start).sum())
