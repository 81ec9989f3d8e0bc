"""Pack a region of the KV cache into contiguous bytes, in an order that both ends of a transfer know. Pure arithmetic.

**Canonical order**: the bytes that a source and a target rank share (layers x heads of the selected tokens), as the
C-order array

    packed[layer][row][k/v][token][head][dim]        rows in the selection's order, tokens from start to stop

    | layer 3                                           | layer 4                                           | ...
    | row a               | row b                       | row a               | row b                       |
    | K t0..t2 | V t0..t2 | K t0......t4 | V t0......t4 | K t0..t2 | V t0..t2 | K t0......t4 | V t0......t4 |

It depends on the selection and on the shared layers and heads only, not on either side's blocks. So both ranks know
it without exchanging lists, neither needs the other's row map or block size, several layers pack to the concatenation
of single layers, and a prefix of the packed bytes completes one layer after the other.

A staging buffer that is smaller than the packed bytes takes them in *chunks* of equal size (the last may be shorter),
cut between two tokens' heads where the buffer holds at least one:

    packed   |........|........|........|...|          chunk i: packed bytes [i x chunk_bytes, (i + 1) x chunk_bytes)
    staging  |........|                                each chunk begins at the staging buffer's start
"""

from dataclasses import dataclass, field
from itertools import pairwise

import numpy as np

from dejavu.device.pieces import Pieces
from dejavu.kv.layout import Ints, PoolLayout, Runs, Window, cut, merge_runs
from dejavu.kv.side import CacheSide, Selection


@dataclass(frozen=True, slots=True, eq=False)
class Chunk:
    """Hold packed bytes [start, start + pieces.total_bytes) as pieces from the pool (source) to staging (target).

    Staging offsets count from the chunk's start, without gaps. To scatter, take `pieces.inverse`.
    """

    start: int
    pieces: Pieces


@dataclass(frozen=True, slots=True, eq=False)
class Packing:
    """Hold pieces from a pool (source) to its packed bytes (target) in canonical order, without gaps; the fewest.

    Gathering moves `pieces`, scattering `pieces.inverse`. `token_bytes` is one token's part in one plane: the
    window's heads.
    """

    window: Window
    token_bytes: int
    pieces: Pieces

    @property
    def num_bytes(self) -> int:
        """Count the packed bytes."""
        pieces = self.pieces
        return int(pieces.target[-1] + pieces.nbytes[-1]) if len(pieces) else 0

    @property
    def layer_bytes(self) -> int:
        """Count the packed bytes of one layer."""
        return self.num_bytes // self.window.num_layers

    def count_layers(self, num_bytes: int) -> int:
        """Count the window's layers that the first `num_bytes` packed bytes complete."""
        return self.window.num_layers if self.num_bytes == 0 else num_bytes // self.layer_bytes

    def chunk_bytes(self, staging_bytes: int) -> int:
        """Give the size of all chunks but the last: what fits into the staging buffer, in whole tokens if one fits."""
        assert staging_bytes > 0, staging_bytes
        return max(staging_bytes // self.token_bytes * self.token_bytes, min(staging_bytes, self.token_bytes))

    def chunks(self, staging_bytes: int) -> list[Chunk]:
        """Cut the packed bytes into chunks that fit into `staging_bytes`; both ends cut alike."""
        size = self.chunk_bytes(staging_bytes)
        whole = self.pieces
        owner, start, stop = cut(whole.target, whole.target + whole.nbytes, size)
        pool = whole.source[owner] + (start - whole.target[owner])
        bounds = np.searchsorted(start, np.arange(0, self.num_bytes + size, size)).tolist()
        return [
            Chunk(i * size, Pieces(pool[a:b], start[a:b] - i * size, (stop - start)[a:b]))
            for i, (a, b) in enumerate(pairwise(bounds))
        ]


def pack(side: CacheSide, layout: PoolLayout, window: Window, selection: Selection) -> Packing:
    """Plan how the window's part of a selection lies in a pool of `side`, and in canonical order.

    `window` must lie in the pool; the selection's layers are not looked at (`Resharding.select` has clipped by them).
    """
    is_whole = window.num_heads == layout.num_heads
    row, start, stop = cut(selection.start, selection.stop, layout.block_size if is_whole else 1)
    base = layout.bases(side.find_blocks(selection.rows, row, start), start % layout.block_size)
    length = selection.stop - selection.start
    first = (2 * (np.cumsum(length) - length) - selection.start)[row] + start  # K's place in a layer, in tokens
    place = np.concatenate([first, first + length[row]])
    order = np.argsort(place)
    token_bytes = window.num_heads * layout.head_bytes
    nbytes = np.tile(stop - start, 2)[order] * token_bytes
    offset = np.concatenate([base, base + layout.plane_bytes])[order]
    runs = merge_runs(
        Runs(np.add.outer(layout.planes(window)[:, 0], offset).ravel(), np.tile(nbytes, window.num_layers))
    )
    packed = np.cumsum(runs.num_bytes) - runs.num_bytes
    return Packing(window, token_bytes, Pieces(runs.offset, packed, runs.num_bytes))


@dataclass(frozen=True, slots=True, eq=False)
class PackedStep:
    """List the pieces of one new token per row again and again, in canonical order: the serving hot path.

    Made once for a pool and the window that it shares with a peer; only the pool's offsets differ between steps.
    Pieces are not merged (in blocks of several tokens and layers, no two of them meet).
    """

    layout: PoolLayout
    window: Window
    _planes: Ints = field(init=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "_planes", self.layout.planes(self.window)[:, None, :])

    def packing(self, table: Ints, position: Ints) -> Packing:
        """List the pieces of token `position[i]` of each row i.

        `table` is int64 [num_rows, max_blocks], a row's block ids in the order of its tokens (`RowMap.table[m]`).
        """
        base = self.layout.token_bases(table, position)
        pool = (self._planes + base[:, None]).ravel()
        token_bytes = self.window.num_heads * self.layout.head_bytes
        packed = np.arange(0, len(pool) * token_bytes, token_bytes)
        return Packing(self.window, token_bytes, Pieces(pool, packed, np.full(len(pool), token_bytes)))
