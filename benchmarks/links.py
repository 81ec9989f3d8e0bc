"""What the ranks of a benchmark share, and the carriers that they open together."""

import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np

from dejavu.device import Device, num_cuda_devices, open_device
from dejavu.errors import DejavuError
from dejavu.transport.carrier import Carrier, Gathering
from dejavu.transport.registry import open_carrier

from .timing import Gate

IDLE_LOOK_S = 2e-3
IDLE_TAG = 77


class RankWorld:
    """Be one of the ranks that measure together: its device, its gate, and what it says to the others."""

    def __init__(self, device: Device, comm: Any) -> None:
        self.device = device
        self.comm = comm
        self.rank: int = comm.rank
        self.gate = Gate(device)

    def share(self, *values: float) -> list[list[float]]:
        """Give every rank's values to every rank; also a barrier."""
        mine = np.array(values or [0.0])
        everyone = np.empty((self.comm.size, len(mine)))
        self.comm.Allgather(mine, everyone)
        rows: list[list[float]] = everyone.tolist()
        return rows

    def alone(self) -> "RankWorld":
        """Give this rank as a world of its own: for stores."""
        from mpi4py import MPI

        return RankWorld(self.device, MPI.COMM_SELF)

    def close(self) -> None:
        """Free the gate."""
        self.gate.close()


def rest_until_done(world: RankWorld) -> None:
    """Sleep until rank 0 says that it is done: a barrier would burn a core that rank 0 needs."""
    while not world.comm.Iprobe(source=0, tag=IDLE_TAG):
        time.sleep(IDLE_LOOK_S)
    world.comm.recv(source=0, tag=IDLE_TAG)


def say_done(world: RankWorld) -> None:
    """Wake the other ranks."""
    for rank in range(1, world.comm.size):
        world.comm.send(None, dest=rank, tag=IDLE_TAG)


def choose_device(kind: str, local_rank: int) -> Device:
    """Open the device of a rank; several ranks share one where there are fewer."""
    num_gpus = num_cuda_devices() if kind != "cpu" else 0
    if num_gpus == 0:
        return open_device("cuda" if kind == "cuda" else "cpu")
    import torch

    torch.cuda.set_device(local_rank % num_gpus)
    return open_device("cuda", local_rank % num_gpus)


@contextmanager
def open_carriers(
    name: str, world: RankWorld, gatherings: list[Gathering], capacity_bytes: int
) -> Iterator[dict[Gathering, Carrier] | str]:
    """Open a carrier for each gathering, on every rank or on none: then give the reason instead."""
    with ExitStack() as held:
        directory = Path(held.enter_context(TemporaryDirectory(prefix="dejavu-bench-")))
        carriers: dict[Gathering, Carrier] = {}
        reason = ""
        try:
            for gathering in gatherings:
                place: dict[str, Any] = {"capacity_bytes": capacity_bytes, "directory": directory / gathering.value}
                carrier = open_carrier(name, world.device, world.comm, gathering=gathering, **place)
                carriers[gathering] = held.enter_context(carrier)
        except (DejavuError, ImportError) as error:
            reason = str(error) or type(error).__name__
        yield agree(world, reason) or carriers


def agree(world: RankWorld, reason: str) -> str:
    """Give the first reason that any rank has; empty where none has one."""
    reasons: list[str] = world.comm.allgather(reason)
    return next((each for each in reasons if each), "")
