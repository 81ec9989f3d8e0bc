"""Hidden states from one stage's GPU to the next one's on another host, by ncclSend and ncclRecv on torch's stream."""

from typing import TYPE_CHECKING

from dejavu.device.base import Device
from dejavu.transport.ipc_line import Exchange
from dejavu.transport.mailbox import RECEIVER, SENDER
from dejavu.transport.nccl_group import NcclGroup

if TYPE_CHECKING:
    import torch
    from torch import Tensor


class NcclOut:
    """Be the side that sends."""

    name = "nccl"

    def __init__(self, device: Device, exchange: Exchange) -> None:
        """Connect the two, the sender first in `exchange`; UnavailableError, on both, where that cannot be."""
        self._group = NcclGroup(device, exchange, SENDER)

    def send(self, hidden: "Tensor") -> None:
        """Queue a contiguous tensor's way; it stays unchanged until the stream has passed this."""
        self._group.send(hidden, RECEIVER)

    def close(self) -> None:
        """Part, as the other side does."""
        self._group.close()

    def abort(self, error: Exception) -> None:
        """End what waits for another side that has died."""
        self._group.abort()


class NcclIn:
    """Be the side that receives, into memory of torch's."""

    name = "nccl"

    def __init__(self, device: Device, exchange: Exchange, hidden_size: int, dtype: "torch.dtype") -> None:
        """Connect the two, the sender first in `exchange`; UnavailableError, on both, where that cannot be."""
        self._device = device
        self._shape, self._dtype = hidden_size, dtype
        self._group = NcclGroup(device, exchange, RECEIVER)

    def receive(self, num_tokens: int) -> "Tensor":
        """Give the next hidden states [num_tokens, hidden_size], for what is queued from now on."""
        import torch

        hidden = torch.empty(num_tokens, self._shape, dtype=self._dtype, device=self._device.torch_device)
        self._group.receive(hidden, SENDER)
        return hidden

    def release(self) -> None:
        """Do nothing: torch knows when nothing refers to the tensor any more."""

    def close(self) -> None:
        """Part, as the other side does."""
        self._group.close()

    def abort(self, error: Exception) -> None:
        """End what waits for another side that has died."""
        self._group.abort()
