"""What every rank of a job does as a process: die with its parent, and end the whole job when it fails."""

import ctypes
import gc
import os
import signal
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from dejavu.cluster.launcher import JOB, RUN_DIR, world_rank
from dejavu.cluster.segments import claim_segments
from dejavu.errors import DejavuError, EndedByPeerError, RunLostError
from dejavu.measure.run_directory import RunDirectory

PR_SET_PDEATHSIG = 1
PR_SET_TIMERSLACK = 29
HEARSAY_S = 0.3  # that a rank leaves to those that know why the job ends: who is first says it
FAULT_TOLERANCE = "OMPI_MCA_mpi_ft_enable"  # what `mpirun --with-ft ulfm` tells the ranks


@dataclass(frozen=True, slots=True)
class JobResult:
    """Say how a job ended: `error` is what the user reads, `rank` who wrote it (-1: no rank did)."""

    outcome: Literal["ok", "error"]
    exit_code: int = 0
    error: str | None = None
    rank: int = -1

    @property
    def ok(self) -> bool:
        """Tell whether the job did what was asked."""
        return self.outcome == "ok"


def read_result(directory: RunDirectory) -> JobResult | None:
    """Read how a job ended, None while it has not said so."""
    result = directory.read_result()
    return JobResult(**result) if result else None


def record(result: JobResult) -> bool:
    """Write the result where the job has a run directory; give False if another rank has written one before."""
    if not has_run_directory():
        return True
    directory = RunDirectory(Path(os.environ[RUN_DIR]))
    return directory.write_result(result.outcome, result.exit_code, result.error, result.rank)


def has_run_directory() -> bool:
    """Tell whether the job has a run directory, and this host sees it: hosts need not share one."""
    path = os.environ.get(RUN_DIR, "")
    return path != "" and Path(path).is_dir()


def set_parent_death_signal(signum: int) -> None:
    """Ask Linux to send this process `signum` when its parent's forking thread ends; elsewhere do nothing."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signum, 0, 0, 0)


def sleep_precisely() -> None:
    """Have Linux end this thread's short sleeps within a microsecond, not within fifty."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(PR_SET_TIMERSLACK, 1000, 0, 0, 0)


def die_with_parent() -> None:
    """Have this rank killed when the mpirun daemon that started it dies, however it dies."""
    parent = os.getppid()
    set_parent_death_signal(signal.SIGKILL)
    if os.getppid() != parent:
        os.kill(os.getpid(), signal.SIGKILL)


@contextmanager
def importing() -> Iterator[None]:
    """Import large libraries within: nobody looks for garbage among what they make, meanwhile, later, or at the end.

    Importing torch and ending takes half the processor time so: it makes objects by the hundred thousand, which stay.
    """
    gc.disable()
    try:
        yield
    finally:
        gc.freeze()
        gc.enable()


def describe(error: BaseException, rank: int) -> JobResult:
    """Turn an exception of a rank into the result of the job."""
    if isinstance(error, DejavuError):
        return JobResult("error", error.exit_code, str(error), rank)
    first_line = (str(error).splitlines() or [""])[0]
    text = f"rank {rank} failed: {type(error).__name__}" + (f": {first_line}" if first_line else "")
    return JobResult("error", 130 if isinstance(error, KeyboardInterrupt) else 1, text, rank)


def report(error: BaseException, result: JobResult, *, first: bool, supervised: bool) -> None:
    """Write to stderr what this rank knows: its traceback, unless it only follows from another rank's failure.

    A supervisor prints the result's own line, so here it is printed without one.
    """
    lines = []
    if first and not isinstance(error, (DejavuError, KeyboardInterrupt)):
        text = "".join(traceback.format_exception(error))
        lines = [f"rank {result.rank}: {line}" for line in text.rstrip().splitlines()]
    elif not first:
        lines = [f"rank {result.rank}: {type(error).__name__}: {error} (after another rank had failed)"]
    if first and not supervised:
        lines.append(f"error: {result.error}")
    sys.stderr.write("".join(f"{line}\n" for line in lines))
    sys.stderr.flush()


def fail(error: BaseException) -> int:
    """Report an exception, record it as the job's result, end all ranks; give the exit code where MPI is not up."""
    exit_code = refuse(error)
    abort(exit_code)
    return exit_code


def refuse(error: BaseException) -> int:
    """Report an exception and record it as the job's result, where all ranks then end in good order."""
    result = describe(error, world_rank(os.environ) or 0)
    if isinstance(error, RunLostError) and JOB in os.environ:
        if result.rank == 0:
            sys.stderr.write(f"{error}\n")  # the supervisor says that it starts the run again
        return result.exit_code
    if isinstance(error, EndedByPeerError):
        time.sleep(HEARSAY_S)
    first = record(result)
    report(error, result, first=first, supervised=JOB in os.environ and has_run_directory())
    sys.stdout.flush()
    return result.exit_code


def abort(exit_code: int) -> None:
    """End every rank of the job at once, if this process takes part in one through MPI.

    Under ULFM, Open MPI's abort hangs with four ranks or more. So this rank revokes all that the others wait at, and
    leaves; each of them fails on it, and does the same. It leaves by a signal, since nobody sees that a rank has gone
    with an exit code, and who looks for survivors meanwhile would wait for it.
    """
    if "mpi4py.MPI" not in sys.modules:
        return
    from mpi4py import MPI

    if not MPI.Is_initialized() or MPI.Is_finalized():
        return
    if os.environ.get(FAULT_TOLERANCE) == "1":
        from dejavu.transport.mpi import revoke_all, survivors_are_sought

        revoke_all()
        if survivors_are_sought():
            os.kill(os.getpid(), signal.SIGKILL)
        os._exit(exit_code)
    MPI.COMM_WORLD.Abort(exit_code)


def guarded(body: Callable[[], int]) -> int:
    """Run the main program of a rank and give its exit code; any exception, in any thread, ends the whole job.

    The run directory is taken from DEJAVU_RUN_DIR at the time of a failure.
    """
    die_with_parent()
    claim_segments()
    threading.excepthook = lambda details: fail_in_thread(details.exc_value)
    try:
        return body()
    except BaseException as error:
        if isinstance(error, SystemExit):
            raise
        return fail(error)


def fail_in_thread(error: BaseException | None) -> None:
    """End the job, and this process, for an exception that would end a thread only."""
    if error is not None and not isinstance(error, SystemExit):
        os._exit(fail(error))
