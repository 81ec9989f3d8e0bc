"""Have Open MPI put a job's shared-memory files into one directory, so that what a killed job leaves is known and goes.

By default they lie in /dev/shm under names that do not tell whose they are, and stay where a rank is killed. Each rank
names the directory by itself before MPI starts, one that joins later too, and claims it for life.
"""

import os
from collections.abc import Mapping
from hashlib import blake2b
from pathlib import Path

from dejavu.cluster.launcher import JOB
from dejavu.device.claims import claim, clear_unclaimed

SHARED_MEMORY = Path("/dev/shm")  # noqa: S108
PREFIX = "dejavu-mpi-"
NAMESPACE = "PMIX_NAMESPACE"  # prterun-HOST-PROCESS@NUMBER: what mpirun calls what it has started; @2 has joined @1
PARAMETERS = tuple(f"OMPI_MCA_{name}_backing_directory" for name in ("btl_sm", "osc_sm", "osc_rdma"))


def segment_directory(environment: Mapping[str, str]) -> Path | None:
    """Give where the shared-memory files of a rank's job lie, by its environment.

    None outside mpirun, where there is no /dev/shm, and where the user has said where.
    """
    name = environment.get(JOB) or environment.get(NAMESPACE, "").partition("@")[0]
    path = directory_of(name)
    given = {environment[parameter] for parameter in PARAMETERS if parameter in environment}
    return path if name and SHARED_MEMORY.is_dir() and given <= {str(path)} else None


def directory_of(name: str) -> Path:
    """Give where the files of a job lie."""
    return SHARED_MEMORY / f"{PREFIX}{os.getuid()}-{blake2b(name.encode(), digest_size=12).hexdigest()}"


def claim_segments() -> None:
    """Have MPI, which must not have started yet, use this job's directory, and remove those of jobs that are gone."""
    if path := segment_directory(os.environ):
        claim(path)
        os.environ.update(dict.fromkeys(PARAMETERS, str(path)))
        clear_segments()


def clear_segments(job: str = "", timeout_s: float = 0.0) -> None:
    """Remove the directories of jobs that are gone; that of `job` as soon as it is, within `timeout_s`."""
    if job:
        clear_unclaimed(directory_of(job), timeout_s)
    for path in SHARED_MEMORY.glob(f"{PREFIX}{os.getuid()}-*"):
        clear_unclaimed(path)
