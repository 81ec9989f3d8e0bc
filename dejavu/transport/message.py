"""Messages as arithmetic: cut into chunks, and laid over the list that the other side cut them by."""

from dataclasses import dataclass
from itertools import pairwise

import numpy as np

from dejavu.device.pieces import Offsets, Pieces


@dataclass(frozen=True, slots=True)
class Chunk:
    """Be the bytes [offset, offset + nbytes) of a message; the pieces' targets count from the chunk's start."""

    offset: int
    nbytes: int
    pieces: Pieces


def cut_message(pieces: Pieces, limit: int) -> list[Chunk]:
    """Cut a message into chunks of `limit` bytes, the last one shorter; none for an empty message."""
    assert limit > 0, limit
    whole = in_order(pieces)
    total = whole.total_bytes
    if total <= limit:
        return [Chunk(0, total, whole)] if total else []
    edges = np.arange(0, total, limit, dtype=np.int64)
    begin = _merge(whole.target, edges)
    source = _at(whole, begin)
    nbytes = np.diff(begin, append=total)
    bounds = [*np.searchsorted(begin, edges).tolist(), len(begin)]
    return [
        Chunk(edge, min(limit, total - edge), Pieces(source[a:b], begin[a:b] - edge, nbytes[a:b]))
        for edge, (a, b) in zip(edges.tolist(), pairwise(bounds), strict=True)
    ]


def join(sender: Pieces, receiver: Pieces) -> Pieces:
    """Give the pieces that lead from the sender's memory straight into the receiver's.

    Both lists tile the same message; `source` counts in the sender's memory and `target` in the receiver's.
    """
    if len(sender) == len(receiver) == 1:
        return Pieces(sender.source, receiver.source, sender.nbytes)
    out, into = in_order(sender), in_order(receiver)
    assert out.total_bytes == into.total_bytes
    if np.array_equal(out.target, into.target):  # cut alike, as plans do: nothing to look up
        return coalesce(Pieces(out.source, into.source, out.nbytes))
    begin = _merge(out.target, into.target)
    nbytes = np.diff(begin, append=out.total_bytes)
    return coalesce(Pieces(_at(out, begin), _at(into, begin), nbytes))


def coalesce(pieces: Pieces) -> Pieces:
    """Give the same bytes with neighbours in the list that touch on both sides as one piece."""
    if len(pieces) < 2:
        return pieces
    source_end, target_end = pieces.source + pieces.nbytes, pieces.target + pieces.nbytes
    is_first = (pieces.source[1:] != source_end[:-1]) | (pieces.target[1:] != target_end[:-1])
    first = np.flatnonzero(np.concatenate(([True], is_first)))
    if len(first) == len(pieces):
        return pieces
    return Pieces(pieces.source[first], pieces.target[first], np.add.reduceat(pieces.nbytes, first))


def in_order(pieces: Pieces) -> Pieces:
    """Give the pieces in the order of the message, without the empty ones."""
    if len(pieces) and int(pieces.nbytes.min()) == 0:
        kept = np.flatnonzero(pieces.nbytes)
        pieces = Pieces(pieces.source[kept], pieces.target[kept], pieces.nbytes[kept])
    if (pieces.target[1:] > pieces.target[:-1]).all():
        return pieces
    order = pieces.target.argsort(kind="stable")
    return Pieces(pieces.source[order], pieces.target[order], pieces.nbytes[order])


def _merge(first: Offsets, second: Offsets) -> Offsets:
    return np.union1d(first, second)


def _at(pieces: Pieces, offsets: Offsets) -> Offsets:
    """Give where the message's `offsets` lie in the memory that the pieces are cut from."""
    owner = np.searchsorted(pieces.target, offsets, side="right") - 1
    return pieces.source[owner] + (offsets - pieces.target[owner])
