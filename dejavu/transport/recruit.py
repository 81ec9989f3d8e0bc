"""Start a further process beside a run: by MPI, in a thread, so that nobody waits for it and nobody's hang is ours."""

import os
import pickle
import socket
import sys
import threading
import time
from collections.abc import Sequence
from contextlib import suppress
from signal import SIGKILL
from typing import Any, NoReturn

from mpi4py import MPI

from dejavu.errors import PeerLostError
from dejavu.transport.crew import Newcomer
from dejavu.transport.lifeline import is_alive
from dejavu.transport.obituary import own_name

Intercomm = MPI.Intercomm
LOOK_EVERY_S = 0.02
START_S = 60.0  # that a process may take until it is ready
HELLO, READY, SUMMONS = 1, 2, 3


class Recruit:
    """Be a process on its way: started, then known by its pid, then ready to join.

    Only this process talks to it. One that dies on its way is given up: `MPI_Comm_spawn` never returns then, which is
    why it has a thread of its own.
    """

    def __init__(self, program: Sequence[str], node: str = "") -> None:
        """Begin to start a program on this host, which mpirun has to be told as `node` where there are several.

        On another host than the caller's, mpirun 5.0.11 starts one process, and crashes at the second.
        """
        self.started_s = time.monotonic()
        self.comm: MPI.Intercomm | None = None
        self.newcomer: Newcomer | None = None
        self.is_ready = False
        self.failure: str | None = None
        self.thread = threading.Thread(target=self.spawn, args=(program, node), name="recruit", daemon=True)
        self.thread.start()

    def spawn(self, program: Sequence[str], node: str) -> None:
        """Start the process."""
        try:
            info = MPI.Info.Create({"host": node}) if node else MPI.INFO_NULL
            self.comm = MPI.COMM_SELF.Spawn(program[0], list(program[1:]), 1, info)
        except MPI.Exception as error:
            self.failure = str(error)

    def look(self) -> bool:
        """Tell whether it is ready to join; raise PeerLostError if it will never be."""
        if self.failure:
            raise PeerLostError(f"a new spare could not be started ({self.failure})")
        if self.newcomer and not is_alive(self.newcomer.pid):
            raise PeerLostError("a new spare died before it had joined: look for its last words above")
        if not self.is_ready and time.monotonic() - self.started_s > START_S:
            raise PeerLostError(f"a new spare was not ready after {START_S:.0f} s")
        if self.comm and not self.newcomer:
            self.newcomer = take(self.comm, HELLO)
        if self.comm and self.newcomer and not self.is_ready:
            self.is_ready = take(self.comm, READY) is not None
        return self.is_ready

    def summon(self, message: object) -> MPI.Intercomm:
        """Tell it what it has to know, and to join; give what leads to it."""
        assert self.comm
        data = pickle.dumps(message)
        try:
            self.comm.Send([data, MPI.BYTE], 0, SUMMONS)
        except MPI.Exception as error:
            raise PeerLostError(f"a new spare died before it had joined ({error})") from error
        return self.comm

    def dismiss(self, patience_s: float = 5.0) -> None:
        """End it."""
        deadline = time.monotonic() + patience_s
        with suppress(PeerLostError):
            while not self.newcomer and time.monotonic() < deadline:
                self.look()
                time.sleep(LOOK_EVERY_S)
        if self.newcomer:
            with suppress(ProcessLookupError):
                os.kill(self.newcomer.pid, SIGKILL)


def report_for_duty(lifeline: int) -> MPI.Intercomm:
    """Tell who has started this process that it is there, by its descriptor `lifeline`; give what leads to them."""
    parent = MPI.Comm.Get_parent()
    give(parent, HELLO, Newcomer(socket.gethostname(), os.getpid(), (lifeline, own_name())))
    return parent


def await_summons(parent: MPI.Intercomm) -> Any:
    """Say that this process is ready, and wait to be called; PeerLostError where who has started it is no more."""
    give(parent, READY, True)
    while (message := take(parent, SUMMONS)) is None:
        time.sleep(LOOK_EVERY_S)
    return message


def leave() -> NoReturn:
    """End this process, as one that was killed: mpirun ends the whole job where a process that joined just exits."""
    sys.stdout.flush()
    sys.stderr.flush()
    os.kill(os.getpid(), SIGKILL)
    raise AssertionError("SIGKILL cannot be held off")


def give(comm: MPI.Intercomm, tag: int, message: object) -> None:
    """Send an object to the one process at the other end."""
    try:
        comm.Send([pickle.dumps(message), MPI.BYTE], 0, tag)
    except MPI.Exception as error:
        raise PeerLostError(f"who started this process has died ({error})") from error


def take(comm: MPI.Intercomm, tag: int) -> Any:
    """Give an object from the other end, None where none has come."""
    status = MPI.Status()
    try:
        message = comm.Improbe(0, tag, status)
        if message is None:
            return None
        data = bytearray(status.Get_count(MPI.BYTE))
        message.Recv([data, MPI.BYTE])
    except MPI.Exception as error:
        raise PeerLostError(f"the process at the other end has died ({error})") from error
    return pickle.loads(data)  # noqa: S301 (the processes of one job trust each other)
