"""The two sides of a link's message: chunks lent to the wire from where they lie, or packed through staging slots.

Chunk i of a message is its bytes [i * chunk_bytes, (i + 1) * chunk_bytes), on both sides, which agree on the smaller
size that one of them can do with. A chunk that is contiguous in memory that the wire reaches is its own staging:
nothing is copied, and it may be larger than a slot. Any other passes through a slot, packed or unpacked
on the carrier's stream while other chunks travel. All of this belongs to the carrier's progress thread.
"""

from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
from numpy.typing import NDArray

from dejavu.device.base import Buffer, Device, Event, Stream
from dejavu.device.cpu_copy import array_at
from dejavu.device.pieces import Pieces
from dejavu.errors import TransferError
from dejavu.transport.carrier import Gathering
from dejavu.transport.message import Chunk, coalesce, cut_message, in_order
from dejavu.transport.progress import HostTransfer
from dejavu.transport.staging import Slots, move

PACKED_AHEAD = 3  # chunks that are packed before the wire asks for them


@dataclass(frozen=True, slots=True)
class Staging:
    """Hold what the parcels of one direction share."""

    device: Device
    stream: Stream
    slots: Slots
    gathering: Gathering
    reaches: Callable[[Buffer], bool]  # whether the wire moves such memory itself
    direct_bytes: int  # of a chunk that needs no slot


@dataclass(slots=True, eq=False)
class Loan:
    """Hold one chunk's bytes where the wire reaches them, and the event behind the copy into or out of them."""

    index: int
    buffer: Buffer
    slot: Buffer | None = None
    event: Event | None = None

    @property
    def array(self) -> NDArray[np.uint8]:
        """Give the bytes as an array; they are in host memory."""
        return array_at(self.buffer.address, (self.buffer.nbytes,))

    @property
    def settled(self) -> bool:
        """Tell whether the copy is done; raises the stream's error."""
        return self.event is None or self.event.query()

    @property
    def is_over(self) -> bool:
        """Tell whether nothing is copied any more, well or not."""
        try:
            return self.settled
        except Exception:  # a stream that has failed does none of its later work
            return True


class Parcel:
    """Be what both sides share: the chunks, the memory, and how far they are."""

    def __init__(self, peer: int, key: int, memory: Buffer, pieces: Pieces, staging: Staging) -> None:
        self.peer = peer
        self.key = key
        self.memory = memory
        self.staging = staging
        self.nbytes = pieces.total_bytes
        self._pieces = pieces
        is_direct = len(pieces) == 1 and staging.reaches(memory)
        self.chunk_bytes = staging.direct_bytes if is_direct else staging.slots.slot_bytes
        self.transfer: HostTransfer | None = None
        self.number = -1  # given by the receiver
        self.limit = self.count  # how many chunks travel
        self.error: TransferError | None = None  # what the other side has ended the message with
        self.wire: Any = None  # what the wire keeps about the message
        self.copying: deque[Loan] = deque()

    @property
    def count(self) -> int:
        """Give the number of chunks."""
        return -(-self.nbytes // self.chunk_bytes)

    @cached_property
    def chunks(self) -> list[Chunk]:
        """Cut the message: by the progress thread, when it first asks, so that who posts need not wait for it."""
        pieces = self._pieces
        if self.staging.gathering is Gathering.PACKED:
            pieces = coalesce(in_order(pieces))
        return cut_message(pieces, self.chunk_bytes)

    def agree(self, chunk_bytes: int) -> None:
        """Cut the message as the other side does; before any chunk is asked for."""
        if chunk_bytes != self.chunk_bytes:
            self.chunk_bytes = chunk_bytes
            self.limit = self.count

    def lend(self, index: int) -> Loan | None:
        """Give memory for a chunk: the message's own, or a slot; None while no slot is free."""
        chunk = self.chunks[index]
        if len(chunk.pieces) == 1 and self.staging.reaches(self.memory):
            return Loan(index, self.memory.view(int(chunk.pieces.source[0]), chunk.nbytes))
        slot = self.staging.slots.take()
        return None if slot is None else Loan(index, slot.view(0, chunk.nbytes), slot)

    def release(self, loan: Loan) -> None:
        """Give back a loan's slot and event."""
        if loan.event is not None:
            loan.event.close()
            loan.event = None
        if loan.slot is not None:
            self.staging.slots.give(loan.slot)
            loan.slot = None

    def settle(self) -> bool:
        """Let go of the loans whose copies are over, well or not; True when none is under way."""
        while self.copying and self.copying[0].is_over:
            self.release(self.copying.popleft())
        return not self.copying

    def follow(self, loan: Loan) -> None:
        """Put an event behind the copies that were just queued for a loan."""
        loan.event = self.staging.device.create_event()
        loan.event.record(self.staging.stream)
        self.copying.append(loan)


class Outgoing(Parcel):
    """Be a message that is sent: `sent` chunks were given to the wire, of which `returned` are out of its hands."""

    def __init__(self, peer: int, key: int, memory: Buffer, pieces: Pieces, staging: Staging) -> None:
        super().__init__(peer, key, memory, pieces, staging)
        self.packed = self.sent = self.returned = 0

    def next(self) -> Loan | None:
        """Give the next chunk, once its bytes are ready; the wire gives it to `take_back` later."""
        self._pack_ahead()
        if self.sent == self.limit or not self.copying or not self.copying[0].settled:
            return None
        self.sent += 1
        return self.copying.popleft()

    def take_back(self, loan: Loan) -> None:
        """Count a chunk that the wire does not use any more."""
        self.returned += 1
        assert self.transfer is not None
        self.transfer.advanced(self.chunks[loan.index].nbytes)
        self.release(loan)

    def _pack_ahead(self) -> None:
        while self.packed < self.limit and len(self.copying) < PACKED_AHEAD:
            loan = self.lend(self.packed)
            if loan is None:
                return
            if loan.slot is None:
                self.copying.append(loan)
            else:
                self._pack(loan)
            self.packed += 1

    def _pack(self, loan: Loan) -> None:
        staging, pieces = self.staging, self.chunks[loan.index].pieces
        try:
            move(staging.device, loan.buffer, self.memory, pieces, staging.gathering, stream=staging.stream)
            self.follow(loan)
        except BaseException:
            self.release(loan)
            raise


class Incoming(Parcel):
    """Be a message that is received: `landed` chunks are where they belong, `limit` will come."""

    def __init__(self, peer: int, key: int, memory: Buffer, pieces: Pieces, staging: Staging) -> None:
        super().__init__(peer, key, memory, pieces, staging)
        self.landed = 0
        self.is_going = False  # whether the sender has begun
        self.is_stopped = False  # whether the sender has said that it sends no more than `limit`
        self.failure: Exception | None = None  # of a copy, found while the wire was read
        self.is_void = False  # whether what still arrives is dropped

    def fill(self, loan: Loan) -> None:
        """Bring a chunk whose bytes have arrived to where they belong."""
        if loan.slot is None or self.is_void:
            self._land(loan)
            return
        try:
            self.unpack(loan.buffer, loan.index)
            self.follow(loan)
        except BaseException:
            self.is_void = True
            self._land(loan)
            raise

    def unpack(self, buffer: Buffer, index: int) -> None:
        """Queue the copies of one chunk out of `buffer`."""
        staging = self.staging
        pieces = self.chunks[index].pieces.inverse
        move(staging.device, self.memory, buffer, pieces, staging.gathering, stream=staging.stream)

    def poll(self) -> bool:
        """Count the chunks that have landed since the last time; True if there are any. Raises a copy's error once."""
        before = self.landed
        while self.copying and self.copying[0].is_over:
            loan = self.copying.popleft()
            try:
                if not self.is_void:
                    loan.settled  # noqa: B018 (raises the stream's error)
            finally:
                self._land(loan)
        return self.landed > before

    def _land(self, loan: Loan) -> None:
        self.landed += 1
        assert self.transfer is not None
        self.transfer.advanced(self.chunks[loan.index].nbytes)
        self.release(loan)
