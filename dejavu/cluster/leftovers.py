"""Clear what a killed job leaves on this host: processes, and mpirun's session directory."""

import os
import shutil
import signal
import tempfile
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

from dejavu.cluster.launcher import JOB, RANK_VARIABLES

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


def remove_session_files(mpirun_pid: int) -> None:
    """Remove what an mpirun that was killed left: its session directory."""
    shutil.rmtree(Path(tempfile.gettempdir(), f"ompi.{mpirun_pid}"), ignore_errors=True)
