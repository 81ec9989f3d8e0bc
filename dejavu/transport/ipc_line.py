"""The lines between the ranks of one host: how they find each other, speak without blocking, and notice a death."""

import array
import json
import os
import socket
import threading
from collections import deque
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from struct import Struct

from dejavu.device.handles import (
    accept,
    close_all,
    connect,
    listen,
    private_directory,
    receive_message,
    send_message,
)
from dejavu.errors import PeerLostError
from dejavu.transport.ipc_messages import MAX_MESSAGE_BYTES

Exchange = Callable[[bytes], list[bytes]]  # gives every rank's bytes to every rank, in their order: an allgather
CONNECT_S = 30.0
_TOKEN_BYTES = 16
_CREDENTIALS = Struct("3i")
_HELLO = Struct(f"<I{_TOKEN_BYTES}s")
_MAX_FDS = 4


class Line:
    """Speak with one rank: whole messages, in order, with descriptors; a full socket never blocks."""

    def __init__(self, connection: socket.socket, process: int, words_fd: int) -> None:
        """Take over the connection and `words_fd`, the other rank's flags."""
        self.socket = connection
        self.socket.setblocking(False)
        self.words_fd = words_fd
        self.pidfd = _watch(process)
        self._outbox: deque[tuple[bytes, int | None]] = deque()
        self._lock = threading.Lock()

    def say(self, message: bytes, fd: int | None = None) -> None:
        """Send a message, now or as soon as the socket takes it; `fd` is taken over. A dead peer hears nothing."""
        assert len(message) <= MAX_MESSAGE_BYTES, len(message)
        with self._lock:
            self._outbox.append((message, fd))
            self._flush()

    @property
    def has_more_to_say(self) -> bool:
        """Tell whether messages wait for the socket."""
        return bool(self._outbox)

    def flush(self) -> None:
        """Send what the socket takes now."""
        with self._lock:
            self._flush()

    def hear(self) -> tuple[bytes, list[int]] | None:
        """Give the next message and its descriptors, which the caller closes; None if none has come.

        PeerLostError at the end of the line.
        """
        try:
            space = socket.CMSG_SPACE(4 * _MAX_FDS)
            message, ancillary, _, _ = self.socket.recvmsg(2 * MAX_MESSAGE_BYTES, space, socket.MSG_CMSG_CLOEXEC)
        except BlockingIOError:
            return None
        except OSError as error:
            raise PeerLostError(f"a rank of this host is gone ({error})") from error
        if not message:
            raise PeerLostError("a rank of this host is gone")
        fds = array.array("i")
        for level, kind, payload in ancillary:
            if (level, kind) == (socket.SOL_SOCKET, socket.SCM_RIGHTS):
                fds.frombytes(payload[: len(payload) // 4 * 4])
        return message, fds.tolist()

    def close(self) -> None:
        """Close the line; what was not sent is dropped."""
        with self._lock:
            self.socket.close()
            self._drop()
            if self.pidfd is not None:
                os.close(self.pidfd)
                self.pidfd = None
            if self.words_fd >= 0:
                os.close(self.words_fd)
                self.words_fd = -1

    def _flush(self) -> None:
        while self._outbox:
            message, fd = self._outbox[0]
            rights = [] if fd is None else [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", [fd]).tobytes())]
            try:
                self.socket.sendmsg([message], rights)
            except BlockingIOError:
                return
            except OSError:  # the end of the line, which `hear` reports to the one who acts on it
                self._drop()
                return
            self._outbox.popleft()
            if fd is not None:
                os.close(fd)

    def _drop(self) -> None:
        while self._outbox:
            _, fd = self._outbox.popleft()
            if fd is not None:
                os.close(fd)


@dataclass(frozen=True, slots=True)
class Place:
    """Say where a rank is to be found."""

    host: str  # name and boot of the machine: what decides whether memory can be shared
    path: str
    token: str
    kind: str  # of the device

    def pack(self) -> bytes:
        """Give the bytes to exchange."""
        return json.dumps([self.host, self.path, self.token, self.kind]).encode()

    @classmethod
    def unpack(cls, data: bytes) -> "Place":
        """Read another rank's bytes."""
        return cls(*json.loads(data))


def this_host() -> str:
    """Name this machine, and its boot: two hosts may share a name."""
    return f"{socket.gethostname()}/{Path('/proc/sys/kernel/random/boot_id').read_text().strip()}"


def connect_ranks(exchange: Exchange, rank: int, kind: str, words_fd: int) -> tuple[dict[int, Line], dict[int, str]]:
    """Connect the ranks that share memory; gives their lines, and for every other rank why it has none.

    Every rank calls this at once. Nothing is left in the file system, unless the process is killed amid it.
    """
    directory = private_directory()
    try:
        with listen(directory / "ipc") as server:
            here = Place(this_host(), str(directory / "ipc"), os.urandom(_TOKEN_BYTES).hex(), kind)
            places = [Place.unpack(data) for data in exchange(here.pack())]
            refused = {i: _refusal(here, place) for i, place in enumerate(places) if i != rank}
            reasons = {i: reason for i, reason in refused.items() if reason is not None}
            near = [i for i, reason in refused.items() if reason is None]
            lines = {i: _call(places[i], rank, words_fd) for i in near if i < rank}
            lines |= dict(_answer(server, bytes.fromhex(here.token), words_fd) for i in near if i > rank)
    finally:
        (directory / "ipc").unlink(missing_ok=True)
        directory.rmdir()
    exchange(b"")  # every socket is in use, or gone: later calls of the same exchange are apart
    return lines, reasons


def _refusal(here: Place, there: Place) -> str | None:
    if there.host != here.host:
        return f"it is on {there.host}, not on {here.host}: use mpi, tcp or nccl between hosts"
    if there.kind != here.kind:
        return f"its device is {there.kind}, not {here.kind}: use mpi or tcp between kinds of devices"
    return None


def _call(place: Place, rank: int, words_fd: int) -> Line:
    """Call a listening rank, and hand it one end of the line."""
    mine, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    with connect(Path(place.path), CONNECT_S) as connection, theirs:
        process = _process_of(connection)
        send_message(connection, _HELLO.pack(rank, bytes.fromhex(place.token)), (theirs.fileno(), words_fd))
        _, fds = receive_message(connection)
    return Line(mine, process, fds[0])


def _answer(server: socket.socket, token: bytes, words_fd: int) -> tuple[int, Line]:
    """Take the next call of a rank that knows the token; gives its number and the line."""
    while True:
        with accept(server, CONNECT_S) as connection:
            connection.settimeout(CONNECT_S)
            message, fds = receive_message(connection)
            if len(fds) != 2 or len(message) != _HELLO.size or _HELLO.unpack(message)[1] != token:
                close_all(fds)
                continue
            send_message(connection, b"", (words_fd,))
            line = Line(socket.socket(fileno=fds[0]), _process_of(connection), fds[1])
            return int(_HELLO.unpack(message)[0]), line


def _process_of(connection: socket.socket) -> int:
    packed = connection.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _CREDENTIALS.size)
    return int(_CREDENTIALS.unpack(packed)[0])


def _watch(process: int) -> int | None:
    """Give a descriptor that becomes readable when a process has ended, with all that its devices still did.

    None where the process cannot be seen (another container's): then the end of the line is all that there is.
    """
    if process <= 0:
        return None
    with suppress(OSError):
        return os.pidfd_open(process)
    return None
