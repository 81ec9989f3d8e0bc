"""The `mpi` carrier: chunks by isend and irecv, from and into the message's own host memory or pinned slots."""

from collections import deque
from dataclasses import dataclass, field

from mpi4py import MPI

from dejavu.device.base import Device
from dejavu.errors import TransferError
from dejavu.transport.carrier import Gathering
from dejavu.transport.link import LinkCarrier
from dejavu.transport.mpi_wire import FIRST_DATA_TAG, MpiWire, bytes_of
from dejavu.transport.parcels import Incoming, Loan, Outgoing

CHUNK_BYTES = 4 << 20
NUM_SLOTS = 8
WINDOW = 4  # chunks of one message that MPI has at a time
NUM_TAGS = 1 << 16


@dataclass(slots=True)
class InFlight:
    """Hold the chunks of a message that MPI has, in the order in which they complete."""

    requests: deque[tuple[MPI.Request, Loan]] = field(default_factory=deque)
    next_index: int = 0


class ChunkWire(MpiWire):
    """Move chunks as messages of one tag, which MPI keeps in order.

    A receive into a slot is posted once its chunk is there: so a slot is never held by a chunk that has no slot on the
    other side yet, and messages cannot hold each other up.
    """

    def push(self, parcel: Outgoing) -> bool:
        """Start sends, and take back what is sent."""
        flight = flight_of(parcel)
        before = parcel.returned, parcel.sent
        while flight.requests and self.test(parcel.peer, flight.requests[0][0]):
            parcel.take_back(flight.requests.popleft()[1])
        while len(flight.requests) < WINDOW and (loan := parcel.next()) is not None:
            self._send(parcel, flight, loan)
        return before != (parcel.returned, parcel.sent)

    def pull(self, parcel: Incoming) -> bool:
        """Complete receives, and start more."""
        flight = flight_of(parcel)
        status = MPI.Status()
        before = len(flight.requests), flight.next_index
        while flight.requests and self.test(parcel.peer, flight.requests[0][0], status):
            loan = flight.requests.popleft()[1]
            check_length(parcel, loan, status.Get_count(MPI.BYTE))
            parcel.fill(loan)
        while len(flight.requests) < WINDOW and flight.next_index < parcel.limit and self._receive(parcel, flight):
            pass
        return before != (len(flight.requests), flight.next_index)

    def abandon(self, parcel: Outgoing | Incoming) -> None:
        """Cancel the receives, and drop the requests: of a lost peer, none of them touches memory any more."""
        for request, loan in flight_of(parcel).requests:
            if isinstance(parcel, Incoming):
                self._cancel(request)
            parcel.release(loan)
        flight_of(parcel).requests.clear()

    def _send(self, parcel: Outgoing, flight: InFlight, loan: Loan) -> None:
        try:
            flight.requests.append((self.comm.Isend(bytes_of(loan.array), parcel.peer, tag_of(parcel)), loan))
        except MPI.Exception as error:
            parcel.release(loan)
            self.lose(parcel.peer, error)
        self.ring(parcel.peer)

    def _receive(self, parcel: Incoming, flight: InFlight) -> bool:
        """Start one receive; False where its chunk is not there yet, or no slot is free."""
        loan = parcel.lend(flight.next_index)
        if loan is None:
            return False
        try:
            request = self._match(parcel, loan)
        except MPI.Exception as error:
            self.lose(parcel.peer, error)
            request = None
        if request is None:
            parcel.release(loan)
            return False
        flight.requests.append((request, loan))
        flight.next_index += 1
        return True

    def _match(self, parcel: Incoming, loan: Loan) -> MPI.Request | None:
        if loan.slot is None:
            return self.comm.Irecv(bytes_of(loan.array), parcel.peer, tag_of(parcel))
        message = self.comm.Improbe(parcel.peer, tag_of(parcel))
        return None if message is None else message.Irecv(bytes_of(loan.array))

    def _cancel(self, request: MPI.Request) -> None:
        try:
            request.Cancel()
            request.Test()
        except MPI.Exception:
            return  # it has failed already: that is why it is cancelled


class MpiCarrier(LinkCarrier):
    """Send between the ranks of a communicator by MPI point-to-point calls."""

    name = "mpi"

    def __init__(
        self,
        device: Device,
        comm: MPI.Intracomm,
        *,
        gathering: Gathering = Gathering.PACKED,
        chunk_bytes: int = CHUNK_BYTES,
        num_slots: int = NUM_SLOTS,
    ) -> None:
        """Open it on every rank of `comm` at the same time; UnavailableError where MPI allows no threads."""
        super().__init__(device, ChunkWire(comm), gathering, chunk_bytes=chunk_bytes, num_slots=num_slots)


def flight_of(parcel: Outgoing | Incoming) -> InFlight:
    """Give what MPI has of a message."""
    if parcel.wire is None:
        parcel.wire = InFlight()
    assert isinstance(parcel.wire, InFlight)
    return parcel.wire


def tag_of(parcel: Outgoing | Incoming) -> int:
    """Give the tag of a message's chunks."""
    return FIRST_DATA_TAG + parcel.number % NUM_TAGS


def check_length(parcel: Incoming, loan: Loan, nbytes: int) -> None:
    """Raise TransferError where a chunk has not the length that both sides cut."""
    expected = parcel.chunks[loan.index].nbytes
    if nbytes != expected:
        parcel.release(loan)
        raise TransferError(f"rank {parcel.peer} sent {nbytes} bytes as a chunk of {expected}: it runs another version")
