"""Keep a copy of a stage's KV in host memory: which tokens are due, where they lie, and how they come back.

A *store* is the owner's pool once more, block for block, behind an index of what is valid in it:

    | index: the step of each microbatch; each row's serial, length, blocks | block 0 | block 1 | ... | block N-1 |

Since block ids are the same in every stage of a pipeline, and the controller gives them out, a token's place is the
same in the owner's pool and in the store. The copies are made in the order of the passes, so what an earlier request
left behind is never written over what a later one has. The index is written behind the bytes that it speaks of.
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np

from dejavu.device.base import Buffer, Closing, Device, Location, Stream
from dejavu.device.pieces import Pieces, make_pieces
from dejavu.kv.layout import Ints, PoolLayout

NOBODY = -1
ALIGNMENT = 4096
Place = tuple[int, int]  # microbatch, row


class RowCopy(NamedTuple):
    """Say that tokens [start, stop) of the request in a row are to be copied; `blocks` hold its tokens from 0 on."""

    place: Place
    serial: int
    blocks: Sequence[int]
    start: int
    stop: int


class HeldRow(NamedTuple):
    """Say whose tokens a store has in a row: [0, length), in the first of these blocks."""

    serial: int
    length: int
    blocks: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class StoreShape:
    """Count the microbatches of a store, the rows of each, and the most blocks of a row."""

    num_microbatches: int
    num_rows: int
    max_blocks: int

    @property
    def num_words(self) -> int:
        """Count the numbers of the index."""
        return self.num_microbatches * (1 + self.num_rows * (2 + self.max_blocks))

    @property
    def index_bytes(self) -> int:
        """Count the bytes before the blocks."""
        return -(-8 * self.num_words // ALIGNMENT) * ALIGNMENT


@dataclass(slots=True)
class RowBook:
    """Follow one request: tokens [0, length) are computed, and [0, copied) are copied or on their way."""

    serial: int
    blocks: Sequence[int]
    length: int
    copied: int = 0


@dataclass(slots=True)
class ReplicaBooks:
    """Follow which tokens of a stage its replica lacks: pure, and the same for whoever sees the same passes.

    With `every` above 1, tokens wait for each so-many-th step of their microbatch; a new request's do not.
    """

    every: int = 1
    rows: dict[Place, RowBook] = field(default_factory=dict)

    def admit(self, place: Place, serial: int, blocks: Sequence[int], length: int = 0) -> None:
        """Let a request take a row, in place of what was there; `length` of its tokens are in the pool already.

        One that had the row and the blocks before, as after a failure, keeps its copies.
        """
        before = self.rows.get(place)
        goes_on = before is not None and (before.serial, tuple(before.blocks)) == (serial, tuple(blocks))
        self.rows[place] = RowBook(serial, blocks, length, min(before.copied, length) if before and goes_on else 0)

    def adopt(self, rows: Mapping[Place, "HeldRow"]) -> None:
        """Take over a store with `ReplicaStore.rows`: what is there of requests that go on is not copied again."""
        self.rows = {place: RowBook(row.serial, row.blocks, 0, row.length) for place, row in rows.items()}

    def advance(self, place: Place, length: int) -> None:
        """State that tokens [0, length) of a row are computed by the passes so far."""
        self.rows[place].length = length

    def due(self, microbatch: int, step: int) -> list[RowCopy] | None:
        """Give what has to be copied behind a pass for the replica to be complete, or None if it may wait."""
        books = [(place, book) for place, book in self.rows.items() if place[0] == microbatch]
        is_new = any(book.copied == 0 for _, book in books)
        return take_copies(books) if is_new or step % self.every == 0 else None


def take_copies(books: Iterable[tuple[Place, RowBook]]) -> list[RowCopy]:
    """Give what rows lack, and count it as copied."""
    copies = []
    for place, book in books:
        if book.copied < book.length:
            copies.append(RowCopy(place, book.serial, book.blocks, book.copied, book.length))
            book.copied = book.length
    return copies


def count_bytes(layout: PoolLayout, copies: Iterable[RowCopy]) -> int:
    """Count the bytes of copies."""
    return layout.bytes_per_token * sum(copy.stop - copy.start for copy in copies)


def cut_blocks(layout: PoolLayout, copies: Iterable[RowCopy]) -> Iterator[tuple[int, int]]:
    """Cut copies where blocks end; give the byte offset of each part's first token in the pool, and its tokens."""
    size = layout.block_size
    for copy in copies:
        for start in range(copy.start - copy.start % size, copy.stop, size):
            first = max(start, copy.start)
            token = first - start
            offset = copy.blocks[start // size] * layout.block_bytes + token * layout.token_bytes
            yield offset, min(start + size, copy.stop) - first


def list_pieces(layout: PoolLayout, copies: Sequence[RowCopy]) -> Pieces:
    """List the pieces of copies, from the pool (source) to their packed bytes (target)."""
    parts = np.array(list(cut_blocks(layout, copies)), dtype=np.int64).reshape(-1, 2)
    planes = layout.plane_bytes * np.arange(2 * layout.num_layers)
    source = np.add.outer(parts[:, 0], planes).ravel()
    nbytes = np.repeat(parts[:, 1] * layout.token_bytes, len(planes))
    return Pieces(source, np.cumsum(nbytes) - nbytes, nbytes)


class ReplicaStore(Closing):
    """Hold one stage's replica in host memory; `layout` is the owner's."""

    def __init__(self, memory: Buffer, layout: PoolLayout, shape: StoreShape) -> None:
        """Take over memory of `store_bytes`, with the contents that it has."""
        begin = shape.index_bytes
        assert memory.nbytes == begin + layout.total_bytes, (memory, layout)
        assert memory.location is Location.HOST, memory
        self.memory = memory
        self.layout = layout
        self.shape = shape
        self.pool = memory.view(begin, layout.total_bytes)
        index = memory.view(0, 8 * shape.num_words).tensor().numpy().view(np.int64)
        rows = shape.num_microbatches, shape.num_rows, 2 + shape.max_blocks
        self._steps: Ints | None = index[: shape.num_microbatches]
        self._rows: Ints | None = index[shape.num_microbatches :].reshape(rows)

    @classmethod
    def allocate(cls, device: Device, layout: PoolLayout, shape: StoreShape) -> "ReplicaStore":
        """Make an empty store in host memory that can be exported."""
        store = cls(device.allocate_host_exportable(shape.index_bytes + layout.total_bytes), layout, shape)
        store.clear()
        if device.properties.kind == "cpu":  # its pages come with their first use, which is to be in no step
            device.fill(store.pool, 0, stream=device.compute_stream)
        return store

    def clear(self) -> None:
        """State that nothing is here; the memory is zeroed."""
        assert self._rows is not None
        assert self._steps is not None
        self._rows[..., 0] = self._steps[:] = NOBODY

    def write(self, microbatch: int, step: int, copies: Iterable[RowCopy]) -> None:
        """Note that copies are here, and with them all of a microbatch up to a step.

        A process that dies in between leaves rows that are shorter than what is here.
        """
        assert self._rows is not None
        assert self._steps is not None
        for copy in copies:
            row = self._rows[copy.place]
            if copy.start == 0:  # a request begins, or begins again
                row[1] = 0
                row[2:] = NOBODY
                row[2 : 2 + len(copy.blocks)] = copy.blocks
                row[0] = copy.serial
            row[1] = copy.stop
        self._steps[microbatch] = step

    def step(self, microbatch: int) -> int:
        """Give the last step of a microbatch that is here whole, or -1."""
        assert self._steps is not None
        return int(self._steps[microbatch])

    def rows(self) -> dict[Place, HeldRow]:
        """Give whose tokens are here in each row, ended requests included, until another one takes their row."""
        assert self._rows is not None
        found = {}
        for microbatch, row in np.argwhere(self._rows[..., 1] > 0).tolist():
            serial, length, *blocks = self._rows[microbatch, row].tolist()
            found[microbatch, row] = HeldRow(serial, length, tuple(block for block in blocks if block != NOBODY))
        return found

    def restore(self, device: Device, target: Buffer, blocks: Sequence[int], *, stream: Stream) -> int:
        """Copy whole blocks into a pool of the same layout; give their bytes. Valid once the stream has passed."""
        runs = self.layout.block_runs(sorted(blocks))
        for offset, nbytes in zip(runs.offset.tolist(), runs.num_bytes.tolist(), strict=True):
            device.copy(target.view(offset, nbytes), self.pool.view(offset, nbytes), stream=stream)
        return int(runs.num_bytes.sum())

    def close(self) -> None:
        """Unmap the memory; it stays where the keeper has it."""
        self._steps = self._rows = None
        self.memory.close()


def filled_blocks(layout: PoolLayout, rows: Iterable[HeldRow]) -> list[int]:
    """List the blocks in which rows have tokens, each once: what a store gives back."""
    return sorted({block for row in rows for block in row.blocks[: -(-row.length // layout.block_size)]})


class TokenCopier:
    """Copy tokens between two pools of one layout in the host's memory, from the same places to the same places.

    It runs once a step, with caches that the model's weights have just filled: so one call of numpy for all rows.
    """

    __slots__ = ("_source", "_target", "block_size")

    def __init__(self, target: Buffer, source: Buffer, layout: PoolLayout) -> None:
        """Copy from `source` to `target`; both stay mapped as long as this is used."""
        self.block_size = layout.block_size
        shape = layout.num_blocks, 2 * layout.num_layers, layout.block_size
        token = np.dtype((np.void, layout.token_bytes))
        self._target, self._source = (
            memory.view(0, layout.total_bytes).tensor().numpy().view(token).reshape(shape)
            for memory in (target, source)
        )

    def copy(self, copies: Sequence[RowCopy]) -> None:
        """Copy at once."""
        size = self.block_size
        if all(copy.stop - copy.start == 1 for copy in copies):
            block = [copy.blocks[copy.start // size] for copy in copies]
            token = [copy.start % size for copy in copies]
            self._target[block, :, token] = self._source[block, :, token]
            return
        for copy in copies:
            for first in range(copy.start - copy.start % size, copy.stop, size):
                part = copy.blocks[first // size], slice(None), slice(max(copy.start - first, 0), copy.stop - first)
                self._target[part] = self._source[part]


def block_message(layout: PoolLayout, blocks: Sequence[int]) -> Pieces:
    """List whole blocks as one message between two pools of the same layout: what a holder sends to restore."""
    runs = layout.block_runs(sorted(blocks))
    nbytes = runs.num_bytes
    return make_pieces(runs.offset, np.cumsum(nbytes) - nbytes, nbytes)
