"""Plan who must get which bytes of the KV cache, between any two layouts of it. Pure arithmetic, no communication.

A *side* is a whole pipeline's cache: which rank holds which layers and heads, and which blocks each row has. The two
sides may differ in everything but head_dim and itemsize: depth (also where it does not divide), tensor degree, block
size, row maps.

         source: 2 stages, tp 2                target: 3 stages, tp 1
    layer 0 +---------+---------+              +-------------------+
            |  rank 0 |  rank 1 |              |      rank 4       |      A transfer is one rectangle (layers x heads)
            |         |         |              +-------------------+      that a source and a target rank share:
          3 +---------+---------+    =====>    |      rank 5       |      0->4, 1->4, 0->5, 1->5, 2->5, 3->5, 2->6,
            |  rank 2 |  rank 3 |              +-------------------+      3->6.
            |         |         |              |      rank 6       |
          6 +---------+---------+              +-------------------+
       heads 0        h         2h             0                   2h

The tokens of each row are cut where a block ends on either side; such a *segment* lies in one block here and in one
block there, the same for all transfers:

    tokens           0       4       8      12      16
    source, 4        | blk 9 | blk 2 | blk 5 | blk 0 |
    target, 6        |   blk 3   |   blk 7   |  blk 1
    segments         |       |   |   |       |       |        e.g. tokens [6, 8): block 2 at 2 -> block 7 at 0

`Transfer.pieces` gives the (source offset, target offset, bytes) of a transfer, for carriers that see both pools.
Carriers that do not see both pack the same bytes in canonical order (packing.py).

A transfer's bytes are valid at the target when they all have arrived, and a layer there only when every source rank
that has a part of its heads is done: `Plan.arrivals` says which transfers make which tokens valid.
"""

from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from itertools import pairwise, product

import numpy as np
import numpy.typing as npt

from dejavu.device.pieces import Pieces
from dejavu.kv.layout import Ints, PoolLayout, Window, cut
from dejavu.kv.side import CacheSide, Row, Selection


@dataclass(frozen=True, slots=True, eq=False)
class Segments:
    """List runs of tokens that lie in one block on either side; int64 arrays [num_segments], in the rows' order.

    Tokens [token, token + num_tokens) of the selection's row number `row` lie in `source_block` from `source_token`
    on, and in `target_block` from `target_token` on. A CPU carrier copies `pool[block, layers, :, tokens, heads]` by
    them, one strided copy per segment.
    """

    row: Ints
    token: Ints
    num_tokens: Ints
    source_block: Ints
    source_token: Ints
    target_block: Ints
    target_token: Ints

    def __len__(self) -> int:
        return len(self.row)

    def pick(self, mask: npt.NDArray[np.bool_]) -> "Segments":
        """Give the segments where `mask` holds."""
        if mask.all():
            return self
        index = np.flatnonzero(mask)
        return self.take(index, np.zeros_like(index), self.num_tokens[index])

    def take(self, index: Ints, skip: Ints, num_tokens: Ints) -> "Segments":
        """Give, of the segments `index`, the `num_tokens` tokens after the first `skip`."""
        return Segments(
            self.row[index],
            self.token[index] + skip,
            num_tokens,
            self.source_block[index],
            self.source_token[index] + skip,
            self.target_block[index],
            self.target_token[index] + skip,
        )

    def cut_tokens(self) -> "Segments":
        """Make one segment of each token."""
        index, token, _ = cut(self.token, self.token + self.num_tokens, 1)
        return self.take(index, token - self.token[index], np.ones_like(token))


def find_segments(source: CacheSide, target: CacheSide, selection: Selection) -> Segments:
    """Cut the selected tokens where a block ends on either side."""
    row, start, stop = cut(selection.start, selection.stop, source.block_size)
    if target.block_size % source.block_size:
        part, start, stop = cut(start, stop, target.block_size)
        row = row[part]
    return Segments(
        row,
        start,
        stop - start,
        source.find_blocks(selection.rows, row, start),
        start % source.block_size,
        target.find_blocks(selection.rows, row, start),
        start % target.block_size,
    )


@dataclass(frozen=True, slots=True)
class Overlap:
    """Name a source and a target rank, their pools, and the layers and heads to move from one to the other."""

    source_rank: int
    target_rank: int
    source: PoolLayout
    target: PoolLayout
    window: Window

    @property
    def piece_bytes(self) -> int:
        """Count the bytes of one token in one plane."""
        return self.window.num_heads * self.source.head_bytes

    @property
    def is_whole_tokens(self) -> bool:
        """Tell whether both ranks hold exactly the window's heads, so that a plane's tokens are contiguous."""
        return self.window.num_heads == self.source.num_heads == self.target.num_heads

    @property
    def is_whole_blocks(self) -> bool:
        """Tell whether both ranks hold exactly the window, so that neighbouring blocks are contiguous."""
        return self.source.window == self.target.window == self.window

    def clip_layers(self, first_layer: int, last_layer: int | None) -> "Overlap":
        """Give the part in layers [first_layer, last_layer)."""
        return replace(self, window=self.window.clip_layers(first_layer, last_layer))


@dataclass(frozen=True, slots=True, eq=False)
class Transfer:
    """Move the overlap's layers and heads of the segments' tokens from a source to a target rank."""

    overlap: Overlap
    segments: Segments

    @property
    def source_rank(self) -> int:
        """Give the rank that has the bytes."""
        return self.overlap.source_rank

    @property
    def target_rank(self) -> int:
        """Give the rank that must get them."""
        return self.overlap.target_rank

    @property
    def window(self) -> Window:
        """Give the layers and heads that move."""
        return self.overlap.window

    @property
    def num_bytes(self) -> int:
        """Count the bytes that move."""
        return int(self.segments.num_tokens.sum()) * 2 * self.window.num_layers * self.overlap.piece_bytes

    def pieces(self) -> Pieces:
        """List the fewest pieces: none can be merged with another. Computed at each call."""
        if not self.overlap.is_whole_tokens:
            return list_planes(self.overlap, self.segments.cut_tokens())
        size, target_size = self.overlap.source.block_size, self.overlap.target.block_size
        is_block = self.segments.num_tokens == (size if size == target_size else -1)
        blocks = list_blocks(self.overlap, self.segments.pick(is_block))
        planes = list_planes(self.overlap, self.segments.pick(~is_block))
        pieces = concatenate(blocks, planes)
        if self.overlap.is_whole_blocks and has_neighbours(self.overlap, self.segments):
            return coalesce(pieces)
        return pieces


def list_planes(overlap: Overlap, segments: Segments) -> Pieces:
    """List one piece per segment, layer and plane, in this order."""
    source = overlap.source.bases(segments.source_block, segments.source_token)
    target = overlap.target.bases(segments.target_block, segments.target_token)
    return Pieces(
        np.add.outer(source, overlap.source.planes(overlap.window).ravel()).ravel(),
        np.add.outer(target, overlap.target.planes(overlap.window).ravel()).ravel(),
        np.repeat(segments.num_tokens * overlap.piece_bytes, 2 * overlap.window.num_layers),
    )


def list_blocks(overlap: Overlap, segments: Segments) -> Pieces:
    """List one piece per segment, each a whole block of one size on both sides: its planes are contiguous."""
    source = overlap.source.bases(segments.source_block, segments.source_token)
    target = overlap.target.bases(segments.target_block, segments.target_token)
    return Pieces(
        source + overlap.source.planes(overlap.window)[0, 0],
        target + overlap.target.planes(overlap.window)[0, 0],
        np.full(len(segments), overlap.window.num_layers * overlap.source.layer_bytes),
    )


def concatenate(one: Pieces, other: Pieces) -> Pieces:
    """Join two lists of pieces."""
    if len(one) == 0 or len(other) == 0:
        return one if len(other) == 0 else other
    return Pieces(
        np.concatenate([one.source, other.source]),
        np.concatenate([one.target, other.target]),
        np.concatenate([one.nbytes, other.nbytes]),
    )


def coalesce(pieces: Pieces) -> Pieces:
    """Merge all pieces that follow each other on both sides; they then ascend by source offset."""
    if len(pieces) < 2:
        return pieces
    order = np.argsort(pieces.source)
    source, target, nbytes = pieces.source[order], pieces.target[order], pieces.nbytes[order]
    joined = (source[1:] == source[:-1] + nbytes[:-1]) & (target[1:] == target[:-1] + nbytes[:-1])
    first = np.flatnonzero(np.concatenate([[True], ~joined]))
    return Pieces(source[first], target[first], np.add.reduceat(nbytes, first))


def has_neighbours(overlap: Overlap, segments: Segments) -> bool:
    """Tell whether a segment that ends its block on both sides is followed, on both, by one that begins its block.

    Only there can the last plane's piece of one meet the first plane's piece of the other (in pools of whole windows).
    """
    source_end = segments.source_token + segments.num_tokens == overlap.source.block_size
    target_end = segments.target_token + segments.num_tokens == overlap.target.block_size
    ends = np.flatnonzero(source_end & target_end)
    begins = np.flatnonzero((segments.source_token == 0) & (segments.target_token == 0))
    if len(ends) == 0 or len(begins) == 0:
        return False
    begins = begins[np.argsort(segments.source_block[begins])]
    place = np.searchsorted(segments.source_block[begins], segments.source_block[ends] + 1)
    next_one = begins[np.minimum(place, len(begins) - 1)]
    source_meets = segments.source_block[next_one] == segments.source_block[ends] + 1
    return bool((source_meets & (segments.target_block[next_one] == segments.target_block[ends] + 1)).any())


@dataclass(frozen=True, slots=True, eq=False)
class Arrival:
    """State what becomes valid at a target rank once its transfers from all of `source_ranks` are complete.

    Tokens [start[i], stop[i]) of row rows[i], in layers [first_layer, last_layer), all of the rank's heads.
    """

    target_rank: int
    source_ranks: tuple[int, ...]
    first_layer: int
    last_layer: int
    rows: tuple[Row, ...]
    start: Ints
    stop: Ints


@dataclass(frozen=True, slots=True, eq=False)
class Plan:
    """Hold the transfers of a selection between two sides, at most one for each pair of ranks."""

    selection: Selection
    segments: Segments
    transfers: tuple[Transfer, ...]

    @property
    def num_bytes(self) -> int:
        """Count the bytes that move."""
        return sum(transfer.num_bytes for transfer in self.transfers)

    def received_by(self, rank: int) -> tuple[Transfer, ...]:
        """Give the transfers to target rank `rank`."""
        return tuple(transfer for transfer in self.transfers if transfer.target_rank == rank)

    def clip_layers(self, first_layer: int, last_layer: int) -> "Plan":
        """Give the part in layers [first_layer, last_layer) without cutting the tokens again (layer-wise streaming)."""
        clipped = (transfer.overlap.clip_layers(first_layer, last_layer) for transfer in self.transfers)
        transfers = tuple(Transfer(overlap, self.segments) for overlap in clipped if not overlap.window.is_empty)
        selection = self.selection
        stop = last_layer if selection.last_layer is None else min(last_layer, selection.last_layer)
        clipped_selection = replace(selection, first_layer=max(first_layer, selection.first_layer), last_layer=stop)
        return Plan(clipped_selection, self.segments, transfers)

    def arrivals(self) -> tuple[Arrival, ...]:
        """State which transfers make which tokens valid, by target rank and range of layers.

        Layers of which the source side lacks some heads of the target's never become valid by this plan, so there is
        no arrival for them. A row without selected tokens is not mentioned.
        """
        chosen = np.flatnonzero(self.selection.stop > self.selection.start)
        rows = tuple(self.selection.rows[i] for i in chosen)
        start, stop = self.selection.start[chosen], self.selection.stop[chosen]
        targets = dict.fromkeys(transfer.target_rank for transfer in self.transfers) if rows else {}
        return tuple(
            Arrival(target, sources, first, last, rows, start, stop)
            for target in targets
            for sources, first, last in self._find_complete_layers(target)
        )

    def _find_complete_layers(self, target_rank: int) -> Iterator[tuple[tuple[int, ...], int, int]]:
        transfers = self.received_by(target_rank)
        edges = sorted({edge for t in transfers for edge in (t.window.first_layer, t.window.last_layer)})
        for first, last in pairwise(edges):
            parts = [t for t in transfers if t.window.first_layer <= first and last <= t.window.last_layer]
            if sum(t.window.num_heads for t in parts) == parts[0].overlap.target.num_heads:
                yield tuple(t.source_rank for t in parts), first, last


@dataclass(frozen=True, slots=True, eq=False)
class Resharding:
    """Plan transfers between two sides; made once, it plans any selection of their rows."""

    source: CacheSide
    target: CacheSide
    overlaps: tuple[Overlap, ...] = field(init=False)

    def __post_init__(self) -> None:
        one, other = self.source.ranks[0].layout, self.target.ranks[0].layout
        assert (one.head_dim, one.itemsize) == (other.head_dim, other.itemsize), (one, other)
        pairs = (
            Overlap(s.rank, t.rank, s.layout, t.layout, s.layout.window.intersect(t.layout.window))
            for s, t in product(self.source.ranks, self.target.ranks)
        )
        object.__setattr__(self, "overlaps", tuple(pair for pair in pairs if not pair.window.is_empty))

    def select(self, selection: Selection) -> list[Overlap]:
        """Give the overlaps that have layers of the selection, in the order of the sides' ranks."""
        clipped = (pair.clip_layers(selection.first_layer, selection.last_layer) for pair in self.overlaps)
        return [pair for pair in clipped if not pair.window.is_empty]

    def plan(self, selection: Selection) -> Plan:
        """Plan the direct transfers of a selection; reads both sides' rows."""
        segments = find_segments(self.source, self.target, selection)
        return Plan(selection, segments, tuple(Transfer(pair, segments) for pair in self.select(selection)))
