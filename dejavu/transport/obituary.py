"""Tell Open MPI that a process has died, which this program knows before mpirun does.

Open MPI's own detectors (its heartbeats, mpirun's word) end in one function of its library, which marks a process as
failed and tells all others. It is called here as they do. Where the library has none, its own word has to be awaited.
"""

import ctypes
from functools import cache
from typing import Any

from mpi4py import MPI

from dejavu.transport.crew import Name

NAME_OFFSET = 40  # of (job, process) in a process's record, behind what makes it an item of a list
LOST = -1


@cache
def library() -> Any:
    """Give Open MPI's library, with the functions that are called here; None where they are not as they should be."""
    found = ctypes.CDLL(MPI.__file__)
    try:
        found.ompi_proc_for_name.restype, found.ompi_proc_for_name.argtypes = ctypes.c_void_p, [ctypes.c_uint64]
        found.ompi_errhandler_proc_failed_internal.argtypes = [ctypes.c_void_p, ctypes.c_int, ctypes.c_bool]
        local = ctypes.c_void_p.in_dll(found, "ompi_proc_local_proc").value
    except (AttributeError, ValueError):
        return None
    return found if local and name_of(local)[1] == MPI.COMM_WORLD.Get_rank() else None


def own_name() -> Name | None:
    """Give the name by which others can declare this process dead; None where only MPI itself can."""
    mpi = library()
    return name_of(ctypes.c_void_p.in_dll(mpi, "ompi_proc_local_proc").value or 0) if mpi else None


def name_of(record: int) -> Name:
    """Read the name from a process's record."""
    job = ctypes.c_uint32.from_address(record + NAME_OFFSET).value
    return job, ctypes.c_uint32.from_address(record + NAME_OFFSET + 4).value


def declare_dead(name: Name) -> bool:
    """Have MPI take a process for dead, here and on all ranks; False where only MPI itself can find out.

    The process must really be dead, or dying: nobody hears it any more.
    """
    mpi = library()
    if mpi is None:
        return False
    job, rank = name
    record = mpi.ompi_proc_for_name(job | rank << 32)
    if not record or name_of(record) != name:
        return False
    mpi.ompi_errhandler_proc_failed_internal(record, LOST, True)
    return True
