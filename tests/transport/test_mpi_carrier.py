"""The MPI carrier beyond the conformance suite: more than 2 GiB in one transfer, and MPI without threads."""

import os
import subprocess
import sys
from pathlib import Path

HUGE = """
import numpy as np
from mpi4py import MPI
from dejavu.device import make_pieces, open_device
from dejavu.transport.mpi_carrier import CHUNK_BYTES, MpiCarrier

comm, device = MPI.COMM_WORLD, open_device("cpu")
count = (2 << 30) // CHUNK_BYTES + 1  # chunks; every one of them comes from, and goes to, the same little memory
starts = np.arange(count) % 5 if comm.rank == 0 else np.zeros(count, dtype=int)
pieces = make_pieces(starts, np.arange(count) * CHUNK_BYTES, CHUNK_BYTES)
assert pieces.total_bytes > 2**31
with MpiCarrier(device, comm) as carrier, device.allocate(CHUNK_BYTES + 5) as memory:
    pattern = np.resize(np.random.default_rng(1).integers(0, 256, 100_003, dtype=np.uint8), CHUNK_BYTES + 5)
    view = memory.tensor().numpy()
    view[:] = pattern if comm.rank == 0 else 0
    call = carrier.send if comm.rank == 0 else carrier.receive
    transfer = call(1 - comm.rank, 1, memory, pieces, stream=device.compute_stream)
    transfer.wait(60)
    assert transfer.moved_bytes == pieces.total_bytes
    last = (count - 1) % 5
    assert comm.rank == 0 or np.array_equal(view[:CHUNK_BYTES], pattern[last : last + CHUNK_BYTES])
    del view
print(f"rank {comm.rank} moved {pieces.total_bytes}")
"""

WITHOUT_THREADS = """
import mpi4py
mpi4py.rc.thread_level = "funneled"
from mpi4py import MPI
from dejavu.device import open_device
from dejavu.transport.carrier import UnavailableError
from dejavu.transport.mpi_carrier import MpiCarrier
try:
    MpiCarrier(open_device("cpu"), MPI.COMM_WORLD)
except UnavailableError as error:
    print("refused:", error)
"""


def mpirun(size, program, directory):
    environment = {k: v for k, v in os.environ.items() if not k.startswith(("OMPI_", "PMIX_", "PRTE_"))}
    environment |= {"OMPI_ALLOW_RUN_AS_ROOT": "1", "OMPI_ALLOW_RUN_AS_ROOT_CONFIRM": "1", "TMPDIR": str(directory)}
    environment |= {f"OMPI_MCA_{part}_sm_backing_directory": str(directory) for part in ("btl", "osc")}
    environment |= {"PATH": f"{Path(sys.executable).parent}:{environment['PATH']}", "OMP_NUM_THREADS": "1"}
    command = ["mpirun", "-n", str(size), "--oversubscribe", "--with-ft", "ulfm", "--bind-to", "none"]
    command += ["--mca", "coll", "^han", sys.executable, "-c", program]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=100)
    return done.stdout + done.stderr


def test_more_than_two_gib_in_one_transfer(tmp_path):
    output = mpirun(2, HUGE, tmp_path)
    for rank in (0, 1):
        assert f"rank {rank} moved 2151677952" in output, output


def test_mpi_without_threads_is_refused(tmp_path):
    output = mpirun(1, WITHOUT_THREADS, tmp_path)
    assert "refused: MPI runs without the MPI_THREAD_MULTIPLE that carriers need" in output, output
