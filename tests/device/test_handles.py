"""Descriptors over a Unix socket: who may call, what arrives, and who closes what."""

import os
import socket
import stat
import subprocess
import sys
import threading

import pytest

from dejavu.device import DeviceError
from dejavu.device.handles import (
    MAX_DESCRIPTORS,
    accept,
    connect,
    listen,
    private_directory,
    receive_message,
    send_message,
)
from dejavu.errors import DeadlineError, PeerLostError


@pytest.fixture
def directory():
    made = private_directory()
    yield made
    for path in made.iterdir():
        path.unlink()
    made.rmdir()


@pytest.fixture
def pair():
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_STREAM)
    with ours, theirs:
        ours.settimeout(5)
        theirs.settimeout(5)
        yield ours, theirs


def num_open_descriptors():
    return len(os.listdir("/proc/self/fd"))


def test_the_socket_and_its_directory_are_private(directory):
    with listen(directory / "socket"):
        assert stat.S_IMODE(directory.stat().st_mode) == 0o700
        assert stat.S_IMODE((directory / "socket").stat().st_mode) == 0o600


def test_a_directory_open_to_others_is_refused(tmp_path):
    tmp_path.chmod(0o755)
    with pytest.raises(DeviceError, match="0700"):
        listen(tmp_path / "socket")


def test_nobody_calls(directory):
    with listen(directory / "socket") as server, pytest.raises(DeadlineError):
        accept(server, 0.05)


def test_nobody_listens(directory):
    with pytest.raises(PeerLostError, match="nobody answers"):
        connect(directory / "socket", 1)


def test_descriptors_arrive_as_the_same_files(pair):
    files = [os.memfd_create(f"file {i}") for i in range(3)]
    for index, fd in enumerate(files):
        os.write(fd, bytes([index]) * 10)
    before = num_open_descriptors()
    send_message(pair[0], b"three files", tuple(files))
    message, received = receive_message(pair[1])
    assert message == b"three files"
    assert num_open_descriptors() == before + 3
    for fd in files:
        os.close(fd)
    for index, fd in enumerate(received):
        assert os.pread(fd, 100, 0) == bytes([index]) * 10
        assert not os.get_inheritable(fd)
        os.close(fd)


def test_messages_keep_their_bounds_and_descriptors(pair):
    """Messages that were queued before the first is read do not run into each other."""
    fds = [os.memfd_create(f"file {i}") for i in range(2)]
    send_message(pair[0], b"", (fds[0],))
    send_message(pair[0], b"x" * 50_000)
    send_message(pair[0], b"last", (fds[1],))
    for expected, num_fds in ((b"", 1), (b"x" * 50_000, 0), (b"last", 1)):
        message, received = receive_message(pair[1])
        assert message == expected
        assert len(received) == num_fds
        for fd in received:
            os.close(fd)
    for fd in fds:
        os.close(fd)


def test_as_many_descriptors_as_fit(pair):
    fds = [os.memfd_create("file") for _ in range(MAX_DESCRIPTORS)]
    send_message(pair[0], b"many", tuple(fds))
    _, received = receive_message(pair[1])
    assert len({os.fstat(fd).st_ino for fd in received}) == MAX_DESCRIPTORS
    for fd in fds + received:
        os.close(fd)


def test_a_closed_peer_is_a_lost_peer(pair):
    pair[0].close()
    with pytest.raises(PeerLostError):
        receive_message(pair[1])
    with pytest.raises(PeerLostError):
        send_message(pair[1], b"hello")


def test_what_is_no_message_is_refused(pair):
    pair[0].sendall(b"GET / HTTP/1.1\r\n\r\n")
    with pytest.raises(PeerLostError, match="no part of this job"):
        receive_message(pair[1])


def test_descriptors_of_a_broken_message_are_closed(pair):
    fd = os.memfd_create("file")
    before = num_open_descriptors()
    header = (100).to_bytes(4, "little") + (1).to_bytes(4, "little")
    socket.send_fds(pair[0], [header + b"short"], [fd])
    pair[0].shutdown(socket.SHUT_WR)
    with pytest.raises(PeerLostError):
        receive_message(pair[1])
    assert num_open_descriptors() == before
    os.close(fd)


@pytest.mark.skipif(os.geteuid() != 0, reason="becoming another user needs root")
def test_another_user_is_dropped(directory):
    call = (
        f"import os, socket; os.setuid(65534); s = socket.socket(socket.AF_UNIX); s.connect({str(directory)!r} + '/s')"
    )
    with listen(directory / "s") as server:
        directory.chmod(0o755)
        (directory / "s").chmod(0o666)
        subprocess.run([sys.executable, "-c", call], check=True, timeout=30)
        ours = threading.Thread(target=lambda: connect(directory / "s").close())
        ours.start()
        with accept(server, 5) as connection:  # the first caller was dropped: this is the second
            assert connection.recv(1) == b""
        ours.join()
        with pytest.raises(DeadlineError):
            accept(server, 0.05)
