"""Reach a host's keeper: where it listens, how it is started and ended, and how one asks it. Standard library only."""

import fcntl
import json
import os
import select
import signal
import socket
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from hashlib import blake2b
from pathlib import Path
from typing import Any

import dejavu
from dejavu.device.handles import check_directory, close_all, connect, receive_message, send_message
from dejavu.device.keeper import LOCK, SOCKET
from dejavu.errors import DeviceError, PeerLostError

MARK = "DEJAVU_KEEPER"  # in a keeper's environment: the name of its directory
START_S = 20.0
CALL_S = 10.0
_PASSED = ("PATH", "LD_LIBRARY_PATH", "LANG", "TMPDIR")  # of the environment; the job's own mark would get it killed


@dataclass(frozen=True, slots=True)
class Guardian:
    """Name the process with whose end the keeper's ends, and how much later, for a job that is started again.

    The keeper then removes the directory `files` when the last process that claims it has ended, too.
    """

    process: int
    grace_s: float = 0.0
    files: str = ""


def keeper_directory(job: str, host: str | None = None) -> Path:
    """Give where the keeper of a job listens on a host: a name that only who knows the job's can tell."""
    word = blake2b(f"{job} {host or socket.gethostname()}".encode(), digest_size=12).hexdigest()
    runtime = Path(os.environ.get("XDG_RUNTIME_DIR") or "/nonexistent")
    parent = runtime if os.access(runtime, os.W_OK) else Path(tempfile.gettempdir())
    return parent / f"dejavu-keeper-{word}"


def call(
    directory: Path, request: dict[str, Any], fds: tuple[int, ...] = (), timeout_s: float = CALL_S
) -> tuple[dict[str, Any], list[int]]:
    """Ask a keeper once; gives its answer, and descriptors that the caller closes. PeerLostError if it has ended."""
    with connect(directory / SOCKET, timeout_s) as connection:
        send_message(connection, json.dumps(request).encode(), fds)
        message, received = receive_message(connection)
    answer: dict[str, Any] = json.loads(message)
    if "error" in answer:
        close_all(received)
        raise DeviceError(f"the keeper refused {request['do']} ({answer['error']}): it is of another version")
    return answer, received


def start_keeper(directory: Path, guardian: Guardian) -> None:
    """Start a keeper where none answers; several processes may try at once."""
    directory.mkdir(mode=0o700, exist_ok=True)
    check_directory(directory)
    with locked(directory / LOCK):
        if not is_running(directory):
            (directory / SOCKET).unlink(missing_ok=True)
            spawn(directory, guardian)


@contextmanager
def locked(path: Path) -> Iterator[None]:
    """Hold a file's lock; it goes with this process."""
    fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
    try:
        fcntl.flock(fd, fcntl.LOCK_EX)
        yield
    finally:
        os.close(fd)


def is_running(directory: Path) -> bool:
    """Tell whether a keeper answers."""
    try:
        call(directory, {"do": "drop", "prefix": "\0"})
    except PeerLostError:
        return False
    return True


def spawn(directory: Path, guardian: Guardian) -> None:
    """Start a keeper, and return when it listens: the process that is started detaches another one, and ends."""
    root = Path(dejavu.__file__).parents[1]
    environment = {name: os.environ[name] for name in _PASSED if name in os.environ}
    environment |= {"PYTHONPATH": str(root), MARK: directory.name}
    command = [sys.executable, "-S", "-m", "dejavu.device.keeper", str(directory)]
    arguments = [str(guardian.process), str(guardian.grace_s), guardian.files]
    try:
        subprocess.run(
            [*command, *arguments],
            env=environment,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            start_new_session=True,
            timeout=START_S,
            check=True,
        )
    except subprocess.CalledProcessError as error:
        last = error.stderr.decode(errors="replace").strip().splitlines()[-1:]
        raise DeviceError(f"the keeper did not start in {directory} ({''.join(last)}): check its space") from error


def end_keeper(job: str, timeout_s: float = 2.0) -> None:
    """End the keeper of a job on this host, if there is one, whatever state it is in; what it kept is free."""
    directory = keeper_directory(job)
    if not directory.exists():
        return
    with suppress(PeerLostError):
        wait_for_end(call(directory, {"do": "end"}, timeout_s=timeout_s)[0]["process"], timeout_s)
    if directory.exists():
        clear(directory)


def wait_for_end(process: int, timeout_s: float) -> None:
    """Wait until a process has ended, at most so long."""
    with suppress(ProcessLookupError):
        pidfd = os.pidfd_open(process)
        try:
            select.select([pidfd], [], [], timeout_s)
        finally:
            os.close(pidfd)


def clear(directory: Path) -> None:
    """Kill a keeper that does not end, and remove its files."""
    mark = f"{MARK}={directory.name}".encode()
    for path in Path("/proc").glob("[0-9]*"):
        with suppress(FileNotFoundError, ProcessLookupError, PermissionError):
            if mark in (path / "environ").read_bytes().split(b"\0"):
                os.kill(int(path.name), signal.SIGKILL)
                wait_for_end(int(path.name), CALL_S)
    for name in (SOCKET, LOCK):
        (directory / name).unlink(missing_ok=True)
    with suppress(FileNotFoundError):
        directory.rmdir()
