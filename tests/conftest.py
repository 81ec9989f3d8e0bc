"""What holds for all tests: MPI that an import started outside mpirun leaves no shared memory behind."""

import os
import re
from pathlib import Path


def pytest_sessionfinish():
    """Remove this process's segment, since nobody else does where there is no mpirun, not even `MPI_Finalize`."""
    if "OMPI_COMM_WORLD_SIZE" not in os.environ:
        for path in set(re.findall(r"/dev/shm/sm_segment\S+", Path("/proc/self/maps").read_text())):
            Path(path).unlink(missing_ok=True)
