"""Wait without spinning: an idle rank has to leave its core to the ranks that compute."""

import os
import select
import socket
import time
from collections.abc import Callable
from contextlib import suppress

from dejavu.errors import DeadlineError

SHORTEST_S = 50e-6
LONGEST_S = 20e-3

Door = tuple[str, int]  # an address, and a port


class Doorbell:
    """Sleep until another rank rings, or for a while.

    MPI has no wait that sleeps. So each rank owns a datagram socket in the abstract namespace (it leaves no file and
    vanishes with the process), and who sends a message rings it afterwards. A ring only says "look again": one that
    is lost, or forged, costs a look. Ranks on other hosts ring by UDP at the `door`, if there is one. Such a ring can
    be ahead of its message, so that sleeps are short again after it.
    """

    def __init__(self, job: str, rank: int, address: str | None = None) -> None:
        """Make rank's doorbell; with an `address` of this host other ones can ring it, too."""
        self.job = job
        self.has_alarm = False  # somebody rang because a process has died
        self.socket = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        self.socket.setblocking(False)
        self.socket.bind(self.address(rank))
        self.far = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
        self.far.setblocking(False)
        self.door: Door | None = None
        if address:
            self.far.bind((address, 0))
            self.door = self.far.getsockname()

    def address(self, rank: int) -> str:
        """Give the name of a rank's socket."""
        return f"\0dejavu-{self.job}-{rank}"

    def ring(self, rank: int, *, alarm: bool = False) -> None:
        """Wake a rank of this host; one that has enough rings waiting, or is gone, needs none."""
        try:
            self.socket.sendto(b"!" if alarm else b"", self.address(rank))
        except (BlockingIOError, ConnectionRefusedError):
            return

    def ring_far(self, door: Door) -> None:
        """Wake a rank of another host; where no datagram can be sent, it looks by itself."""
        with suppress(OSError):
            self.far.sendto(b"", door)

    def sleep(self, seconds: float | None) -> bool:
        """Sleep until a ring, at most so long, None without a limit; tell whether a rank of another host has rung."""
        ready = select.select([self.socket, self.far], [], [], seconds)[0]
        if ready:
            self.clear()
        return self.far in ready

    def clear(self) -> None:
        """Take all rings that have come."""
        with suppress(BlockingIOError):
            while True:
                self.has_alarm |= bool(self.socket.recv(1))
        with suppress(BlockingIOError):
            while True:
                self.far.recv(1)

    def close(self) -> None:
        """Give up the sockets."""
        self.socket.close()
        self.far.close()


class Patience:
    """Pause between looks at something, an eighth of the time waited so far, until a deadline.

    `deadline_s` None waits for ever: for work that may not come. `sleep` is a Doorbell's, or time.sleep; where it says
    that something is on its way, pauses begin anew.
    """

    __slots__ = ("deadline_s", "since", "sleep", "started", "what")

    def __init__(self, what: str, deadline_s: float | None, sleep: Callable[[float], bool | None] = time.sleep) -> None:
        self.what = what
        self.deadline_s = deadline_s
        self.sleep = sleep
        self.started = self.since = time.monotonic()

    def pause(self, at_most_s: float = LONGEST_S) -> None:
        """Sleep once; raise DeadlineError when the deadline has passed."""
        now = time.monotonic()
        waited = now - self.started
        if self.deadline_s is not None and waited > self.deadline_s:
            raise DeadlineError(f"waited {waited:.1f} s for {self.what}: a rank hangs, or --stall-timeout is too short")
        if self.sleep(min(at_most_s, LONGEST_S, max(SHORTEST_S, (now - self.since) / 8))):
            self.since = time.monotonic()


def new_job_name() -> str:
    """Make an unguessable name for the sockets of one job."""
    return os.urandom(12).hex()


def rest(quiet_s: float, shortest_s: float, longest_s: float) -> float:
    """Give how long to sleep in a selector, the longer since it was quiet; what is too short for it is slept here."""
    pause_s = min(longest_s, max(shortest_s, quiet_s / 8))
    if pause_s >= 1e-3:
        return pause_s
    time.sleep(pause_s)
    return 0.0
