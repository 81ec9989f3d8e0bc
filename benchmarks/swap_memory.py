"""The memory of a swapping rank without ranks: two resident microbatches on the device, and all in host memory."""

from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch

    from dejavu.device import Device
    from dejavu.kv.layout import PoolLayout
    from dejavu.kv.swap import Part
    from dejavu.model.spec import ModelSpec, Shard

RESIDENT = 2
PATTERN_NUMBERS = (4 << 20) - 65  # in step with no block


@dataclass(frozen=True, slots=True)
class Settings:
    """Hold what was asked for, with the defaults of the device filled in."""

    model: str
    pp: int
    batch: int
    context: int
    dtype: str
    block_tokens: int  # 0: a whole row
    microbatches: int
    loads: tuple[float, ...]
    steps: int
    repeats: int

    @property
    def spec(self) -> "ModelSpec":
        """Give the model."""
        from dejavu.model.table import MODELS

        return MODELS[self.model]

    @property
    def shard(self) -> "Shard":
        """Give the stage in the middle of the pipeline."""
        from dejavu.model.spec import Shard
        from dejavu.topology import split_layers

        first, last = split_layers(self.spec.num_layers, self.pp)[self.pp // 2]
        return Shard(first, last, self.spec.num_layers)

    @property
    def block_size(self) -> int:
        """Count the tokens of a block."""
        return self.block_tokens or self.context + self.steps

    @property
    def row_blocks(self) -> int:
        """Count the blocks of a row, which also has room for the new tokens."""
        return -(-(self.context + self.steps) // self.block_size)

    def layout(self, microbatches: int) -> "PoolLayout":
        """Lay out the stage's KV of some microbatches."""
        from dejavu.kv.layout import PoolLayout

        spec, shard = self.spec, self.shard
        num_blocks = microbatches * self.batch * self.row_blocks
        layers = shard.last_layer - shard.first_layer
        itemsize = 4 if self.dtype == "float32" else 2
        return PoolLayout(
            num_blocks, shard.first_layer, layers, self.block_size, 0, spec.num_kv_heads, spec.head_dim, itemsize
        )


class SwapMemory:
    """Own the pools: two resident microbatches on the device, and all in host memory, of random numbers."""

    def __init__(self, device: "Device", settings: Settings, held: ExitStack) -> None:
        import torch

        self.device = device
        self.settings = settings
        self.layout = settings.layout(settings.microbatches)
        self.device_layout = settings.layout(RESIDENT)
        self.on_device = held.enter_context(device.allocate_exportable(self.device_layout.total_bytes))
        self.on_host = held.enter_context(device.allocate_host_exportable(self.layout.total_bytes))
        for seed, buffer in enumerate((self.on_device, self.on_host)):
            numbers = buffer.tensor().view(getattr(torch, settings.dtype))
            fill_random(numbers, torch.Generator().manual_seed(seed))
        device.synchronize()

    @property
    def fetch_bytes(self) -> int:
        """Count the bytes of a microbatch of which each row has `context` tokens."""
        return self.settings.batch * self.settings.context * self.layout.bytes_per_token

    def parts(self, microbatch: int, slot: int, start: int, stop: int) -> "list[Part]":
        """Name tokens [start, stop) of all rows of a microbatch, on the host and in a slot."""
        from dejavu.kv.swap import Part

        blocks = self.settings.row_blocks
        firsts = [
            (first * self.settings.batch + row) * blocks
            for row in range(self.settings.batch)
            for first in (microbatch, slot)
        ]
        pairs = zip(firsts[::2], firsts[1::2], strict=True)
        return [Part(range(host, host + blocks), range(there, there + blocks), start, stop) for host, there in pairs]

    def count_wrong(self, parts: "Sequence[Part]") -> int:
        """Count the bytes of parts that are not the same in both pools."""
        import torch

        wrong, size = 0, self.settings.block_size
        ours = self.on_device.tensor(torch.uint8, (*self.device_layout.shape[:4], self.layout.token_bytes))
        theirs = self.on_host.tensor(torch.uint8, (*self.layout.shape[:4], self.layout.token_bytes))
        for part in parts:
            for block in range(part.start // size, -(-part.stop // size)):
                here = slice(max(0, part.start - block * size), min(size, part.stop - block * size))
                one, other = ours[part.device[block], :, :, here], theirs[part.host[block], :, :, here]
                wrong += int((one != other.to(one.device)).sum())
        return wrong


def fill_random(memory: "torch.Tensor", generator: "torch.Generator") -> None:
    """Fill numbers with a normal pattern, again and again: gigabytes of random numbers take longer than all else."""
    import torch

    pattern = torch.randn(PATTERN_NUMBERS, generator=generator).to(memory.device, memory.dtype)
    for first in range(0, len(memory), PATTERN_NUMBERS):
        part = memory[first : first + PATTERN_NUMBERS]
        part.copy_(pattern[: len(part)])
