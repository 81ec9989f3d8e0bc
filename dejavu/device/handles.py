"""Pass file descriptors between processes of one user, over a Unix socket that nobody else can open.

A descriptor is all that exported memory is; MPI cannot carry one. The socket's directory has mode 0700 and the socket
0600, and both ends compare the other's user with their own (SO_PEERCRED) before anything is said.
"""

import array
import os
import socket
import stat
import struct
import tempfile
from pathlib import Path

from dejavu.errors import DeadlineError, DeviceError, PeerLostError

MAX_DESCRIPTORS = 250  # the kernel takes 253 in one message
MAX_MESSAGE_BYTES = 1 << 20
_CREDENTIALS = struct.Struct("3i")  # process, user, group: struct ucred
_LENGTH = struct.Struct("<II")  # message bytes, descriptors


def private_directory(parent: Path | None = None) -> Path:
    """Make a new directory with an unguessable name and mode 0700; the caller removes it."""
    return Path(tempfile.mkdtemp(prefix="dejavu-", dir=parent))


def listen(path: Path, backlog: int = 64) -> socket.socket:
    """Give a listening socket of mode 0600 at `path`; DeviceError if its directory is open to other users."""
    check_directory(path.parent)
    server = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_CLOEXEC)
    try:
        server.bind(str(path))
        path.chmod(0o600)
        server.listen(backlog)
    except OSError as error:
        server.close()
        raise DeviceError(f"cannot listen at {path} ({error.strerror}): choose a shorter or unused path") from error
    return server


def accept(server: socket.socket, timeout_s: float | None = None) -> socket.socket:
    """Take the next caller of the same user; callers of other users are dropped. DeadlineError after `timeout_s`."""
    server.settimeout(timeout_s)
    while True:
        try:
            connection, _ = server.accept()
        except TimeoutError as error:
            raise DeadlineError(f"nobody called within {timeout_s} s: a peer died at its start") from error
        if peer_user(connection) == os.geteuid():
            return connection
        connection.close()


def connect(path: Path, timeout_s: float = 10.0) -> socket.socket:
    """Call the listener at `path`; its later waits have the same timeout."""
    client = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_CLOEXEC)
    client.settimeout(timeout_s)
    try:
        client.connect(str(path))
        if peer_user(client) != os.geteuid():
            raise DeviceError(f"the listener at {path} belongs to another user: remove the socket and start again")
    except OSError as error:
        client.close()
        raise PeerLostError(f"nobody answers at {path} ({error}): check that its process lives") from error
    except DeviceError:
        client.close()
        raise
    return client


def peer_user(connection: socket.socket) -> int:
    """Give the user id of the process at the other end, as the kernel recorded it."""
    packed = connection.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _CREDENTIALS.size)
    return int(_CREDENTIALS.unpack(packed)[1])


def send_message(connection: socket.socket, message: bytes, fds: tuple[int, ...] = ()) -> None:
    """Send bytes and duplicates of descriptors; the caller keeps its own."""
    assert len(fds) <= MAX_DESCRIPTORS
    assert len(message) <= MAX_MESSAGE_BYTES
    header = _LENGTH.pack(len(message), len(fds))
    ancillary = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", fds).tobytes())] if fds else []
    try:
        sent = connection.sendmsg([header, message], ancillary)
        if rest := (header + message)[sent:]:
            connection.sendall(rest)
    except OSError as error:
        raise PeerLostError(f"the process at the other end of a local socket is gone ({error})") from error


def receive_message(connection: socket.socket) -> tuple[bytes, list[int]]:
    """Take one message: its bytes, and descriptors that the caller now owns and closes.

    PeerLostError when the other end is closed, or sends what is no message.
    """
    fds: list[int] = []
    try:
        header = _receive(connection, _LENGTH.size, fds)
        nbytes, num_fds = _LENGTH.unpack(header)
        if nbytes > MAX_MESSAGE_BYTES or num_fds > MAX_DESCRIPTORS:
            raise PeerLostError(f"a local socket sent a message of {nbytes} bytes: its sender is no part of this job")
        message = _receive(connection, nbytes, fds)
        if len(fds) != num_fds:
            raise PeerLostError(f"{len(fds)} of {num_fds} descriptors arrived: raise the limit `ulimit -n`")
    except BaseException:
        close_all(fds)
        raise
    return message, fds


def close_all(fds: list[int]) -> None:
    """Close descriptors."""
    for fd in fds:
        os.close(fd)


def _receive(connection: socket.socket, nbytes: int, fds: list[int]) -> bytes:
    received = bytearray()
    space = socket.CMSG_SPACE(4 * MAX_DESCRIPTORS)
    while len(received) < nbytes:
        try:
            data, ancillary, _, _ = connection.recvmsg(nbytes - len(received), space, socket.MSG_CMSG_CLOEXEC)
        except OSError as error:
            raise PeerLostError(f"the process at the other end of a local socket does not answer ({error})") from error
        for level, kind, payload in ancillary:
            if (level, kind) == (socket.SOL_SOCKET, socket.SCM_RIGHTS):
                fds.extend(array.array("i", payload[: len(payload) // 4 * 4]))
        if not data:
            raise PeerLostError("the process at the other end of a local socket is gone")
        received += data
    return bytes(received)


def check_directory(directory: Path) -> None:
    """Raise DeviceError where another user owns a directory, or may look into it."""
    status = directory.stat()
    if status.st_uid != os.geteuid() or stat.S_IMODE(status.st_mode) & 0o077:
        raise DeviceError(f"the directory {directory} is open to other users: make it yours, with mode 0700")
