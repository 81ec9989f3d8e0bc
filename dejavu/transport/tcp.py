"""The `tcp` carrier: sockets of its own beside MPI, whose ends prove that they belong to the job.

Every pair of ranks has one connection or several; chunks are spread over them. Threads of strangers, secrets and
addresses are in tcp_meeting.py and tcp_handshake.py, the bytes of one connection in tcp_connection.py.
"""

import os
import select
import selectors
import socket
import struct
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from functools import partial

from dejavu.device.base import Device
from dejavu.errors import TransferError
from dejavu.transport.carrier import Gathering
from dejavu.transport.link import LinkCarrier, Wire
from dejavu.transport.notes import Kind, Note
from dejavu.transport.parcels import Incoming, Loan, Outgoing
from dejavu.transport.tcp_connection import Connection, Place, check_chunk
from dejavu.transport.tcp_handshake import SECRET_BYTES, Identity, new_secret
from dejavu.transport.tcp_meeting import Doorman, call, own_address

CHUNK_BYTES = 1 << 20
NUM_SLOTS = 16
QUEUED_BYTES = 2 << 20  # given to one connection before the kernel has taken them
STREAMS_FAR = 4  # connections of a pair of ranks on different hosts; one on the same host
NEAR_BUFFER_BYTES = 1 << 20  # larger ones leave the cache; between hosts the kernel tunes them by itself
KEEPALIVE = {
    socket.TCP_KEEPIDLE: 5,  # seconds of silence before the first probe
    socket.TCP_KEEPINTVL: 2,
    socket.TCP_KEEPCNT: 3,
    socket.TCP_USER_TIMEOUT: 15_000,  # milliseconds that written bytes may stay unacknowledged
}
MEETING_S = 30.0
GOODBYE_S = 2.0
LONGEST_NAP_S = 5e-3
COARSE_S = 2e-3
MAX_SELECTED = 1024  # select() knows no higher descriptors

Exchange = Callable[[bytes], list[bytes]]


@dataclass(slots=True)
class Bookkeeping:
    """Know which chunks of a message have been begun, and which loans connections hold."""

    seen: set[int] = field(default_factory=set)
    loans: set[Loan] = field(default_factory=set)


class SocketWire(Wire):
    """Move notes and chunks over authenticated connections; `peers` are their sockets, by rank."""

    def __init__(self, rank: int, size: int, peers: dict[int, list[socket.socket]]) -> None:
        super().__init__(rank, size)
        self.longest_nap_s = LONGEST_NAP_S
        self._selector = selectors.EpollSelector()
        self._wake = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)
        self._selector.register(self._wake, selectors.EVENT_READ)
        self._connections: dict[int, list[Connection]] = {}
        self._finished: set[Connection] = set()  # whose peers write no more
        for peer, sockets in peers.items():
            self._connections[peer] = [self._connect(peer, sock) for sock in sockets]
        self._held: set[Connection] = set()
        self._is_closed = False

    def post(self, peer: int, note: Note) -> None:
        """Queue a note on the first connection."""
        if peer not in self.lost:
            self._connections[peer][0].queue(note)
            self._write(peer, self._connections[peer][0])

    def poll(self) -> bool:
        """Read and write what sockets are ready for."""
        has_moved = False
        for key, events in self._selector.select(0):
            if key.data is None:
                os.eventfd_read(self._wake)
                continue
            peer, connection = key.data
            if events & selectors.EVENT_WRITE and peer not in self.lost:
                has_moved |= self._write(peer, connection)
            if events & selectors.EVENT_READ and peer not in self.lost:
                has_moved |= self._read(peer, connection)
        for connection in list(self._held):
            peer = self._peer_of(connection)
            has_moved |= self._read(peer, connection)
        return has_moved

    def push(self, parcel: Outgoing) -> bool:
        """Queue chunks, each on the connection that has the least to write."""
        books, before = books_of(parcel), parcel.sent
        while parcel.peer not in self.lost:
            connection = min(self._connections[parcel.peer], key=lambda one: one.waiting_bytes)
            if connection.waiting_bytes >= QUEUED_BYTES or (loan := parcel.next()) is None:
                break
            books.loans.add(loan)
            note = Note(Kind.DATA, parcel.number, nbytes=loan.buffer.nbytes, value=loan.index)
            connection.queue(note, loan.array.data, partial(self._sent, parcel, loan))
            self._write(parcel.peer, connection)
        return parcel.sent > before

    def pull(self, parcel: Incoming) -> bool:
        """Do nothing: what arrives is taken when it is read."""
        return False

    def abandon(self, parcel: Outgoing | Incoming) -> None:
        """Give the peer up: its connections are in the middle of chunks."""
        self.lose(parcel.peer, "it does not answer")
        books = books_of(parcel)
        while books.loans:
            parcel.release(books.loans.pop())

    def lose(self, peer: int, reason: object) -> None:
        """Hang up all connections of a peer."""
        super().lose(peer, reason)
        for connection in self._connections.pop(peer, []):
            self._held.discard(connection)
            self._finished.discard(connection)
            if connection.sock in self._selector.get_map():
                self._selector.unregister(connection.sock)
            connection.close()

    def nap(self, seconds: float | None) -> None:
        """Sleep until a socket is ready. The selector counts in milliseconds, which are too long for most naps."""
        own = self._selector.fileno()
        if seconds is None or seconds > COARSE_S or own >= MAX_SELECTED:
            self._selector.select(seconds)
        else:
            select.select([own], [], [], seconds)

    def wake(self) -> None:
        """Make the event descriptor ready."""
        if not self._is_closed:
            os.eventfd_write(self._wake, 1)

    def close(self) -> None:
        """Write what is queued, wait a little until the peers have read it, and hang up."""
        if self._is_closed:
            return
        self._finish(time.monotonic() + GOODBYE_S)
        self._is_closed = True
        for peer in list(self._connections):
            self.lose(peer, "this rank has closed the carrier")
        self._selector.close()
        os.close(self._wake)

    def _finish(self, end_s: float) -> None:
        """Say that nothing more is written, and read on: hanging up on unread bytes would destroy what was written."""
        shut: set[Connection] = set()
        while self._connections and time.monotonic() < end_s:
            for connection in [one for peer in self._connections.values() for one in peer]:
                if not connection.has_output and connection not in shut:
                    shut.add(connection)
                    shut_down(connection.sock)
            self.nap(0.05)
            self.poll()

    def _connect(self, peer: int, sock: socket.socket) -> Connection:
        connection = Connection(sock, partial(self._admit, peer), lambda note: self.deliver(peer, note))
        self._selector.register(sock, selectors.EVENT_READ, (peer, connection))
        return connection

    def _peer_of(self, connection: Connection) -> int:
        return next(peer for peer, connections in self._connections.items() if connection in connections)

    def _read(self, peer: int, connection: Connection) -> bool:
        try:
            return connection.read()
        except EOFError as error:
            self._finished.add(connection)
            if self._finished.issuperset(self._connections[peer]):
                self.lose(peer, error)
        except (OSError, TransferError) as error:
            self.lose(peer, error)
        finally:
            self._watch(peer, connection)
        return True

    def _write(self, peer: int, connection: Connection) -> bool:
        try:
            return connection.write()
        except OSError as error:
            self.lose(peer, error)
            return True
        finally:
            self._watch(peer, connection)

    def _watch(self, peer: int, connection: Connection) -> None:
        """Await what the connection needs next: a held one is read when a slot is free, whatever the socket says."""
        if peer in self.lost:
            return
        (self._held.add if connection.is_held else self._held.discard)(connection)
        reads = not connection.is_held and connection not in self._finished
        events = reads * selectors.EVENT_READ | connection.has_output * selectors.EVENT_WRITE
        registered = connection.sock in self._selector.get_map()
        if not events and registered:
            self._selector.unregister(connection.sock)
        elif events and not registered:
            self._selector.register(connection.sock, events, (peer, connection))
        elif events and self._selector.get_key(connection.sock).events != events:
            self._selector.modify(connection.sock, events, (peer, connection))

    def _admit(self, peer: int, note: Note) -> Place | None:
        """Check a chunk against the receive that was posted for it, and give its place."""
        parcel = self.find(peer, note.number)
        if parcel is None:
            raise TransferError(f"it sent a chunk of message {note.number}, which this rank does not expect")
        check_chunk(note, parcel.count, parcel.chunks[note.value].nbytes if note.value < parcel.count else 0)
        books = books_of(parcel)
        if note.value in books.seen:
            raise TransferError(f"it sent chunk {note.value} of message {note.number} twice")
        loan = parcel.lend(note.value)
        if loan is None:
            return None
        books.seen.add(note.value)
        books.loans.add(loan)
        return Place(loan.array.data, partial(self._filled, parcel, loan))

    def _filled(self, parcel: Incoming, loan: Loan) -> None:
        books_of(parcel).loans.discard(loan)
        try:
            parcel.fill(loan)
        except Exception as error:  # the copy's, which ends this message and no other
            parcel.failure = error

    def _sent(self, parcel: Outgoing, loan: Loan) -> None:
        books_of(parcel).loans.discard(loan)
        parcel.take_back(loan)


class TcpCarrier(LinkCarrier):
    """Send between the ranks of a job over TCP connections of their own."""

    name = "tcp"

    def __init__(
        self,
        device: Device,
        rank: int,
        exchange: Exchange,
        *,
        gathering: Gathering = Gathering.PACKED,
        chunk_bytes: int = CHUNK_BYTES,
        interface: str | None = None,
        secret: bytes | None = None,
        num_streams: int | None = None,
    ) -> None:
        """Open it on every rank at the same time.

        `exchange` gives every rank's bytes to every rank, as an allgather does, and is trusted: without a `secret` of
        the launcher, rank 0 makes one and hands it out. `interface` is a name or an address; by default it is the one
        that leads to the other hosts, or the loopback. UnavailableError where there is none.
        """
        hosts = [host.decode() for host in exchange(socket.gethostname().encode())]
        peers = meet(rank, hosts, exchange, interface, secret, num_streams)
        wire = SocketWire(rank, len(hosts), peers)
        super().__init__(device, wire, gathering, chunk_bytes=chunk_bytes, num_slots=NUM_SLOTS)


def meet(
    rank: int, hosts: list[str], exchange: Exchange, interface: str | None, secret: bytes | None, streams: int | None
) -> dict[int, list[socket.socket]]:
    """Connect every pair of ranks: each rank calls those before it. Gives the sockets of each peer."""
    address = own_address(interface, hosts, rank)
    doorman = Doorman(address, rank)
    try:
        cards = exchange_cards(
            exchange, address, doorman.port, secret or (new_secret() if rank == 0 else bytes(SECRET_BYTES))
        )
        secret = secret or cards[0][2]
        count = streams or (1 if len(set(hosts)) == 1 else STREAMS_FAR)
        doorman.open(secret, identities(range(rank + 1, len(hosts)), [rank], count))
        outgoing = {
            identity: call(*cards[identity.listener][:2], secret, identity, MEETING_S)
            for identity in identities([rank], range(rank), count)
        }
        incoming = doorman.wait(MEETING_S)
    except BaseException:
        doorman.close()
        raise
    peers: dict[int, list[socket.socket]] = {}
    for identity, sock in sorted((outgoing | incoming).items(), key=lambda item: item[0].stream):
        peers.setdefault(identity.listener + identity.dialler - rank, []).append(sock)
        prepare(sock, near=len(set(hosts)) == 1)
    return peers


def identities(diallers: Iterable[int], listeners: Iterable[int], num_streams: int) -> list[Identity]:
    """Give the connections between two groups of ranks."""
    callers, called = list(diallers), list(listeners)
    return [Identity(a, b, stream) for a in callers for b in called for stream in range(num_streams)]


def exchange_cards(exchange: Exchange, address: str, port: int, secret: bytes) -> list[tuple[str, int, bytes]]:
    """Tell every rank where each one listens, and rank 0's secret."""
    card = struct.pack(f"<16sI{SECRET_BYTES}s", address.encode(), port, secret)
    unpacked = [struct.unpack(f"<16sI{SECRET_BYTES}s", other) for other in exchange(card)]
    return [(where.rstrip(b"\0").decode(), number, word) for where, number, word in unpacked]


def prepare(sock: socket.socket, *, near: bool) -> None:
    """Set a socket's buffers, no delay for notes, and how soon the loss of a silent host is noticed."""
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    for option, value in KEEPALIVE.items():
        sock.setsockopt(socket.IPPROTO_TCP, option, value)
    if near:
        for option in (socket.SO_SNDBUF, socket.SO_RCVBUF):
            sock.setsockopt(socket.SOL_SOCKET, option, NEAR_BUFFER_BYTES)


def shut_down(sock: socket.socket) -> None:
    """Say that nothing more is written."""
    try:
        sock.shutdown(socket.SHUT_WR)
    except OSError:
        return  # the peer has hung up


def books_of(parcel: Outgoing | Incoming) -> Bookkeeping:
    """Give what this wire knows about a message."""
    if parcel.wire is None:
        parcel.wire = Bookkeeping()
    assert isinstance(parcel.wire, Bookkeeping)
    return parcel.wire
