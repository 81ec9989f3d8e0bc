"""Where a stage's hidden states come from."""

from typing import Protocol

import torch
from torch import Tensor

from dejavu.engine.messages import Work
from dejavu.transport.mpi import Channel


class Inlet(Protocol):
    """Give the hidden states of each pass."""

    def take(self, work: Work) -> Tensor | None:
        """Give the pass's hidden states [num_tokens, hidden_size], ordered on the compute stream; None for no stage."""


class NoInlet:
    """Give nothing, as to the first stage, which embeds tokens."""

    def take(self, work: Work) -> None:
        """Give nothing."""


class HostInlet:
    """Receive hidden states by MPI, from the same tensor rank of the stage before."""

    def __init__(self, channel: Channel, rank: int, hidden_size: int, dtype: torch.dtype) -> None:
        self.channel = channel
        self.rank = rank
        self.hidden_size = hidden_size
        self.dtype = dtype

    def take(self, work: Work) -> Tensor:
        """Wait for them."""
        num_tokens = sum(row.num_new for row in work.rows)
        return self.channel.receive_tensor(self.rank, torch.empty(num_tokens, self.hidden_size, dtype=self.dtype))


class StagedInlet:
    """Receive hidden states in pinned host memory, and copy them to the GPU in the order of its stream."""

    def __init__(self, inlet: HostInlet, device: torch.device) -> None:
        self.inlet = inlet
        self.device = device

    def take(self, work: Work) -> Tensor:
        """Wait for them on the host, not for the copy."""
        return self.inlet.take(work).pin_memory().to(self.device, non_blocking=True)
