"""A rank that dies while others make a communicator does not take them along."""

from tests.transport.test_mpi_carrier import mpirun

PROGRAM = """
import os, signal, time
from mpi4py import MPI
from dejavu.transport.half_made import COLLECTIVES_OFFSET, guard_half_made, word_at

assert guard_half_made()
world, half = MPI.COMM_WORLD, MPI.COMM_WORLD.Dup()
world.Barrier()
place = word_at(MPI._handleof(half) + COLLECTIVES_OFFSET)
kept, place.value = place.value, 0  # as a communicator is that is being made
if world.rank == 2:
    os.kill(os.getpid(), signal.SIGKILL)
deadline = time.monotonic() + 20
while world.Get_failed().Get_size() == 0 and time.monotonic() < deadline:
    try:
        world.Iprobe()
    except MPI.Exception:
        break
    time.sleep(0.001)
assert place.value == 0
place.value = kept
rest = world.Shrink()
rest.Agree(1)
print(f"rank {world.rank} of {rest.size} goes on", flush=True)
rest.Agree(1)
os._exit(0)
"""


def test_death_while_a_communicator_is_made_is_survived(tmp_path):
    output = mpirun(3, PROGRAM, tmp_path)
    assert "rank 0 of 2 goes on" in output, output
    assert "rank 1 of 2 goes on" in output, output
    assert "Segmentation fault" not in output
