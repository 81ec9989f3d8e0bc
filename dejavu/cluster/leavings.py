"""Look for what jobs have left behind on this host after their end: nothing, as it should be."""

import os
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from dejavu.cluster.leftovers import job_processes
from dejavu.cluster.segments import directory_of
from dejavu.device.keeper_line import keeper_directory

SETTLE_S = 5.0  # that the kernel may take to end what was killed
LOOK_EVERY_S = 0.25


@dataclass(frozen=True, slots=True)
class Before:
    """Hold what there was before the jobs began."""

    descriptors: int = field(default_factory=lambda: count_descriptors())
    sessions: frozenset[Path] = field(default_factory=lambda: sessions())


def count_descriptors() -> int:
    """Count the open files, sockets and pipes of this process."""
    return len(os.listdir("/proc/self/fd"))


def sessions() -> frozenset[Path]:
    """List the session directories of mpirun: one each, named by its process."""
    return frozenset(Path(tempfile.gettempdir()).glob("ompi.*[0-9]"))


def left_behind(before: Before, jobs: Sequence[str]) -> list[str]:
    """Say what these jobs, which have ended, have left: processes, memory, sockets, files, descriptors."""
    deadline = time.monotonic() + SETTLE_S
    while (found := list(leavings(before, jobs))) and time.monotonic() < deadline:
        time.sleep(LOOK_EVERY_S)
    return found


def leavings(before: Before, jobs: Sequence[str]) -> Iterator[str]:
    """Say what there is now."""
    for job in jobs:
        yield from (f"process {pid}" for pid in job_processes(job))
        if (directory := keeper_directory(job)).exists():
            yield f"keeper's directory {directory}"
        if (segments := directory_of(job)).exists():
            yield f"shared memory {segments}"
    yield from (f"session directory {path}" for path in sessions() - before.sessions if not is_running(path))
    more = count_descriptors() - before.descriptors
    if more > 0:
        yield f"{more} open descriptors"


def is_running(session: Path) -> bool:
    """Tell whether the process that a session directory is named by is there."""
    return Path("/proc", session.suffix[1:]).exists()
