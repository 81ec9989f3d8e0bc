"""All carriers by their names: which of them can work here, and why not, and how each is opened."""

import os
import socket
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dejavu.device.base import Device
from dejavu.errors import ConfigError
from dejavu.transport.carrier import Carrier, Gathering, UnavailableError

if TYPE_CHECKING:
    from mpi4py import MPI

STORES = ("local", "disk")
LINKS = ("ipc", "nccl", "mpi", "rma", "tcp")
NAMES = (*LINKS, *STORES)
LINK_MODULES = tuple(f"dejavu.transport.{name}" for name in ("ipc", "nccl", "mpi_carrier", "rma", "tcp"))  # on demand
SECRET = "DEJAVU_TCP_SECRET"  # noqa: S105 (the name of the variable: 64 hexadecimal digits that the launcher makes)
INTERFACE = "DEJAVU_TCP_INTERFACE"


def open_carrier(
    name: str,
    device: Device,
    comm: "MPI.Intracomm | None" = None,
    *,
    gathering: Gathering = Gathering.PACKED,
    capacity_bytes: int | None = None,
    directory: Path | None = None,
) -> Carrier:
    """Open a carrier; a link on every rank of `comm` at the same time, with an accelerator on each for `nccl`.

    `local` needs `capacity_bytes`, `disk` a `directory`. `tcp` reads the launcher's secret and interface from the
    environment, where they are given. UnavailableError says why a carrier cannot work here, on every rank alike;
    ConfigError names the carriers that there are.
    """
    if name not in NAMES:
        raise ConfigError(f"there is no carrier {name}: choose one of {', '.join(NAMES)}")
    if name == "local":
        return _open_local(device, comm, gathering, capacity_bytes)
    if name == "disk":
        return _open_disk(device, comm, gathering, directory)
    reason = available(device, comm)[name]
    if reason is not None:
        raise UnavailableError(f"the carrier {name} is unavailable: {reason}")
    assert comm is not None
    return _OPENERS[name](device, comm, gathering)


def available(device: Device, comm: "MPI.Intracomm | None" = None) -> dict[str, str | None]:
    """Give each carrier's name, and None or the reason why it cannot work between the ranks of `comm`.

    Every rank of `comm` calls it at the same time, and gets the same answer.
    """
    reasons: dict[str, str | None] = dict.fromkeys(STORES)
    if comm is None or comm.Get_size() < 2:
        return dict.fromkeys(LINKS, "it leads to other ranks, and there is but one: start with mpirun -n 2") | reasons
    hosts: list[str] = comm.allgather(socket.gethostname())
    threads = _agreed(comm, _without_threads())
    return {
        "ipc": None if len(set(hosts)) < len(hosts) else "it needs two ranks on one host, and each is on another",
        "nccl": threads or _without_nccl(device, comm),
        "mpi": threads,
        "rma": threads,
        "tcp": None,
    } | reasons


def _agreed(comm: "MPI.Intracomm", reason: str | None) -> str | None:
    """Give the first rank's reason that has one."""
    reasons: list[str | None] = comm.allgather(reason)
    return next((f"rank {rank}: {why}" for rank, why in enumerate(reasons) if why is not None), None)


def _without_threads() -> str | None:
    from dejavu.transport.mpi_wire import check_threads

    return _reason_of(check_threads)


def _without_nccl(device: Device, comm: "MPI.Intracomm") -> str | None:
    from dejavu.transport.nccl import check_places

    return _reason_of(lambda: check_places(device, comm))


def _reason_of(check: Callable[[], None]) -> str | None:
    try:
        check()
    except UnavailableError as error:
        return str(error)
    return None


def _open_local(device: Device, comm: Any, gathering: Gathering, capacity_bytes: int | None) -> Carrier:
    from dejavu.transport.local import LocalStore

    if not capacity_bytes:
        raise ConfigError("the carrier local needs to know how many bytes it may keep: give capacity_bytes")
    return LocalStore(device, capacity_bytes, rank=_rank_in(comm), gathering=gathering)


def _open_disk(device: Device, comm: Any, gathering: Gathering, directory: Path | None) -> Carrier:
    from dejavu.transport.disk import DiskStore

    if directory is None:
        raise ConfigError("the carrier disk needs a place for its files: give a directory")
    return DiskStore(device, directory, rank=_rank_in(comm), gathering=gathering)


def _rank_in(comm: Any) -> int:
    return 0 if comm is None else int(comm.Get_rank())


def _open_ipc(device: Device, comm: "MPI.Intracomm", gathering: Gathering) -> Carrier:
    from dejavu.transport.ipc import IpcCarrier

    return IpcCarrier(device, comm.Get_rank(), comm.allgather, gathering=gathering)


def _open_nccl(device: Device, comm: "MPI.Intracomm", gathering: Gathering) -> Carrier:
    from dejavu.transport.nccl import NcclCarrier

    return NcclCarrier(device, comm, gathering=gathering)


def _open_mpi(device: Device, comm: "MPI.Intracomm", gathering: Gathering) -> Carrier:
    from dejavu.transport.mpi_carrier import MpiCarrier

    return MpiCarrier(device, comm, gathering=gathering)


def _open_rma(device: Device, comm: "MPI.Intracomm", gathering: Gathering) -> Carrier:
    from dejavu.transport.rma import RmaCarrier

    return RmaCarrier(device, comm, gathering=gathering)


def _open_tcp(device: Device, comm: "MPI.Intracomm", gathering: Gathering) -> Carrier:
    from dejavu.transport.tcp import TcpCarrier

    return TcpCarrier(
        device,
        comm.Get_rank(),
        comm.allgather,
        gathering=gathering,
        interface=os.environ.get(INTERFACE),
        secret=read_secret(os.environ.get(SECRET)),
    )


def read_secret(text: str | None) -> bytes | None:
    """Give the launcher's secret, if there is one; ConfigError where it is malformed."""
    from dejavu.transport.tcp_handshake import SECRET_BYTES

    if text is None:
        return None
    try:
        secret = bytes.fromhex(text)
    except ValueError:
        secret = b""
    if len(secret) != SECRET_BYTES:
        raise ConfigError(f"{SECRET} is not {2 * SECRET_BYTES} hexadecimal digits: leave its making to the launcher")
    return secret


_OPENERS: dict[str, Callable[[Device, Any, Gathering], Carrier]] = {
    "ipc": _open_ipc,
    "nccl": _open_nccl,
    "mpi": _open_mpi,
    "rma": _open_rma,
    "tcp": _open_tcp,
}
