"""A communicator of NCCL over a few ranks, one GPU each: sums, and tensors from one rank to another, on torch's stream.

Capture-safe: what is queued during a capture becomes part of the graph. After a rank has died it can only be aborted.
"""

import os
import threading
from typing import TYPE_CHECKING, Any

from dejavu.device.base import Device
from dejavu.errors import DeadlineError, TransferError
from dejavu.transport.carrier import UnavailableError
from dejavu.transport.ipc_line import Exchange

if TYPE_CHECKING:
    from torch import Tensor

OPENING_S = 120.0


class NcclGroup:
    """Be one rank of a communicator. Calls queue on torch's current stream, in the same order on every rank."""

    def __init__(self, device: Device, exchange: Exchange, rank: int) -> None:
        """Open it on all ranks of `exchange` at once; UnavailableError, on all of them, where one cannot."""
        self._device = device
        self._rank = rank
        self._comm: Any = None
        reason = missing(device)
        reasons = [each.decode() for each in exchange((reason or "").encode())]
        if any(reasons):
            raise UnavailableError(f"nccl is unavailable: {next(filter(None, reasons))}")
        from nccl import core

        unique_id = exchange(bytes(core.get_unique_id()) if rank == 0 else b"")[0]
        self.size = len(reasons)
        self._open(unique_id)

    def sum(self, tensor: "Tensor") -> None:
        """Add a contiguous tensor up over all ranks, in place."""
        from nccl import bindings, core

        dtype = {"float32": core.FLOAT32, "float16": core.FLOAT16, "bfloat16": core.BFLOAT16}[str(tensor.dtype)[6:]]
        address, stream = tensor.data_ptr(), self._device.compute_stream.handle
        bindings.nccl.all_reduce(address, address, tensor.numel(), int(dtype), int(core.SUM), self._view(), stream)

    def send(self, tensor: "Tensor", peer: int) -> None:
        """Send a contiguous tensor to a rank, which receives it."""
        from nccl import bindings, core

        stream = self._device.compute_stream.handle
        bindings.nccl.send(tensor.data_ptr(), tensor.nbytes, int(core.UINT8), peer, self._view(), stream)

    def receive(self, tensor: "Tensor", peer: int) -> None:
        """Receive a contiguous tensor from a rank."""
        from nccl import bindings, core

        stream = self._device.compute_stream.handle
        bindings.nccl.recv(tensor.data_ptr(), tensor.nbytes, int(core.UINT8), peer, self._view(), stream)

    def abort(self) -> None:
        """End what was queued, and give everything back alone: for a rank that has died."""
        comm, self._comm = self._comm, None
        if comm is not None:
            comm.abort()

    def close(self) -> None:
        """Give everything back, as every other rank does."""
        comm, self._comm = self._comm, None
        if comm is not None:
            comm.destroy()

    def _view(self) -> Any:
        from nccl import bindings

        if self._comm is None:
            raise TransferError("the group was aborted, since a rank of it is lost")
        return bindings.nccl.Comm(self._comm.ptr)

    def _open(self, unique_id: bytes) -> None:
        """Connect, in a thread, since nothing ends a wait for a rank that has died meanwhile."""
        from nccl import core

        errors: list[Exception] = []

        def work() -> None:
            try:
                self._device.free_bytes()  # makes the device current in this thread
                self._comm = core.Communicator.init(self.size, self._rank, core.UniqueId.from_bytes(unique_id))
            except Exception as error:  # raised below, where the caller is
                errors.append(error)

        thread = threading.Thread(target=work, name="nccl-group", daemon=True)
        thread.start()
        thread.join(OPENING_S)
        if thread.is_alive():
            raise DeadlineError(f"nccl did not connect {self.size} ranks within {OPENING_S:.0f} s: a rank has stopped")
        if errors:
            raise UnavailableError(f"nccl could not connect {self.size} ranks ({errors[0]})") from errors[0]


def missing(device: Device) -> str | None:
    """Say what keeps this rank from using NCCL, or None."""
    if device.properties.kind != "cuda":
        return f"it moves GPU memory, and this rank runs on {device}"
    os.environ.setdefault("NCCL_NVLS_ENABLE", "0")  # multicast that a killed process leaves behind blocks the GPUs
    os.environ.setdefault("NCCL_P2P_NVL_CHUNKSIZE", "131072")  # of one send: 2 % faster than the default on two H200s
    try:
        from nccl import core

        library = core.get_version().libnccl
    except Exception as error:  # whatever an installation can lack
        return f"nccl4py does not work here ({error}): pip install 'dejavu-serve[cuda]'"
    return None if library else "nccl4py finds no libnccl.so.2: pip install nvidia-nccl-cu13"
