"""Lists of pieces to copy: where each lies on the source's side, where on the target's, and how long it is."""

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray

from dejavu.errors import TransferError

Offsets = NDArray[np.int64]


@dataclass(frozen=True, slots=True)
class Pieces:
    """Hold `n` pieces as three int64 arrays of shape [n], all in bytes: a table that one call moves.

    `source` and `target` count from the start of the memory that the call names, or are addresses where it names
    none. Pieces of one list may be copied in any order and at the same time, so no two may overlap in the target.
    """

    source: Offsets
    target: Offsets
    nbytes: Offsets

    def __post_init__(self) -> None:
        assert self.source.shape == self.target.shape == self.nbytes.shape == (len(self.nbytes),)
        assert self.source.dtype == self.target.dtype == self.nbytes.dtype == np.int64

    def __len__(self) -> int:
        return len(self.nbytes)

    @property
    def total_bytes(self) -> int:
        """Give the sum of the pieces' lengths."""
        return int(self.nbytes.sum())

    @property
    def inverse(self) -> "Pieces":
        """Give the list that moves the same pieces back."""
        return Pieces(self.target, self.source, self.nbytes)

    @property
    def uniform_bytes(self) -> int | None:
        """Give the one length that all pieces have, or None where there is none."""
        if len(self) == 0 or (self.nbytes != self.nbytes[0]).any():
            return None
        return int(self.nbytes[0])

    def part(self, first: int, end: int) -> "Pieces":
        """Give the pieces from `first` to before `end`."""
        if first == 0 and end >= len(self):
            return self
        return Pieces(self.source[first:end], self.target[first:end], self.nbytes[first:end])

    def shifted(self, source: int, target: int) -> "Pieces":
        """Give the list with both sides counted from further back: addresses, from offsets and base addresses."""
        return Pieces(self.source + source, self.target + target, self.nbytes)

    def split(self, limit: int) -> "Pieces":
        """Give the same bytes as pieces of at most `limit` bytes each, without the empty ones."""
        if np.bitwise_or.reduce((self.nbytes - 1) | (limit - self.nbytes)) >= 0:  # no sign: all from 1 to limit
            return self
        parts = -(-self.nbytes // limit)
        piece = np.repeat(np.arange(len(self)), parts)
        step = (np.arange(len(piece)) - np.repeat(np.cumsum(parts) - parts, parts)) * limit
        nbytes = np.minimum(self.nbytes[piece] - step, limit)
        return Pieces(self.source[piece] + step, self.target[piece] + step, nbytes)

    def check(self, source_bytes: int, target_bytes: int) -> None:
        """Raise TransferError where a piece leaves its memory: the lists may come from another rank."""
        if len(self) == 0 or self._surely_fits(source_bytes, target_bytes):
            return
        # A set sign bit anywhere is a fault, and no difference below overflows where the operands are not negative.
        source_room, target_room = source_bytes - self.nbytes, target_bytes - self.nbytes
        signs = self.nbytes | self.source | self.target | source_room | target_room
        signs |= (source_room - self.source) | (target_room - self.target)
        if np.bitwise_or.reduce(signs) < 0:
            _raise_outside("source", self.source, self.nbytes, source_bytes)
            _raise_outside("target", self.target, self.nbytes, target_bytes)

    def _surely_fits(self, source_bytes: int, target_bytes: int) -> bool:
        """Tell whether even the longest piece at the highest offset would fit: ten times faster, exact for equal ones.

        Sums of Python's integers do not overflow.
        """
        lowest = min(self.source.min(), self.target.min(), self.nbytes.min())
        longest = int(self.nbytes.max())
        return bool(
            lowest >= 0
            and int(self.source.max()) + longest <= source_bytes
            and int(self.target.max()) + longest <= target_bytes
        )


def make_pieces(source: ArrayLike, target: ArrayLike, nbytes: ArrayLike) -> Pieces:
    """Make a list from anything that numpy reads; a scalar `nbytes` is the length of every piece."""
    source = np.ascontiguousarray(source, dtype=np.int64)
    target = np.ascontiguousarray(target, dtype=np.int64)
    lengths = np.ascontiguousarray(np.broadcast_to(np.asarray(nbytes, dtype=np.int64), source.shape))
    return Pieces(source, target, lengths)


def pieces_from(triples: Iterable[tuple[int, int, int]]) -> Pieces:
    """Make a list from (source, target, nbytes) triples."""
    table = np.array(list(triples), dtype=np.int64).reshape(-1, 3)
    return make_pieces(table[:, 0], table[:, 1], table[:, 2])


def _raise_outside(side: str, offsets: Offsets, nbytes: Offsets, limit: int) -> None:
    wrong = (offsets < 0) | (nbytes < 0) | (nbytes > limit - offsets)
    if not wrong.any():
        return
    first = int(np.argmax(wrong))
    begin, length = int(offsets[first]), int(nbytes[first])
    raise TransferError(
        f"piece {first} covers bytes {begin} to {begin + length} of a {side} of {limit} bytes: "
        "check that both sides describe the same layout"
    )
