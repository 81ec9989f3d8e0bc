"""The keeper: one small process per host and job that holds the descriptors of memory, so that it outlives its makers.

`python -m dejavu.device.keeper DIRECTORY PROCESS GRACE_S FILES` listens in that directory, detaches, and needs nothing
but the standard library: no torch, no device context. Each request is one connection, one JSON object with at most one
descriptor, and one answer of the same kind:

    put      name, nbytes, about + descriptor     hold a duplicate, in place of what had that name
    get      name                                 give a duplicate back, with nbytes and about
    drop     prefix                               let go of all whose names begin so
    list                                          give nbytes and about of each name
    join     process, grace_s                     a process takes part, and says whom to watch
    leave                                         it has ended well
    end                                           the job is over

It ends, and all memory that nobody else holds is free, with `end`, when all who joined have left, or `grace_s` after
the process that it watches has ended: the supervisor, or the mpirun, of its job. Then it removes the directory FILES,
unless a process that does not end still claims it.
"""

import json
import os
import selectors
import signal
import socket
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dejavu.device.claims import clear_unclaimed
from dejavu.device.handles import accept, close_all, listen, receive_message, send_message
from dejavu.errors import DejavuError

SOCKET = "socket"
LOCK = "lock"
CALL_S = 2.0  # for a caller that has begun to speak
CLEAR_S = 10.0  # for the last processes of a job to end

Answer = tuple[dict[str, Any], tuple[int, ...]]


@dataclass(slots=True)
class Kept:
    """Hold one descriptor and what its owner says of it."""

    fd: int
    nbytes: int
    about: dict[str, Any]


class Keeper:
    """Answer requests until the job is over."""

    def __init__(self, server: socket.socket) -> None:
        self.server = server
        self.kept: dict[str, Kept] = {}
        self.members: set[int] = set()
        self.watched: dict[int, int] = {}  # process → pidfd
        self.grace_s = 0.0
        self.end_s = float("inf")  # when to end, on the monotonic clock
        self.selector = selectors.DefaultSelector()
        self.selector.register(server, selectors.EVENT_READ, self.answer_next)

    def run(self) -> None:
        """Serve; asleep while nobody calls and the watched process lives."""
        while (left_s := self.end_s - time.monotonic()) > 0:
            for key, _ in self.selector.select(None if left_s == float("inf") else left_s):
                key.data()

    def watch(self, process: int, grace_s: float) -> None:
        """End when this process has, unless another one is watched by then."""
        self.grace_s = grace_s
        self.end_s = float("inf")
        if process in self.watched:
            return
        try:
            pidfd = os.pidfd_open(process)
        except ProcessLookupError:
            self.lose(process)
            return
        self.watched[process] = pidfd
        self.selector.register(pidfd, selectors.EVENT_READ, lambda: self.lose(process))

    def lose(self, process: int) -> None:
        """Take note of the end of a watched process."""
        pidfd = self.watched.pop(process, None)
        if pidfd is not None:
            self.selector.unregister(pidfd)
            os.close(pidfd)
        if not self.watched:
            self.end_s = time.monotonic() + self.grace_s

    def answer_next(self) -> None:
        """Answer one caller; one that says what is no request is hung up on."""
        with suppress(DejavuError, OSError, ValueError), accept(self.server, CALL_S) as connection:
            connection.settimeout(CALL_S)
            message, fds = receive_message(connection)
            try:
                answer, sent = self.act(json.loads(message), fds, caller(connection))
                send_message(connection, json.dumps(answer).encode(), sent)
            finally:
                close_all(fds)

    def act(self, request: Any, fds: list[int], process: int) -> Answer:
        """Do what a request asks for; takes the descriptors that it keeps out of `fds`."""
        actions: dict[Any, Callable[[], Answer]] = {
            "put": lambda: self.put(request["name"], request["nbytes"], request["about"], fds),
            "get": lambda: self.get(request["name"]),
            "drop": lambda: self.drop(request["prefix"]),
            "list": self.contents,
            "join": lambda: self.join(process, request["process"], request["grace_s"]),
            "leave": lambda: self.leave(process),
            "end": self.end,
        }
        try:
            return actions[request["do"]]()
        except (KeyError, TypeError, AssertionError) as error:
            return {"error": f"{type(error).__name__}: {error}"}, ()

    def put(self, name: str, nbytes: int, about: dict[str, Any], fds: list[int]) -> Answer:
        """Keep a descriptor."""
        assert isinstance(name, str), name
        assert isinstance(nbytes, int), nbytes
        assert isinstance(about, dict), about
        assert len(fds) == 1, f"{len(fds)} descriptors"
        self.drop_one(name)
        self.kept[name] = Kept(fds.pop(), nbytes, about)
        return {}, ()

    def get(self, name: str) -> Answer:
        """Give a descriptor, or nothing where there is none of that name."""
        kept = self.kept.get(name)
        return ({"nbytes": kept.nbytes, "about": kept.about}, (kept.fd,)) if kept else ({"nbytes": None}, ())

    def drop(self, prefix: str) -> Answer:
        """Close the descriptors of some names."""
        names = [name for name in self.kept if name.startswith(prefix)]
        for name in names:
            self.drop_one(name)
        return {"names": names}, ()

    def drop_one(self, name: str) -> None:
        """Close the descriptor of a name, if there is one."""
        if kept := self.kept.pop(name, None):
            os.close(kept.fd)

    def contents(self) -> Answer:
        """Say what is kept."""
        return {"kept": {name: {"nbytes": k.nbytes, "about": k.about} for name, k in self.kept.items()}}, ()

    def join(self, member: int, process: int, grace_s: float) -> Answer:
        """Take a member in."""
        self.members.add(member)
        self.watch(process, grace_s)
        return {}, ()

    def leave(self, member: int) -> Answer:
        """Let a member go; the last one ends the keeper."""
        self.members.discard(member)
        return {}, () if self.members else self.end()[1]

    def end(self) -> Answer:
        """End after this answer, which names the process whose end can be awaited."""
        self.end_s = 0.0
        return {"process": os.getpid()}, ()


def caller(connection: socket.socket) -> int:
    """Give the process at the other end, as the kernel recorded it."""
    return int.from_bytes(connection.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, 12)[:4], sys.byteorder)


def detach() -> None:
    """Go on as a child of nobody's, without a terminal, a directory or a stream of the caller's."""
    if os.fork():
        os._exit(0)
    os.chdir("/")
    null = os.open(os.devnull, os.O_RDWR)
    for fd in (0, 1, 2):
        os.dup2(null, fd)
    os.close(null)


def stop(signum: int, frame: object) -> None:
    """Turn a signal into an orderly end."""
    sys.exit(0)


def main(arguments: list[str]) -> None:
    """Listen, detach, serve, and leave no file behind."""
    directory, process, grace_s, files = Path(arguments[0]), int(arguments[1]), float(arguments[2]), arguments[3]
    with listen(directory / SOCKET) as server:
        detach()  # who started this process sees its end, and can call from now on
        for signum in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
            signal.signal(signum, stop)
        try:
            keeper = Keeper(server)
            keeper.watch(process, grace_s)
            keeper.run()
        finally:
            for name in (SOCKET, LOCK):
                (directory / name).unlink(missing_ok=True)
            with suppress(OSError):  # somebody else has put a file there
                directory.rmdir()
    if files:
        clear_unclaimed(Path(files), CLEAR_S)


if __name__ == "__main__":
    main(sys.argv[1:])
