"""The logits of the whole vocabulary, from the parts that the last stage's tensor ranks compute."""

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Protocol

import torch
from torch import Tensor

from dejavu.model.spec import Shard

if TYPE_CHECKING:
    from dejavu.transport.mpi import Channel

WHOLE_VECTORS = 4  # a sum between GPUs takes multiples of 16 bytes


class Logits(Protocol):
    """Bring the parts together."""

    def gather(self, part: Tensor) -> Tensor:
        """Give float32 [num_rows, vocab] from this rank's part, [num_rows, vocabulary share]."""


class OneRank:
    """Be the only rank of the stage."""

    def gather(self, part: Tensor) -> Tensor:
        """Give the part, which is all."""
        return part


class MpiLogits:
    """Receive the other ranks' parts, on the leader."""

    def __init__(self, channel: "Channel", vocab_size: int, shards: Sequence[tuple[int, Shard]]) -> None:
        """Take the (rank, shard) of the stage's tensor ranks, this one first."""
        self.channel = channel
        self.vocab_size = vocab_size
        self.shards = shards

    def gather(self, part: Tensor) -> Tensor:
        """Put the parts beside each other."""
        whole = torch.empty(part.shape[0], self.vocab_size)
        for rank, shard in self.shards:
            start, stop = shard.vocab_range(self.vocab_size)
            other = part if rank == self.channel.rank else torch.empty(part.shape[0], stop - start)
            whole[:, start:stop] = part if rank == self.channel.rank else self.channel.receive_tensor(rank, other)
        return whole


class LogitSum:
    """Add up the parts, each in its place among zeros, on all ranks at once: no host waits for another."""

    def __init__(self, vocab_size: int, shard: Shard, all_reduce: Callable[[Tensor], None]) -> None:
        self.vocab_size = vocab_size
        self.start, self.stop = shard.vocab_range(vocab_size)
        self.all_reduce = all_reduce

    def gather(self, part: Tensor) -> Tensor:
        """Take part in the sum, and give it."""
        width = -(-self.vocab_size // WHOLE_VECTORS) * WHOLE_VECTORS
        whole = part.new_zeros(part.shape[0], width)
        whole[:, self.start : self.stop] = part
        self.all_reduce(whole)
        return whole[:, : self.vocab_size]
