"""Let further processes join a run: started beside it when spares are used up, and called in between two epochs."""

import os
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import NamedTuple

from dejavu.cluster.process import fail_in_thread
from dejavu.engine.setup import EngineSetup
from dejavu.errors import PeerLostError, RunLostError
from dejavu.topology import CONTROLLER
from dejavu.transport.crew import Crew, Newcomer
from dejavu.transport.membership import starter
from dejavu.transport.mpi import Channel
from dejavu.transport.recruit import LOOK_EVERY_S, Intercomm, Recruit

LOOK_ASIDE_S = 0.1
WAIT_S = 120.0  # for a process to join while requests are held; then the run is started again
SAY_EVERY_S = 10.0
JOIN_S = 20.0  # for the calls by which all let one join; MPI may wait for ever for one that dies in just these


class Loss(NamedTuple):
    """Say which rank was lost, which process played it, and when that was seen, on the host's clock."""

    rank: int
    process: int
    detected_s: float


Lost = Sequence[Loss]


@dataclass(frozen=True, slots=True)
class Summons:
    """Leader → the process that joins: what to know of the run, and who was lost before."""

    setup: EngineSetup
    directory: str
    crew: Crew
    lost: Lost


class Recruiting:
    """Fill vacant ranks: each rank has one of these, and whoever leads starts the processes.

    The lowest rank of the host that has lost the most processes leads: on one host the controller, or where nobody
    plays it, the lowest rank that somebody does. On several hosts whoever leads while requests are served does so in a
    thread, and tells the controller.
    """

    def __init__(self, channel: Channel, setup: EngineSetup, directory: str, start: Callable[..., Recruit]) -> None:
        """Serve the run in `directory`; `start(program, node)` begins to start a process."""
        self.channel = channel
        self.setup = setup
        self.directory = directory
        self.start = start
        self.recruit: Recruit | None = None
        self.lock = threading.RLock()
        self.told_epoch = 0  # when the controller was told last that one is ready

    @property
    def leader(self) -> int:
        """Give the rank that starts processes."""
        return starter(self.channel.membership, self.channel.process_hosts)

    @property
    def node(self) -> str:
        """Give what mpirun calls this host, where it has to be told."""
        return os.environ.get("PMIX_HOSTNAME", "") if self.is_spread else ""

    @property
    def is_spread(self) -> bool:
        """Tell whether there are several hosts."""
        return len(set(self.channel.process_hosts)) > 1

    @property
    def is_short(self) -> bool:
        """Tell whether nobody plays a rank that the run cannot do without."""
        return any(rank < self.setup.topology.first_spare for rank in self.channel.membership.vacant)

    def look(self) -> Recruit | None:
        """Give a process that is ready to join a vacant rank; start one where there is none."""
        if not self.channel.membership.vacant:
            return None
        with self.lock:
            try:
                self.recruit = self.recruit or self.start(program(), self.node)
                return self.recruit if self.recruit.look() else None
            except PeerLostError as error:
                say(f"{error}: starting another one")
                self.dismiss()
                return None

    def look_aside(self) -> None:
        """Have a thread start processes on this host while the controller, on another one, serves."""
        if self.is_spread:
            threading.Thread(target=self.keep_looking, name="recruiting", daemon=True).start()

    def keep_looking(self) -> None:
        """Look a few times a second, and tell the controller once in each epoch when a process is ready."""
        while True:
            time.sleep(LOOK_ASIDE_S)
            membership = self.channel.membership
            leads = membership.vacant and CONTROLLER in membership.present and self.leader == self.channel.rank
            if leads and self.channel.rank != CONTROLLER and self.look() and self.told_epoch < membership.epoch:
                self.told_epoch = membership.epoch
                self.channel.notify(CONTROLLER)

    def is_called_for(self) -> bool:
        """Tell whether the run should pause for a process to join: one is ready, and no spare is left."""
        first = self.setup.topology.first_spare
        has_spare = any(rank >= first for rank in self.channel.membership.present)
        is_ready = self.look() is not None if self.leader == self.channel.rank else self.channel.is_notified()
        return is_ready and not has_spare

    def muster(self, lost: Lost) -> int:
        """Let all join who are ready, and wait where the run cannot go on without; give their number.

        All ranks call this together; who joins does so from then on.
        """
        count = 0
        while self.next(lost):
            count += 1
        return count

    def next(self, lost: Lost) -> bool:
        """Let one process join, if one is to; tell whether one did."""
        channel, leader = self.channel, self.leader
        if channel.rank != leader:
            self.dismiss()
            _, newcomer = channel.receive(leader)
            return newcomer is not None and self.enlist(newcomer, leader, None)
        recruit = self.wait_ready() if self.is_short else self.look()
        newcomer = recruit.newcomer if recruit else None
        for rank in channel.membership.present:
            if rank != leader:
                channel.send(rank, newcomer)
        if not (recruit and newcomer):
            return False
        try:
            crew = channel.crew.enlist(newcomer)
            parent = recruit.summon(Summons(self.setup, self.directory, crew, tuple(lost)))
            self.enlist(newcomer, leader, parent)
        except PeerLostError:
            self.dismiss()
            raise
        self.recruit = None
        say(f"a new process has joined on {newcomer.host}")
        return True

    def enlist(self, newcomer: Newcomer, leader: int, parent: Intercomm | None) -> bool:
        """Let a process join together with all other ranks."""
        with bounded(JOIN_S, "the ranks to let a new spare join"):
            self.channel.enlist(newcomer, leader, parent)
        return True

    def wait_ready(self) -> Recruit:
        """Wait until a process is ready to take a rank without which nothing goes on; say so meanwhile."""
        names = ", ".join(self.setup.topology.name(rank) for rank in self.channel.membership.vacant)
        started = time.monotonic()
        due_s = 0.0
        while not (recruit := self.look()):
            waited_s = time.monotonic() - started
            if waited_s >= due_s:
                say(f"no spare is left for {names}: requests are held until a new one has joined ({waited_s:.0f} s)")
                due_s += SAY_EVERY_S
            if waited_s > WAIT_S:
                raise RunLostError(f"no new spare has joined within {WAIT_S:.0f} s")
            message = self.channel.poll()
            assert message is None, message
            time.sleep(LOOK_EVERY_S)
        return recruit

    def dismiss(self) -> None:
        """End a process that has not joined, if there is one."""
        with self.lock:
            if self.recruit:
                self.recruit.dismiss()
                self.recruit = None


def program() -> tuple[str, ...]:
    """Give the command of a process that joins; mpirun hands its environment over on its own host only."""
    path = ("env", f"PYTHONPATH={os.environ['PYTHONPATH']}") if "PYTHONPATH" in os.environ else ()
    return (*path, sys.executable, "-m", "dejavu.cluster.recruit", str(os.getpid()))


def say(line: str) -> None:
    """Tell the user at once."""
    sys.stdout.write(line + "\n")
    sys.stdout.flush()


@contextmanager
def bounded(seconds: float, what: str) -> Iterator[None]:
    """End the job, to be started again, where something that cannot be interrupted takes longer."""
    error = RunLostError(f"waited {seconds:.0f} s for {what}: a rank hangs")
    timer = threading.Timer(seconds, fail_in_thread, (error,))
    timer.daemon = True
    timer.start()
    try:
        yield
    finally:
        timer.cancel()
