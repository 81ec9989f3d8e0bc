"""Be a rank of a job that loses three processes and lets two join: DIRECTORY.

Of three ranks the last is killed, then who joined in its place, then rank 0, which who joined after that watches.
mpirun stands still from each kill until all survivors have agreed on who is left, so that it cannot have told them.
Each survivor of each loss writes a file: after how many milliseconds it knew, and whether by the lock.
"""

import json
import os
import signal
import sys
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from mpi4py import MPI

from dejavu.cluster import recruit, start
from dejavu.cluster.injection import IncidentLog
from dejavu.cluster.launcher import RUN_DIR
from dejavu.cluster.muster import Loss, Recruiting
from dejavu.cluster.process import guarded
from dejavu.cluster.watchdog import Watchdog
from dejavu.errors import PeerLostError
from dejavu.transport.mpi import Channel
from dejavu.transport.recruit import Recruit

VICTIMS = (2, 2, 0)  # by rank
SIZE = 3
MPIRUN = int(os.environ["PMIX_NAMESPACE"].partition("@")[0].rpartition("-")[2])
DEADLINE_S = 60.0
HANG_S = 10.0
MEMORY_BYTES = 200 << 20


class Ranks:
    """Stand for the topology of a run of three workers."""

    first_spare = SIZE

    def name(self, rank: int) -> str:
        """Name a rank."""
        return f"place {rank}"


def live(channel: Channel, setup: Any, num_lost: int) -> None:
    """Go through the losses that are still to come."""
    directory = Path(os.environ[RUN_DIR])

    def begin(program, node):
        return Recruit((sys.executable, __file__, str(directory), program[-1]), node)

    recruiting = Recruiting(channel, setup, str(directory), begin)
    watchdog = Watchdog(channel, HANG_S, IncidentLog(directory))
    watchdog.start()
    while num_lost < len(VICTIMS):
        if num_lost:
            recruiting.muster([Loss(0, 0, 0.0)] * num_lost)
        lose(channel, num_lost, directory)
        num_lost += 1
    watchdog.stop()


def lose(channel: Channel, number: int, directory: Path) -> None:
    """Lose one process, and agree on who is left."""
    victim, note = VICTIMS[number], directory / f"killed-{number}"
    if channel.rank == victim:
        for rank in channel.near:
            channel.receive(rank, DEADLINE_S)
        memory = bytearray(MEMORY_BYTES)  # to be taken apart before its sockets are closed
        os.kill(MPIRUN, signal.SIGSTOP)
        memory[::4096] = b"x" * len(memory[::4096])
        note.write_text(str(time.monotonic()))
        os.kill(os.getpid(), signal.SIGKILL)
    channel.send(victim, "ready")
    try:
        channel.receive(victim, DEADLINE_S)
    except PeerLostError as error:
        by_lock = not isinstance(error.__cause__, MPI.Exception)
        told = {"ms": 1e3 * (time.monotonic() - float(note.read_text())), "by_lock": by_lock}
    assert channel.recover(SIZE) == (victim,)
    (directory / f"told-{number}-{channel.process}").write_text(json.dumps(told))
    os.kill(MPIRUN, signal.SIGCONT)


def main() -> int:
    """Be one of the first three ranks."""
    os.environ[RUN_DIR] = sys.argv[1]
    config = SimpleNamespace(stall_timeout=DEADLINE_S)
    setup = SimpleNamespace(topology=Ranks(), config=config, num_devices=0)
    channel = Channel(MPI.COMM_WORLD, DEADLINE_S)
    channel.is_recoverable = True
    live(channel, setup, 0)
    channel.agree_to_leave()
    os.kill(MPIRUN, signal.SIGTERM)  # it would wait for ever for those that joined
    os._exit(0)


def join() -> int:
    """Be a process that joins."""
    os.environ[RUN_DIR] = sys.argv.pop(1)
    start.be_spare = lambda channel, setup, lost: live(channel, setup, len(lost))
    return recruit.main()


if __name__ == "__main__":
    has_parent = not os.environ["PMIX_NAMESPACE"].endswith("@1")
    sys.exit(guarded(join if has_parent else main))
