"""Lay one rank's weights into one piece of memory, so that whoever maps it finds them without reading a checkpoint."""

from __future__ import annotations

from dataclasses import dataclass, field
from math import prod
from typing import TYPE_CHECKING

from dejavu.model.parameters import Parameter, stage_parameters
from dejavu.model.spec import ModelSpec, Shard

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from dejavu.device.base import Buffer

ALIGNMENT = 256  # of each tensor: as good as any allocator's


@dataclass(frozen=True, slots=True)
class WeightArena:
    """Give each parameter of a shard its place: a pure function of the model, the shard and the number format."""

    spec: ModelSpec
    shard: Shard
    dtype: torch.dtype
    offsets: dict[str, int] = field(init=False)
    nbytes: int = field(init=False)

    def __post_init__(self) -> None:
        offsets, end = {}, 0
        for parameter in stage_parameters(self.spec, self.shard):
            offsets[parameter.name] = end
            end += -(-prod(parameter.shape) * self.dtype.itemsize // ALIGNMENT) * ALIGNMENT
        object.__setattr__(self, "offsets", offsets)
        object.__setattr__(self, "nbytes", max(end, ALIGNMENT))

    def view(self, memory: Buffer, parameter: Parameter) -> Tensor:
        """Give a parameter's tensor in `memory`, of `nbytes`: what `load_stage` takes as its allocator."""
        nbytes = prod(parameter.shape) * self.dtype.itemsize
        if nbytes == 0:  # a share of nothing, for which CUDA has no address
            return memory.tensor(self.dtype).new_empty(parameter.shape)
        return memory.view(self.offsets[parameter.name], nbytes).tensor(self.dtype, tuple(parameter.shape))

    def views(self, memory: Buffer) -> dict[str, Tensor]:
        """Give all tensors in a memory that was filled before, by name."""
        return {p.name: self.view(memory, p) for p in stage_parameters(self.spec, self.shard)}
