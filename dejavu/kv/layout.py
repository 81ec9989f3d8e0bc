"""Say where each byte of a worker's KV pool lies: the block-major layout, and which row owns which block.

One pool per worker, C order:  pool[block, layer, k/v, token, kv_head, head_dim]

    pool    [ block 0 | block 1 | ... | block N-1 ]        num_blocks x block_bytes
                |
    block   [ layer 0 | layer 1 | ... | layer L-1 ]        num_layers x layer_bytes
                |
    layer   [ plane K | plane V ]                          2 x plane_bytes
                |
    plane   [ token 0 | token 1 | ... | token B-1 ]        block_size x token_bytes
                |
    token   [ head 0 | head 1 | ... | head H-1 ]           num_heads x head_bytes

What is contiguous follows from it: a whole block (one run), neighbouring whole blocks (one run), the tokens of one
block in one plane (one run, if all heads are taken). One layer of many blocks is one strided copy (pitch block_bytes,
width layer_bytes). One token of one row is 2 x layers short runs, plane_bytes apart:

    block  [K....t....|V....t....|K....t....|V....t....| ...     t: token_bytes each

Layers and heads are numbered as in the model, not within the rank: a layout knows its first layer and first head.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt

Ints = npt.NDArray[np.int64]


@dataclass(frozen=True, slots=True)
class Window:
    """Name layers [first_layer, last_layer) and KV heads [first_head, last_head) of a model."""

    first_layer: int
    last_layer: int
    first_head: int
    last_head: int

    @property
    def num_layers(self) -> int:
        """Count the layers."""
        return max(0, self.last_layer - self.first_layer)

    @property
    def num_heads(self) -> int:
        """Count the KV heads."""
        return max(0, self.last_head - self.first_head)

    @property
    def is_empty(self) -> bool:
        """Tell whether no layer or no head is in it."""
        return self.num_layers == 0 or self.num_heads == 0

    def intersect(self, other: "Window") -> "Window":
        """Give the layers and heads that both hold; may be empty."""
        return Window(
            max(self.first_layer, other.first_layer),
            min(self.last_layer, other.last_layer),
            max(self.first_head, other.first_head),
            min(self.last_head, other.last_head),
        )

    def clip_layers(self, first_layer: int, last_layer: int | None) -> "Window":
        """Give the part in layers [first_layer, last_layer); None: up to the last one."""
        stop = self.last_layer if last_layer is None else min(self.last_layer, last_layer)
        return Window(max(self.first_layer, first_layer), stop, self.first_head, self.last_head)


@dataclass(frozen=True, slots=True, eq=False)
class Runs:
    """List contiguous runs of bytes in one pool; both arrays int64 [num_runs], in bytes."""

    offset: Ints
    num_bytes: Ints


@dataclass(frozen=True, slots=True)
class PoolLayout:
    """Give the byte offsets of a worker's pool `[block, layer, k/v, token, kv_head, head_dim]`.

    `first_layer` and `first_head` are the model's numbers of the first layer and KV head that the worker holds;
    `itemsize` is that of the cache's dtype. Every method takes the model's numbers.
    """

    num_blocks: int
    first_layer: int
    num_layers: int
    block_size: int
    first_head: int
    num_heads: int
    head_dim: int
    itemsize: int

    def __post_init__(self) -> None:
        positive = (self.num_blocks, self.num_layers, self.block_size, self.num_heads, self.head_dim, self.itemsize)
        assert min(positive) > 0, self
        assert min(self.first_layer, self.first_head) >= 0, self

    @property
    def shape(self) -> tuple[int, int, int, int, int, int]:
        """Give the pool's shape in elements."""
        return self.num_blocks, self.num_layers, 2, self.block_size, self.num_heads, self.head_dim

    @property
    def window(self) -> Window:
        """Give the layers and KV heads that the pool holds."""
        return Window(
            self.first_layer,
            self.first_layer + self.num_layers,
            self.first_head,
            self.first_head + self.num_heads,
        )

    @property
    def head_bytes(self) -> int:
        """Count the bytes of one head of one token, K or V."""
        return self.head_dim * self.itemsize

    @property
    def token_bytes(self) -> int:
        """Count the bytes of one token in one plane (K or V of one layer): the longest run of one token."""
        return self.num_heads * self.head_dim * self.itemsize

    @property
    def plane_bytes(self) -> int:
        """Count the bytes of K, or of V, of one layer in one block."""
        return self.block_size * self.token_bytes

    @property
    def layer_bytes(self) -> int:
        """Count the bytes of one layer in one block."""
        return 2 * self.plane_bytes

    @property
    def block_bytes(self) -> int:
        """Count the bytes of one block: all layers of the stage."""
        return self.num_layers * self.layer_bytes

    @property
    def bytes_per_token(self) -> int:
        """Count the bytes that one token of one row takes in this pool."""
        return 2 * self.num_layers * self.token_bytes

    @property
    def total_bytes(self) -> int:
        """Count the bytes of the pool."""
        return self.num_blocks * self.block_bytes

    @property
    def strides(self) -> tuple[int, int, int, int, int, int]:
        """Give the pool's strides in bytes, in the order of `shape`."""
        return (
            self.block_bytes,
            self.layer_bytes,
            self.plane_bytes,
            self.token_bytes,
            self.head_bytes,
            self.itemsize,
        )

    def offset(self, block: int, layer: int, plane: int, token: int, head: int) -> int:
        """Give the byte offset of one head of the block's token `token`; plane 0 is K, 1 is V."""
        index = (block, layer - self.first_layer, plane, token, head - self.first_head)
        assert all(0 <= i < n for i, n in zip(index, self.shape, strict=False)), (index, self)
        return sum(i * stride for i, stride in zip(index, self.strides, strict=False))

    def bases(self, block: Ints, token: Ints) -> Ints:
        """Give the byte offset of each (block, token) in its block's first plane; arrays of one shape."""
        return block * self.block_bytes + token * self.token_bytes

    def token_bases(self, table: Ints, position: Ints) -> Ints:
        """Give the base of token `position[i]` of each row i; `table` int64 [num_rows, max_blocks] has their blocks."""
        block = table[np.arange(len(position)), position // self.block_size]
        self.check_blocks(block)
        return self.bases(block, position % self.block_size)

    def planes(self, window: Window) -> Ints:
        """Give int64 [layers, 2]: what to add to a base for K and V of each layer of `window`, at its first head."""
        assert self.window.intersect(window) == window, (window, self)
        first = (window.first_layer - self.first_layer) * self.layer_bytes
        head = (window.first_head - self.first_head) * self.head_bytes
        return (first + head + self.plane_bytes * np.arange(2 * window.num_layers)).reshape(-1, 2)

    def block_runs(self, blocks: Sequence[int] | Ints) -> Runs:
        """Give the runs of whole blocks, in the order given; neighbours that follow each other are one run."""
        ids = np.asarray(blocks, dtype=np.int64)
        self.check_blocks(ids)
        return merge_runs(Runs(ids * self.block_bytes, np.full(len(ids), self.block_bytes)))

    def layer_runs(self, layer: int, blocks: Sequence[int] | Ints, start: int, stop: int) -> Runs:
        """Give the runs of one layer of a row's tokens [start, stop): those of K, then those of V.

        `blocks` are the row's block ids, the first of which holds token 0.
        """
        part = Window(layer, layer + 1, self.first_head, self.first_head + self.num_heads)
        return self.token_runs(blocks, start, stop, part)

    def token_runs(self, blocks: Sequence[int] | Ints, start: int, stop: int, window: Window | None = None) -> Runs:
        """Give the runs of a row's tokens [start, stop) in canonical order: layer, k/v, token, head.

        `window` narrows layers and heads (default: all of the pool). Runs that follow each other are one run.
        """
        part = self.window if window is None else window
        whole_heads = part.num_heads == self.num_heads
        _, first, last = cut(np.array([start]), np.array([stop]), self.block_size if whole_heads else 1)
        ids = np.asarray(blocks, dtype=np.int64)[first // self.block_size]
        self.check_blocks(ids)
        offset = self.planes(part).reshape(-1, 1) + self.bases(ids, first % self.block_size)
        num_bytes = (last - first) * (part.num_heads * self.head_bytes)
        return merge_runs(Runs(offset.ravel(), np.tile(num_bytes, 2 * part.num_layers)))

    def check_blocks(self, blocks: Ints) -> None:
        """Assert that each block id lies in the pool."""
        assert len(blocks) == 0 or (blocks.min() >= 0 and blocks.max() < self.num_blocks), (blocks, self.num_blocks)


def cut(starts: Ints, stops: Ints, size: int) -> tuple[Ints, Ints, Ints]:
    """Cut the intervals [starts, stops) at the multiples of `size`; give (interval's index, start, stop) of each part.

    Parts are in the intervals' order, ascending in each; an empty interval has none.
    """
    first = starts // size
    counts = np.where(stops > starts, -(-stops // size) - first, 0)
    owner = np.repeat(np.arange(len(starts)), counts)
    edge = (np.arange(len(owner)) + np.repeat(first - np.cumsum(counts) + counts, counts)) * size
    return owner, np.maximum(edge, starts[owner]), np.minimum(edge + size, stops[owner])


def merge_runs(runs: Runs) -> Runs:
    """Make one run of those that follow each other in the list and in memory."""
    if len(runs.offset) < 2:
        return runs
    is_first = np.ones(len(runs.offset), dtype=np.bool_)
    np.not_equal(runs.offset[1:], runs.offset[:-1] + runs.num_bytes[:-1], out=is_first[1:])
    if is_first.all():
        return runs
    first = np.flatnonzero(is_first)
    return Runs(runs.offset[first], np.add.reduceat(runs.num_bytes, first))


@dataclass(slots=True, eq=False)
class RowMap:
    """Map (microbatch, row) to the row's blocks and to how many of its tokens are valid.

                     table[microbatch, row, :]       length
        microbatch 0  row 0 | 7  2  9 -1 |           40      tokens [0, 40) valid, in blocks 7, 2, 9 (of 16 tokens)
                      row 1 | 0 -1 -1 -1 |            5
        microbatch 1  row 0 |-1 -1 -1 -1 |            0      a free row

    `table` is int64 [num_microbatches, num_rows, max_blocks], -1 where there is no block; `length` is int64
    [num_microbatches, num_rows]. Token t lies in block `table[..., t // block_size]` at `t % block_size`. A block
    belongs to at most one row. A token counts as valid once every layer of the rank has it; until then a transfer or
    a step may be writing behind `length`. Planned steps read `table[microbatch]`, which is never moved.
    """

    num_microbatches: int
    num_rows: int
    max_blocks: int
    block_size: int
    table: Ints = field(init=False)
    length: Ints = field(init=False)
    _held: set[int] = field(init=False, default_factory=set)

    def __post_init__(self) -> None:
        self.table = np.full((self.num_microbatches, self.num_rows, self.max_blocks), -1, dtype=np.int64)
        self.length = np.zeros((self.num_microbatches, self.num_rows), dtype=np.int64)

    def blocks(self, microbatch: int, row: int) -> Ints:
        """Give the row's block ids, in the order of its tokens (a view; empty for a free row)."""
        entries: Ints = self.table[microbatch, row]
        return entries[: int(np.count_nonzero(entries >= 0))]

    def capacity(self, microbatch: int, row: int) -> int:
        """Count the tokens that the row's blocks hold."""
        return len(self.blocks(microbatch, row)) * self.block_size

    def append(self, microbatch: int, row: int, blocks: Sequence[int]) -> None:
        """Give further blocks to the row; none may belong to a row already."""
        count = len(self.blocks(microbatch, row))
        assert count + len(blocks) <= self.max_blocks, (count, blocks, self.max_blocks)
        assert len(set(blocks)) == len(blocks), blocks
        assert self._held.isdisjoint(blocks), (blocks, self._held)
        assert all(block >= 0 for block in blocks), blocks
        self.table[microbatch, row, count : count + len(blocks)] = blocks
        self._held.update(blocks)

    def mark_valid(self, microbatch: int, row: int, length: int) -> None:
        """State that tokens [0, length) of the row are valid in every layer."""
        assert 0 <= length <= self.capacity(microbatch, row), (length, self.capacity(microbatch, row))
        self.length[microbatch, row] = length

    def release(self, microbatch: int, row: int) -> list[int]:
        """Free the row and give back its block ids."""
        blocks: list[int] = self.blocks(microbatch, row).tolist()
        self._held.difference_update(blocks)
        self.table[microbatch, row] = -1
        self.length[microbatch, row] = 0
        return blocks
