"""Clear what a killed job leaves on this host: processes, shared-memory files, mpirun's session directory."""

import os
import shutil
import signal
import tempfile
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

from dejavu.cluster.launcher import JOB

SHARED_MEMORY = Path("/dev/shm")  # noqa: S108
SEGMENTS = "sm_segment.*"  # what Open MPI names its ranks' shared memory
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
    """Remove what an mpirun that was killed, and its ranks, left since `started` (seconds of the epoch).

    That is its session directory, and shared-memory files that nobody maps. An mpirun that ended by itself has
    removed its directory, and then there is nothing to look for.
    """
    session = Path(tempfile.gettempdir(), f"ompi.{mpirun_pid}")
    if not session.is_dir():
        return
    shutil.rmtree(session, ignore_errors=True)
    mapped = mapped_segments()
    for path in SHARED_MEMORY.glob(SEGMENTS):
        with suppress(*GONE):
            found = path.stat()
            if found.st_uid == os.getuid() and found.st_mtime >= started and str(path) not in mapped:
                path.unlink()
