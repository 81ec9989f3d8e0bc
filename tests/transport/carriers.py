"""The carriers that the conformance suite holds to one behaviour: how each is started and made.

To add one, write `make(setting) -> Carrier` and a line in CARRIERS. A `store` is made in the test's own process; a
`plain` link in two processes that only have `setting.exchange`; an `mpirun` link in two ranks, where `make` may import
mpi4py. `make` is called at the same time on both ranks, once for each gathering.
"""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from dejavu.device import Device
from dejavu.transport.carrier import Carrier, Gathering


@dataclass(frozen=True)
class Setting:
    """Be what a carrier is made with. `exchange` gives every rank's bytes to every rank, as an allgather does."""

    device: Device
    gathering: Gathering
    rank: int
    size: int
    directory: Path  # private and empty, one for each carrier and rank
    exchange: Callable[[bytes], list[bytes]]


@dataclass(frozen=True)
class Kind:
    start: Literal["store", "plain", "mpirun"]
    make: Callable[[Setting], Carrier]
    devices: tuple[str, ...] = ("cpu", "cuda")
    min_gpus: int = 1


def make_local(setting):
    from dejavu.transport.local import LocalStore

    return LocalStore(setting.device, 300 << 20, rank=setting.rank, gathering=setting.gathering)


def make_mpi(setting):
    from mpi4py import MPI

    from dejavu.transport.mpi_carrier import MpiCarrier

    return MpiCarrier(setting.device, MPI.COMM_WORLD, gathering=setting.gathering)


def make_disk(setting):
    from dejavu.transport.disk import DiskStore

    return DiskStore(setting.device, setting.directory, rank=setting.rank, gathering=setting.gathering, fsync=False)


def make_ipc(setting):
    from dejavu.transport.ipc import IpcCarrier

    return IpcCarrier(setting.device, setting.rank, setting.exchange, gathering=setting.gathering)


def make_rma(setting):
    from mpi4py import MPI

    from dejavu.transport.rma import RmaCarrier

    return RmaCarrier(setting.device, MPI.COMM_WORLD, gathering=setting.gathering)


def make_tcp(setting):
    from dejavu.transport.tcp import TcpCarrier

    return TcpCarrier(setting.device, setting.rank, setting.exchange, gathering=setting.gathering, num_streams=2)


def make_nccl(setting):
    from mpi4py import MPI

    from dejavu.transport.nccl import NcclCarrier

    return NcclCarrier(setting.device, MPI.COMM_WORLD, gathering=setting.gathering)


def make_nccl_order(setting):
    from mpi4py import MPI

    from tests.transport.fake_nccl import FakeNcclCarrier

    return FakeNcclCarrier(setting.device, MPI.COMM_WORLD, gathering=setting.gathering, chunk_bytes=1 << 20)


CARRIERS = {
    "local": Kind("store", make_local),
    "disk": Kind("store", make_disk),
    "ipc": Kind("plain", make_ipc),
    "mpi": Kind("mpirun", make_mpi),
    "rma": Kind("mpirun", make_rma),
    "tcp": Kind("plain", make_tcp),
    "nccl": Kind("mpirun", make_nccl, devices=("cuda",), min_gpus=2),
    "nccl-order": Kind("mpirun", make_nccl_order, devices=()),  # started by test_nccl.py
}
