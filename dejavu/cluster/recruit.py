"""Be a process that joins a run which has used up its spares, started by MPI.

`python -m dejavu.cluster.recruit PROCESS` names who has started it, on the same host.
"""

import os
import signal
import sys
import threading
from pathlib import Path

from dejavu.cluster.launcher import RUN_DIR, forwarded
from dejavu.cluster.process import guarded, importing

LOOK_EVERY_S = 0.25


def follow(process: int, joined: threading.Event) -> None:
    """End this process with the one that started it, unless it has joined: MPI may wait for that one for ever."""
    while not joined.wait(LOOK_EVERY_S):
        if not Path("/proc", str(process)).exists():
            os.kill(os.getpid(), signal.SIGKILL)


def adopt_environment(process: int) -> None:
    """Take from the process that started this one what mpirun gives to a job's first processes only."""
    try:
        words = Path("/proc", str(process), "environ").read_text().split("\0")
    except (FileNotFoundError, ProcessLookupError):
        os.kill(os.getpid(), signal.SIGKILL)  # nobody waits for this process any more
    theirs = dict(word.split("=", 1) for word in words if "=" in word)
    os.environ.update({name: theirs[name] for name in forwarded(theirs)})


def main() -> int:
    """Get ready, wait until the run needs this process, and be one of its spares from then on."""
    process, joined = int(sys.argv[1]), threading.Event()
    threading.Thread(target=follow, args=(process, joined), name="follow", daemon=True).start()

    import mpi4py

    mpi4py.rc.finalize = False  # see `leave`

    from dejavu.errors import PeerLostError
    from dejavu.transport.lifeline import Lifeline
    from dejavu.transport.recruit import await_summons, leave, report_for_duty

    try:
        # MPI first: mpirun can crash where who has called `MPI_Comm_spawn` dies before this process has started MPI.
        lifeline = Lifeline()
        parent = report_for_duty(lifeline.fd)
        with importing():
            from dejavu.cluster.muster import JOIN_S, Summons, bounded
            from dejavu.cluster.standby import warm_up
            from dejavu.cluster.start import be_spare
            from dejavu.transport.mpi import join_crew

            warm_up()
        summons: Summons = await_summons(parent)
        os.environ[RUN_DIR] = summons.directory
        with bounded(JOIN_S, "the ranks to let this process join"):
            channel = join_crew(parent, summons.crew, lifeline, summons.setup.config.stall_timeout)
        joined.set()
    except PeerLostError:  # whoever wanted this process has died, or gives up and says so
        leave()
    be_spare(channel, summons.setup, summons.lost)
    channel.agree_to_leave()
    leave()


if __name__ == "__main__":
    adopt_environment(int(sys.argv[1]))
    sys.exit(guarded(main))
