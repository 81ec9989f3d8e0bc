"""Memory of a test: a message's pieces scattered over a device buffer, with guard bytes between them."""

import contextlib

import numpy as np

from dejavu.device import Pieces, make_pieces
from dejavu.device.cpu_copy import array_at

GUARD = 0xEE


def contents(nbytes, seed):
    """Give the bytes of message `seed`; long ones repeat, with a period that is no power of two."""
    period = np.random.default_rng(seed).integers(0, 256, min(nbytes, 1_000_003), dtype=np.uint8)
    return np.resize(period, nbytes)


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
        message = np.empty(self.nbytes, dtype=np.uint8)
        with self.host(store=False) as array:
            for place, at, length in rows(self.pieces):
                message[at : at + length] = array[place : place + length]
                array[place : place + length] = GUARD
            assert (array == GUARD).all(), "bytes beside the pieces were written"
        return message

    def is_untouched(self):
        with self.host(store=False) as array:
            return bool((array == GUARD).all())

    def close(self):
        self.memory.close()


def rows(pieces: Pieces):
    return zip(pieces.source.tolist(), pieces.target.tolist(), pieces.nbytes.tolist(), strict=True)
