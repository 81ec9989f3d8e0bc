"""Memory of a test: a message's pieces scattered over a device buffer, with guard bytes between them."""

import contextlib

import numpy as np

from dejavu.device import Pieces, make_pieces
from dejavu.device.cpu_copy import array_at

GUARD = 0xEE


def contents(nbytes, seed):
    """Give the bytes of message `seed`; long ones repeat, with a period that is no power of two."""
    return np.resize(_period(nbytes, seed), nbytes)


def is_message(array, seed):
    """Compare with what `contents` gives, without making it."""
    period = _period(len(array), seed)
    parts = (array[at : at + len(period)] for at in range(0, len(array), max(1, len(period))))
    return all(np.array_equal(part, period[: len(part)]) for part in parts)


def _period(nbytes, seed):
    return np.random.default_rng(seed).integers(0, 256, min(nbytes, 1_000_003), dtype=np.uint8)


def contiguous(nbytes, offset=0):
    """Give a message in one piece, and the size of its memory."""
    return make_pieces([offset], [0], [nbytes]), offset + nbytes + 7


def scattered(nbytes, num_pieces, seed):
    """Give a message in so many pieces of random sizes, at random places, in random order of list and memory."""
    rng = np.random.default_rng(seed)
    cuts = np.sort(rng.choice(np.arange(1, nbytes), min(num_pieces, nbytes) - 1, replace=False))
    target = np.concatenate(([0], cuts)).astype(np.int64)
    length = np.diff(target, append=nbytes)
    place = rng.permutation(len(target))  # the order in memory
    room = length[place] + rng.integers(0, 33, len(target))  # a gap behind each, for misaligned starts too
    source = np.empty_like(target)
    source[place] = np.cumsum(room) - room + 3
    order = rng.permutation(len(target))
    return make_pieces(source[order], target[order], length[order]), int(room.sum()) + 64


class Region:
    """Hold device memory that a message's pieces lie in."""

    def __init__(self, device, layout):
        self.device = device
        self.pieces, nbytes = layout
        self.nbytes = self.pieces.total_bytes
        self.memory = device.allocate_exportable(nbytes)
        with device.create_stream("region") as stream:
            device.fill(self.memory, GUARD, stream=stream)

    @contextlib.contextmanager
    def host(self, *, store):
        """Show the bytes to numpy: those of a CPU themselves, else a copy that is stored back where asked for."""
        if self.device.properties.kind == "cpu":
            yield array_at(self.memory.address, (self.memory.nbytes,))
            return
        with self.device.allocate_host(self.memory.nbytes) as copy, self.device.create_stream("region") as stream:
            self.device.copy(copy, self.memory, stream=stream)
            stream.synchronize(20)
            yield array_at(copy.address, (copy.nbytes,))
            if store:
                self.device.copy(self.memory, copy, stream=stream)
                stream.synchronize(20)

    def write(self, message):
        with self.host(store=True) as array:
            for place, at, length in rows(self.pieces):
                array[place : place + length] = message[at : at + length]

    def read(self):
        """Give the message, after a check that nothing was written beside the pieces."""
        with self.host(store=False) as array:
            assert all((array[begin:end] == GUARD).all() for begin, end in self.gaps()), "bytes beside the pieces"
            message = np.empty(self.nbytes, dtype=np.uint8)
            for place, at, length in rows(self.pieces):
                message[at : at + length] = array[place : place + length]
        return message

    def holds(self, seed):
        """Say whether this is the message that `contents` gives; without a copy where it lies in one piece."""
        if len(self.pieces) != 1:
            return is_message(self.read(), seed)
        with self.host(store=False) as array:
            begin, end = int(self.pieces.source[0]), int(self.pieces.source[0]) + self.nbytes
            assert all((array[a:b] == GUARD).all() for a, b in self.gaps()), "bytes beside the pieces"
            return is_message(array[begin:end], seed)

    def gaps(self):
        """Give the ranges of memory that no piece covers."""
        begin = 0
        for place, _, length in sorted(rows(self.pieces)):
            yield begin, place
            begin = place + length
        yield begin, self.memory.nbytes

    def is_untouched(self):
        with self.host(store=False) as array:
            return bool((array == GUARD).all())

    def close(self):
        self.memory.close()


def rows(pieces: Pieces):
    return zip(pieces.source.tolist(), pieces.target.tolist(), pieces.nbytes.tolist(), strict=True)
