"""The `nccl` carrier: ncclSend and ncclRecv between GPUs, ordered by notes over MPI.

NCCL matches sends and receives by their order alone, and a kernel that waits for its peer holds multiprocessors. So
each direction of a pair of ranks is a communicator of its own, with a stream of its own; the sender announces each
chunk with a GO note when its bytes are ready, and launches the send; the receiver launches receives in the order of the
GOs. Every kernel that is launched soon finds its peer, nothing waits in a circle, and a dead peer costs no more than
its own communicators: they are aborted, never destroyed.
"""

import socket
import threading
from collections import deque
from dataclasses import dataclass, field
from typing import Any, ClassVar, Protocol

from mpi4py import MPI

from dejavu.device.base import Buffer, Device, Event, Location
from dejavu.errors import TransferError
from dejavu.transport.carrier import PEER_MESSAGE_BYTES, Gathering, UnavailableError
from dejavu.transport.link import LinkCarrier
from dejavu.transport.mpi_wire import MpiWire, bytes_of
from dejavu.transport.nccl_group import missing
from dejavu.transport.notes import Kind, Note
from dejavu.transport.parcels import Incoming, Loan, Outgoing

CHUNK_BYTES = 64 << 20
DIRECT_BYTES = 256 << 20  # of a chunk without staging: NCCL gains 7 % over 64 MiB, and holds others up for 0.7 ms
NUM_SLOTS = 3  # device memory, allocated when a message first needs packing
WINDOW = 4  # chunks of one message that are launched at a time
OPENING_S = 10.0  # how long a close waits for a path that is being opened
ID_TAG = 2
ID_BYTES = 128


class Path(Protocol):
    """Be one direction between two ranks. All calls come from the progress thread."""

    def is_open(self) -> bool:
        """Tell whether both sides have joined; raises what kept them from it."""

    def send(self, buffer: Buffer) -> Event:
        """Launch a send, on the sender's side; gives the event behind it."""

    def receive(self, buffer: Buffer) -> Event:
        """Launch a receive, on the receiver's side; gives the event behind it."""

    def abort(self) -> None:
        """End what was launched, and give everything back alone."""

    def destroy(self) -> None:
        """Give everything back, as the other side does."""


class NcclPath:
    """Be a communicator of two ranks, the sender 0 and the receiver 1, opened by a thread since that blocks.

    The thread also sends one byte: the first transfer blocks too, until both sides have connected.
    """

    def __init__(self, device: Device, side: int, unique_id: bytes) -> None:
        self._device = device
        self._side = side
        self._unique_id = unique_id
        self._comm: Any = None
        self._error: Exception | None = None
        self._is_aborted = False
        self._lock = threading.Lock()
        self._stream = device.create_stream("nccl")
        self._thread = threading.Thread(target=self._open, name="nccl-open", daemon=True)
        self._thread.start()

    def is_open(self) -> bool:
        """Ask the thread."""
        if self._thread.is_alive():
            return False
        if self._error is not None:
            raise TransferError(f"nccl could not connect two ranks: {self._error}") from self._error
        return True

    def send(self, buffer: Buffer) -> Event:
        """Launch ncclSend."""
        return self._launch(buffer)

    def receive(self, buffer: Buffer) -> Event:
        """Launch ncclRecv."""
        return self._launch(buffer)

    def abort(self) -> None:
        """Abort the communicator; one that is still being opened is aborted when it is open."""
        with self._lock:
            self._is_aborted = True
            comm, self._comm = self._comm, None
        if comm is not None:
            comm.abort()

    def destroy(self) -> None:
        """Destroy the communicator; abort one that never opened."""
        self._thread.join(OPENING_S)
        if self._thread.is_alive() or self._error is not None:
            self.abort()
            self._thread.join()
        elif self._comm is not None:
            self._comm.destroy()
            self._stream.close()

    def _open(self) -> None:
        from nccl import core

        try:
            with self._device.allocate(256) as scratch:  # makes the device current in this thread
                comm = core.Communicator.init(2, self._side, core.UniqueId.from_bytes(self._unique_id))
                with self._lock:
                    self._comm = comm
                if self._is_aborted:
                    self.abort()
                self._launch(scratch.view(0, 1)).synchronize()
        except Exception as error:  # whoever asks whether the path is open gets it
            self._error = error

    def _launch(self, buffer: Buffer) -> Event:
        comm = self._comm
        if comm is None:
            raise TransferError("the path was aborted, since its peer is lost")
        from nccl import bindings, core

        # The bindings take an address; the methods of Communicator look at a tensor first, and mistake its device.
        start = bindings.nccl.send if self._side == 0 else bindings.nccl.recv
        view = bindings.nccl.Comm(comm.ptr)
        event = self._device.create_event()
        start(buffer.address, buffer.nbytes, int(core.UINT8), 1 - self._side, view, self._stream.handle)
        event.record(self._stream)
        return event


@dataclass(slots=True)
class Launched:
    """Hold the chunks of a message that are launched, in their order, with the events behind them."""

    chunks: deque[tuple[Event, Loan]] = field(default_factory=deque)


class NcclWire(MpiWire):
    """Move chunks over paths, which are opened when first needed."""

    def __init__(self, device: Device, comm: MPI.Intracomm) -> None:
        super().__init__(comm)
        self.device = device
        self._out: dict[int, Path] = {}
        self._in: dict[int, Path] = {}
        self._announced: dict[int, deque[tuple[Incoming, int]]] = {}
        self._ids: dict[int, tuple[MPI.Request, bytes]] = {}
        self._num_launched = 0

    def is_imminent(self) -> bool:
        """Tell whether anything is launched: nothing wakes the thread when it ends."""
        return self._num_launched > 0

    def begin(self, parcel: Outgoing) -> None:
        """Say GO where no chunk's GO will: in an empty message; and where the receiver has yet to join the path."""
        if parcel.count == 0 or self._path_out(parcel.peer) is None:
            super().begin(parcel)

    def began(self, parcel: Incoming, note: Note) -> None:
        """Note a chunk that is announced; a GO without a chunk only begins the message."""
        if note.value > parcel.count:
            self.lose(parcel.peer, f"it announced chunk {note.value} of {parcel.count}")
        elif note.value:
            self._announced.setdefault(parcel.peer, deque()).append((parcel, note.value - 1))

    def push(self, parcel: Outgoing) -> bool:
        """Announce and launch sends, and take back what is sent."""
        path = self._path_out(parcel.peer)
        if path is None:
            return False
        launched, before = launched_of(parcel).chunks, (parcel.returned, parcel.sent)
        while launched and launched[0][0].query():
            parcel.take_back(self._close_first(launched))
        while len(launched) < WINDOW and (loan := parcel.next()) is not None:
            go = Note(Kind.GO, parcel.number, nbytes=parcel.chunk_bytes, value=loan.index + 1)
            self.post(parcel.peer, go)
            launched.append((path.send(loan.buffer), loan))
            self._num_launched += 1
        return before != (parcel.returned, parcel.sent)

    def pull(self, parcel: Incoming) -> bool:
        """Launch the receives that are due from this peer, and fill what has arrived of this message."""
        path = self._path_in(parcel.peer)
        has_launched = path is not None and self._launch(parcel.peer, path)
        launched, before = launched_of(parcel).chunks, len(launched_of(parcel).chunks)
        while launched and launched[0][0].query():
            parcel.fill(self._close_first(launched))
        return has_launched or len(launched) < before

    def abandon(self, parcel: Outgoing | Incoming) -> None:
        """Give the peer up: kernels that wait for it end only by an abort."""
        self.lose(parcel.peer, "it does not answer")
        launched = launched_of(parcel).chunks
        while launched:
            parcel.release(self._close_first(launched))

    def lose(self, peer: int, reason: object) -> None:
        """Abort the peer's communicators."""
        super().lose(peer, reason)
        self._announced.pop(peer, None)
        for paths in (self._out, self._in):
            path = paths.pop(peer, None)
            if path is not None:
                path.abort()

    def free(self) -> None:
        """Destroy the communicators, each at the same time as its other side: in the order of (sender, receiver)."""
        paths = {(self.rank, peer): path for peer, path in self._out.items()}
        paths |= {(peer, self.rank): path for peer, path in self._in.items()}
        for _, path in sorted(paths.items(), key=lambda item: item[0]):
            path.destroy()
        super().free()

    def forsake(self) -> None:
        """Abort the communicators."""
        for path in (*self._out.values(), *self._in.values()):
            path.abort()

    def new_id(self) -> bytes:
        """Give what both sides of a path name it by."""
        from nccl import core

        return bytes(core.get_unique_id())

    def open_path(self, peer: int, side: int, unique_id: bytes) -> Path:
        """Begin to open a path, of which this rank is the sender (side 0) or the receiver (1)."""
        return NcclPath(self.device, side, unique_id)

    def _path_out(self, peer: int) -> Path | None:
        if peer not in self._out:
            unique_id = self.new_id()
            assert len(unique_id) == ID_BYTES
            self._ids[peer] = self.comm.Isend(bytes_of(unique_id), peer, ID_TAG), unique_id
            self.ring(peer)
            self._out[peer] = self.open_path(peer, 0, unique_id)
        if peer in self._ids and self.test(peer, self._ids[peer][0]):
            del self._ids[peer]
        path = self._out.get(peer)
        return path if path is not None and path.is_open() else None

    def _path_in(self, peer: int) -> Path | None:
        if peer not in self._in:
            unique_id = self._take_id(peer)
            if unique_id is None:
                return None
            self._in[peer] = self.open_path(peer, 1, unique_id)
        return self._in[peer] if self._in[peer].is_open() else None

    def _take_id(self, peer: int) -> bytes | None:
        data = bytearray(ID_BYTES)
        try:
            message = self.comm.Improbe(peer, ID_TAG)
            if message is None:
                return None
            message.Recv(bytes_of(data))
        except MPI.Exception as error:
            self.lose(peer, error)
            return None
        return bytes(data)

    def _close_first(self, launched: deque[tuple[Event, Loan]]) -> Loan:
        """Take the first chunk off, and close its event."""
        event, loan = launched.popleft()
        event.close()
        self._num_launched -= 1
        return loan

    def _launch(self, peer: int, path: Path) -> bool:
        """Launch receives in the order of the GOs, as far as there is memory for them."""
        due, has_launched = self._announced.get(peer), False
        while due:
            parcel, index = due[0]
            loan = parcel.lend(index)
            if loan is None:
                break
            due.popleft()
            launched_of(parcel).chunks.append((path.receive(loan.buffer), loan))
            self._num_launched += 1
            has_launched = True
        return has_launched


class NcclCarrier(LinkCarrier):
    """Send between GPUs, one to each rank of a communicator, by NCCL."""

    name = "nccl"
    staging_location: ClassVar[Location] = Location.DEVICE
    direct_bytes: ClassVar[int] = DIRECT_BYTES
    message_bytes = PEER_MESSAGE_BYTES

    def __init__(
        self,
        device: Device,
        comm: MPI.Intracomm,
        *,
        gathering: Gathering = Gathering.PACKED,
        chunk_bytes: int = CHUNK_BYTES,
    ) -> None:
        """Open it on every rank of `comm` at the same time; UnavailableError, on all of them, where one cannot."""
        super().__init__(device, self.make_wire(device, comm), gathering, chunk_bytes=chunk_bytes, num_slots=NUM_SLOTS)

    def make_wire(self, device: Device, comm: MPI.Intracomm) -> NcclWire:
        """Make the wire, where every rank can."""
        check_places(device, comm)
        return NcclWire(device, comm)

    def reaches(self, memory: Buffer) -> bool:
        """Tell whether NCCL moves such memory itself: the device's."""
        return memory.location is Location.DEVICE


def check_places(device: Device, comm: MPI.Intracomm) -> None:
    """Raise UnavailableError, on every rank, unless each has NCCL and a GPU that no other rank uses."""
    place = socket.gethostname(), device.properties.bus_id
    answers: list[tuple[str | None, tuple[str, str]]] = comm.allgather((missing(device), place))
    for rank, (reason, where) in enumerate(answers):
        if reason is not None:
            raise UnavailableError(f"nccl is unavailable on rank {rank}: {reason}")
        other = [one for _, one in answers].index(where)
        if other != rank:
            raise UnavailableError(
                f"nccl is unavailable: ranks {other} and {rank} share GPU {where[1]}, which NCCL cannot: use ipc"
            )


def launched_of(parcel: Outgoing | Incoming) -> Launched:
    """Give what was launched of a message."""
    if parcel.wire is None:
        parcel.wire = Launched()
    assert isinstance(parcel.wire, Launched)
    return parcel.wire
