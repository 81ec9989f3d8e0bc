"""The `rma` carrier: MPI_Put into a window of the receiver, with flags for what has arrived and what is free.

Each rank's window holds lanes of slots, and counters beside them. A sender that says GO gets a lane: it puts chunk
i into slot i % SLOTS of the lane, flushes, and then writes the lane's arrival counter; the receiver copies the chunk to
where it belongs and writes the credit counter in the sender's window. Counters only grow, and a grant says where they
stand, so that nothing has to be reset. Only GO, GRANT and the like are messages. A put to a dead rank gives no error:
the notes' communicator is what finds out that a peer died, and a rank that hangs is found out by the deadline.
"""

from dataclasses import dataclass

import numpy as np
from mpi4py import MPI
from numpy.typing import NDArray

from dejavu.device.base import Buffer, Device, DeviceError
from dejavu.device.cpu_copy import array_at
from dejavu.transport.carrier import Gathering, UnavailableError
from dejavu.transport.link import LinkCarrier
from dejavu.transport.mpi_wire import MpiWire, bytes_of
from dejavu.transport.notes import Kind, Note
from dejavu.transport.parcels import Incoming, Loan, Outgoing

CHUNK_BYTES = 1 << 20
NUM_LANES, LANE_SLOTS = 4, 4
NUM_SLOTS = 8  # of the sender's own staging
PAGE_BYTES = 4096
COUNTER_BYTES = 64  # one cache line each
LANE_BITS = 8


@dataclass(frozen=True, slots=True)
class Layout:
    """Say where everything lies in a rank's window: counters first, then the slots of all lanes."""

    num_ranks: int
    chunk_bytes: int

    @property
    def data(self) -> int:
        """Give the offset of the first slot."""
        counters = (1 + self.num_ranks) * NUM_LANES * COUNTER_BYTES
        return -(-counters // PAGE_BYTES) * PAGE_BYTES

    @property
    def nbytes(self) -> int:
        """Give the size of a window."""
        return self.data + NUM_LANES * LANE_SLOTS * self.chunk_bytes

    def arrivals(self, lane: int) -> int:
        """Give the offset of the counter of the chunks that were put into a lane of this window."""
        return lane * COUNTER_BYTES

    def credits(self, receiver: int, lane: int) -> int:
        """Give the offset of the counter of the chunks that `receiver` has taken out of its lane, in the sender's."""
        return ((1 + receiver) * NUM_LANES + lane) * COUNTER_BYTES

    def slot(self, lane: int, index: int) -> int:
        """Give the offset of the slot that chunk `index` of a message goes through."""
        return self.data + (lane * LANE_SLOTS + index % LANE_SLOTS) * self.chunk_bytes


@dataclass(slots=True)
class Lease:
    """Be a lane in use by one message: `base` is what its counters stood at, `taken` the chunks seen so far."""

    lane: int
    base: int
    taken: int = 0
    credited: int = 0
    is_broken: bool = False


class WindowWire(MpiWire):
    """Put chunks into the windows of other ranks. Made and closed by all ranks of `comm` at the same time."""

    def __init__(self, device: Device, comm: MPI.Intracomm, chunk_bytes: int) -> None:
        super().__init__(comm)
        self.layout = Layout(self.size, chunk_bytes)
        self.window = MPI.Win.Allocate(self.layout.nbytes, 1, comm=self.comm)
        self.window.Set_errhandler(MPI.ERRORS_RETURN)
        self.bytes: NDArray[np.uint8] = array_at(int(self.window.Get_attr(MPI.WIN_BASE) or 0), (self.layout.nbytes,))
        self.bytes[: self.layout.data] = 0
        self.memory = self._register(device)
        self.window.Lock_all(MPI.MODE_NOCHECK)
        self.comm.Barrier()
        self._free_lanes = list(range(NUM_LANES))
        self._standing = [0] * NUM_LANES  # what each lane's counters stand at between messages

    def granted(self, parcel: Outgoing, note: Note) -> None:
        """Learn which lane the chunks go to."""
        lane, base = note.value & ((1 << LANE_BITS) - 1), note.value >> LANE_BITS
        if lane >= NUM_LANES:
            self.lose(parcel.peer, f"it granted lane {lane} of {NUM_LANES}")
            return
        parcel.wire = Lease(lane, base)

    def push(self, parcel: Outgoing) -> bool:
        """Put chunks for which the lane has room."""
        lease = parcel.wire
        if lease is None:
            return False
        before = parcel.sent
        taken = self._counter(self.layout.credits(parcel.peer, lease.lane)) - lease.base
        while parcel.sent - max(0, taken) < LANE_SLOTS and parcel.peer not in self.lost:
            loan = parcel.next()
            if loan is None:
                break
            if self._put(parcel, lease, loan):
                parcel.take_back(loan)
            else:
                parcel.release(loan)
        return parcel.sent > before

    def pull(self, parcel: Incoming) -> bool:
        """Take chunks that have arrived, and give credit for those that are out of their slots."""
        lease = parcel.wire or self._grant(parcel)
        if lease is None:
            return False
        arrived = min(self._counter(self.layout.arrivals(lease.lane)) - lease.base, parcel.limit)
        before = lease.taken
        while lease.taken < arrived:
            self._take(parcel, lease)
        if parcel.landed > lease.credited:
            lease.credited = parcel.landed
            self._write(parcel.peer, self.layout.credits(self.rank, lease.lane), lease.base + lease.credited)
            self.ring(parcel.peer)
        return lease.taken > before

    def abandon(self, parcel: Outgoing | Incoming) -> None:
        """Give up a lane into which a rank that hangs may still write."""
        if isinstance(parcel, Incoming) and parcel.wire is not None:
            parcel.wire.is_broken = True

    def ended(self, parcel: Outgoing | Incoming) -> None:
        """Take the lane back for the next message."""
        if isinstance(parcel, Incoming) and parcel.wire is not None and not parcel.wire.is_broken:
            lease: Lease = parcel.wire
            self._standing[lease.lane] = lease.base + lease.taken
            self._free_lanes.append(lease.lane)

    def free(self) -> None:
        """Free the window, which all ranks do."""
        self.window.Unlock_all()
        self.memory.close()
        del self.bytes
        self.window.Free()
        super().free()

    def _register(self, device: Device) -> Buffer:
        """Pin the window. Raises UnavailableError, on every rank, where one cannot."""
        memory, reason = None, None
        try:
            memory = register(device, self.bytes)
        except DeviceError as error:
            reason = str(error)
        for rank, failure in enumerate(self.comm.allgather(reason)):
            if failure is not None:
                if memory is not None:
                    memory.close()
                raise UnavailableError(
                    f"rma is unavailable: rank {rank} cannot pin MPI's window ({failure}): "
                    "let osc_sm_backing_directory name a directory in memory, such as /dev/shm"
                )
        assert memory is not None
        return memory

    def _grant(self, parcel: Incoming) -> Lease | None:
        if not self._free_lanes or not parcel.limit:
            return None
        lane = self._free_lanes.pop()
        lease = parcel.wire = Lease(lane, self._standing[lane])
        value = self._standing[lane] << LANE_BITS | lane
        self.post(parcel.peer, Note(Kind.GRANT, parcel.number, value=value))
        return lease

    def _take(self, parcel: Incoming, lease: Lease) -> None:
        index = lease.taken
        lease.taken += 1
        buffer = self.memory.view(self.layout.slot(lease.lane, index), parcel.chunks[index].nbytes)
        if parcel.is_void:
            parcel.fill(Loan(index, buffer))
            return
        parcel.unpack(buffer, index)
        parcel.follow(Loan(index, buffer))

    def _put(self, parcel: Outgoing, lease: Lease, loan: Loan) -> bool:
        offset = self.layout.slot(lease.lane, loan.index)
        try:
            self.window.Put(bytes_of(loan.array), parcel.peer, [offset, loan.buffer.nbytes, MPI.BYTE])
            self.window.Flush(parcel.peer)
        except MPI.Exception as error:
            self.lose(parcel.peer, error)
            return False
        self._write(parcel.peer, self.layout.arrivals(lease.lane), lease.base + parcel.sent)
        self.ring(parcel.peer)
        return parcel.peer not in self.lost

    def _write(self, peer: int, offset: int, value: int) -> None:
        """Set a counter of another rank, in one piece."""
        word = np.array([value], dtype=np.uint64)
        if peer in self.lost:
            return
        try:
            self.window.Accumulate([word, MPI.UINT64_T], peer, [offset, 1, MPI.UINT64_T], MPI.REPLACE)
            self.window.Flush(peer)
        except MPI.Exception as error:
            self.lose(peer, error)

    def _counter(self, offset: int) -> int:
        self.window.Sync()
        return int(self.bytes[offset : offset + 8].view(np.uint64)[0])


class RmaCarrier(LinkCarrier):
    """Send between the ranks of a communicator by one-sided MPI."""

    name = "rma"

    def __init__(
        self,
        device: Device,
        comm: MPI.Intracomm,
        *,
        gathering: Gathering = Gathering.PACKED,
        chunk_bytes: int = CHUNK_BYTES,
    ) -> None:
        """Open it on every rank of `comm` at the same time; UnavailableError where MPI allows no threads."""
        wire = WindowWire(device, comm, chunk_bytes)
        super().__init__(device, wire, gathering, chunk_bytes=chunk_bytes, num_slots=NUM_SLOTS)


def register(device: Device, array: NDArray[np.uint8]) -> Buffer:
    """Pin host memory that MPI has made."""
    import torch

    return device.register_host(torch.from_numpy(array))
