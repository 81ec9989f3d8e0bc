"""Watch another process: tell all of its death, before mpirun knows, and end it where it hangs."""

import os
import signal
import threading
import time
from collections.abc import Collection
from contextlib import suppress

from dejavu.cluster.injection import Incident, IncidentLog
from dejavu.transport.lifeline import is_alive, process_state
from dejavu.transport.mpi import Channel

LOOK_EVERY_S = 0.25
JOIN_S = 0.03  # while a process may join, which is watched from the next look on
STOPPED = "tT"  # by a signal, or by a debugger


class Watchdog(threading.Thread):
    """Watch the next process of this host, as it watches the one after it; kill it when it stands still too long.

    One that is stopped answers nobody, and MPI takes it for alive; its death is then noticed as any other. A process
    without a neighbour on its host is watched by nobody here.
    """

    def __init__(self, channel: Channel, hang_timeout_s: float, log: IncidentLog) -> None:
        super().__init__(name="watchdog", daemon=True)
        self.channel = channel
        self.hang_timeout_s = hang_timeout_s
        self.log = log
        self.watched = -1
        self.moving_s = 0.0  # when the watched process was last seen not to be stopped
        self.dead: set[int] = set()
        self.ended = threading.Event()
        self.pause_s = min(LOOK_EVERY_S, hang_timeout_s / 4)
        channel.follow_lives()

    def run(self) -> None:
        """Wait for the next process's death, and look a few times a second."""
        while not self.ended.is_set():
            process = next_on_host(self.channel, self.dead)
            pause_s = min(self.pause_s, JOIN_S) if self.channel.membership.vacant else self.pause_s
            if process is None or not self.channel.is_followed(process):
                has_ended = False
                self.ended.wait(pause_s)
            else:
                has_ended = self.channel.await_end(process, pause_s)
            if process is None or self.ended.is_set():
                continue
            if has_ended:
                self.dead.add(process)
                self.channel.raise_alarm()
            else:
                self.look(process, time.monotonic())

    def look(self, process: int, now: float) -> None:
        """See whether the watched process moves."""
        pid = self.channel.pids[process]
        if process != self.watched or process_state(pid) not in STOPPED:
            self.watched, self.moving_s = process, now
        elif now - self.moving_s >= self.hang_timeout_s:
            self.log.note(Incident(process, "hang", now, pid=pid))
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
            self.moving_s = now

    def stop(self) -> None:
        """End the watch."""
        self.ended.set()
        self.join()


def next_on_host(channel: Channel, dead: Collection[int] = ()) -> int | None:
    """Give the process after this one among those of this host, in a ring; None where it is alone.

    One that is `dead` is passed over, as it watches nobody: the survivors may wait for a stopped one behind it before
    they have agreed that it is gone. The death of one that is followed has to be told first.
    """
    places = channel.membership.places
    here = sorted(process for rank in channel.near if (process := places[rank]) is not None and process not in dead)
    behind = [process for process in here if process > channel.process]
    ring = dict.fromkeys([*behind, *here])
    return next((process for process in ring if channel.is_followed(process) or is_alive(channel.pids[process])), None)
