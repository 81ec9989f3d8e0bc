"""Clear what a killed job leaves on this host: processes, shared-memory files, mpirun's session directory."""

import os
import shutil
import signal
import tempfile
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

from dejavu.cluster.launcher import JOB, RANK_VARIABLES

SHARED_MEMORY = Path("/dev/shm")  # noqa: S108
SEGMENTS = "sm_segment.*"  # what Open MPI names its ranks' shared memory
NEW_S = 1.0
GONE = (FileNotFoundError, ProcessLookupError, PermissionError)


def processes() -> Iterator[Path]:
    """List this host's processes as directories of /proc; none where there is no /proc."""
    return (path for path in Path("/proc").glob("[0-9]*") if path.name != str(os.getpid()))


def job_processes(job: str) -> list[int]:
    """Find the processes of this user that belong to a job, by the mark in their environment."""
    mark = f"{JOB}={job}".encode()
    found = []
    for path in processes():
        with suppress(*GONE):
            if mark in (path / "environ").read_bytes().split(b"\0"):
                found.append(int(path.name))
    return found


def child_ranks(mpirun_pid: int) -> set[int]:
    """Find the ranks that an mpirun has started on its own host, by its children; zombies among them."""
    found = set()
    for path in Path(f"/proc/{mpirun_pid}/task").glob("*/children"):
        with suppress(*GONE):
            found |= {int(child) for child in path.read_text().split() if is_rank(int(child))}
    return found


def is_rank(process: int) -> bool:
    """Tell whether mpirun has started a process as a rank."""
    with suppress(*GONE):
        entries = Path(f"/proc/{process}/environ").read_bytes().split(b"\0")
        return not {entry.partition(b"=")[0].decode() for entry in entries}.isdisjoint(RANK_VARIABLES)
    return False


def kill_job(job: str, timeout_s: float = 2.0) -> int:
    """Kill the processes of a job, wait until they are gone, and give their number."""
    found = job_processes(job)
    for pid in found:
        with suppress(*GONE):
            os.kill(pid, signal.SIGKILL)
    deadline = time.monotonic() + timeout_s
    while found and job_processes(job) and time.monotonic() < deadline:
        time.sleep(0.02)
    return len(found)


def mapped_segments() -> set[str]:
    """Name the shared-memory files of Open MPI that a running process has mapped."""
    mapped = set()
    for path in processes():
        with suppress(*GONE):
            lines = (path / "maps").read_text().splitlines()
            mapped |= {line.split()[5] for line in lines if f"{SHARED_MEMORY}/sm_segment." in line}
    return mapped


def remove_session_files(mpirun_pid: int, started: float) -> None:
    """Remove what an mpirun that was killed, or ranks that crashed, left since `started` (seconds of the epoch).

    That is mpirun's session directory, and shared-memory files of this user that nobody maps. The newest are left
    alone: another job may be about to map them.
    """
    shutil.rmtree(Path(tempfile.gettempdir(), f"ompi.{mpirun_pid}"), ignore_errors=True)
    left = left_segments(started)
    if any(is_new(path) for path in left):
        time.sleep(NEW_S)
        left = left_segments(started)
    for path in left:
        if not is_new(path):
            path.unlink(missing_ok=True)


def left_segments(started: float) -> list[Path]:
    """List Open MPI's shared-memory files of this user that were made since `started` and that nobody maps."""
    candidates = [path for path in SHARED_MEMORY.glob(SEGMENTS) if is_made_since(path, started)]
    mapped = mapped_segments() if candidates else set()
    return [path for path in candidates if str(path) not in mapped]


def is_made_since(path: Path, started: float) -> bool:
    """Tell whether a file is this user's, and was made after `started` (seconds of the epoch)."""
    try:
        found = path.stat()
    except FileNotFoundError:
        return False
    return found.st_uid == os.getuid() and started <= found.st_mtime


def is_new(path: Path) -> bool:
    """Tell whether a file was made just now, by a process that may be about to map it."""
    return is_made_since(path, time.time() - NEW_S)
