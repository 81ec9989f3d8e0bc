"""Where a stage's hidden states come from."""

from typing import TYPE_CHECKING, Protocol

import torch
from torch import Tensor

from dejavu.engine.messages import Work

if TYPE_CHECKING:
    from dejavu.transport.mpi import Channel


class Inlet(Protocol):
    """Give the hidden states of each pass."""

    def take(self, work: Work) -> Tensor | None:
        """Give the pass's hidden states [num_tokens, hidden_size], ordered on the compute stream; None for no stage."""

    def release(self) -> None:
        """Say that all that reads what was taken last has been queued, or done."""


class NoInlet:
    """Give nothing, as to the first stage, which embeds tokens."""

    def take(self, work: Work) -> None:
        """Give nothing."""

    def release(self) -> None:
        """Do nothing."""


class HostInlet:
    """Receive hidden states by MPI, from the same tensor rank of the stage before."""

    def __init__(self, channel: "Channel", rank: int, hidden_size: int, dtype: torch.dtype) -> None:
        self.channel = channel
        self.rank = rank
        self.hidden_size = hidden_size
        self.dtype = dtype

    def take(self, work: Work) -> Tensor:
        """Wait for them."""
        num_tokens = sum(row.num_new for row in work.rows)
        return self.channel.receive_tensor(self.rank, torch.empty(num_tokens, self.hidden_size, dtype=self.dtype))

    def release(self) -> None:
        """Do nothing: the tensor is the taker's."""


class StagedInlet:
    """Receive hidden states in pinned host memory, and copy them to the GPU in the order of its stream."""

    def __init__(self, inlet: HostInlet, device: torch.device) -> None:
        self.inlet = inlet
        self.device = device

    def take(self, work: Work) -> Tensor:
        """Wait for them on the host, not for the copy."""
        return self.inlet.take(work).pin_memory().to(self.device, non_blocking=True)

    def release(self) -> None:
        """Do nothing: the tensor is the taker's."""


class HiddenIn(Protocol):
    """Be the end of a way between two GPUs at which hidden states come out."""

    name: str

    def receive(self, num_tokens: int) -> Tensor:
        """Give the next hidden states [num_tokens, hidden_size], for what is queued from now on until `release`."""

    def release(self) -> None:
        """Let the memory be used again once the stream has passed this."""

    def abort(self, error: Exception) -> None:
        """End the waits for the other end."""

    def close(self) -> None:
        """Part, as the other end does at the same time."""


class DirectInlet:
    """Take hidden states that the stage before stores into this GPU's memory: no host waits for them."""

    def __init__(self, inbox: HiddenIn) -> None:
        self.inbox = inbox

    def take(self, work: Work) -> Tensor:
        """Give them as they will be when the stream comes to what is queued next."""
        return self.inbox.receive(sum(row.num_new for row in work.rows))

    def release(self) -> None:
        """Let the memory be used again."""
        self.inbox.release()
