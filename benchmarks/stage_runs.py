"""Passes through a whole model on the ranks of one tensor group, as the engine's workers run them, and their times."""

import statistics
import time
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, ExitStack, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from dejavu.device import Buffer, Device
from dejavu.model.batch import Batch
from dejavu.model.decoder import StageModel
from dejavu.model.layers import Linear, pick_matmul
from dejavu.model.spec import ModelSpec, Shard
from dejavu.model.weights import dummy_stage, load_stage

from .roofline import Ceilings

COPY_BYTES = {"cuda": 4 << 30, "cpu": 256 << 20}
MATRIX_SIZE = {"cuda": 8192, "cpu": 1024}
BLOCK_SIZE = 32  # on a GPU; on a CPU a row is one block
LEAST_S = 0.05  # that token steps are timed for
AllReduce = Callable[[Tensor], None]


@dataclass(frozen=True, slots=True)
class Group:
    """Be one rank of a tensor group: where it computes, and what it shares with the others."""

    device: Device
    comm: Any
    all_reduce: AllReduce | None

    @property
    def on_cuda(self) -> bool:
        """Tell whether passes are only queued."""
        return self.device.properties.kind == "cuda"

    def settle(self) -> None:
        """Wait until the device is idle."""
        if self.on_cuda:
            torch.cuda.synchronize()

    def slowest(self, value: float) -> float:
        """Give the largest value of any rank; also a barrier."""
        values: list[float] = self.comm.allgather(value)
        return max(values)


def own_stream(device: Device) -> AbstractContextManager[Any]:
    """Make a stream of its own torch's current one, as a worker does on a GPU."""
    if device.properties.kind == "cpu":
        return nullcontext()
    return torch.cuda.stream(torch.cuda.Stream(device.torch_device))  # type: ignore[no-untyped-call]


def open_group(device: Device, comm: Any, stack: ExitStack) -> Group:
    """Join the ranks of `comm` to a tensor group, as a worker does."""
    if comm.size == 1:
        return Group(device, comm, None)
    if device.properties.kind == "cuda":
        from dejavu.transport.reduction import GroupSum

        return Group(device, comm, stack.enter_context(GroupSum(device, comm.allgather, comm.rank)))
    from dejavu.transport.mpi import Channel

    channel = Channel(comm, 60.0)
    stack.callback(channel.close)
    return Group(device, comm, lambda tensor: channel.all_reduce(tensor, range(comm.size)))


def make_stage(group: Group, spec: ModelSpec, dtype: torch.dtype, directory: Any) -> StageModel:
    """Load this rank's part of all layers."""
    shard, place = whole_shard(spec, group), group.device.torch_device
    if directory is None:
        weights = dummy_stage(spec, shard, dtype, place)
    else:
        weights = load_stage(directory, spec, shard, dtype, place)
    return StageModel(spec, shard, weights, group.all_reduce)


def whole_shard(spec: ModelSpec, group: Group) -> Shard:
    """Give this rank's share of every layer."""
    return Shard(0, spec.num_layers, spec.num_layers, group.comm.rank, group.comm.size)


class Runs:
    """Run passes of some rows over a KV pool of their own, filled with noise."""

    def __init__(self, group: Group, stage: StageModel, num_rows: int, row_len: int) -> None:
        """Take memory for `num_rows` rows of `row_len` tokens."""
        spec, shard = stage.spec, stage.shard
        self.group = group
        self.stage = stage
        self.block_size = BLOCK_SIZE if group.on_cuda else row_len
        self.blocks_per_row = -(-row_len // self.block_size)
        heads = spec.num_kv_heads // shard.tp_size
        num_layers = shard.last_layer - shard.first_layer
        shape = (num_rows * self.blocks_per_row, num_layers, 2, self.block_size, heads, spec.head_dim)
        self.pool = torch.empty(shape, dtype=stage.dtype, device=stage.device).normal_()
        self.generator = torch.Generator().manual_seed(0)

    def batch(self, num_new: Sequence[int], context: Sequence[int]) -> Batch:
        """Describe a pass of random tokens, the logits of all rows wanted."""
        vocab_size, each = self.stage.spec.vocab_size, self.blocks_per_row
        return Batch(
            token_ids=torch.randint(vocab_size, (sum(num_new),), generator=self.generator),
            num_new=list(num_new),
            context=list(context),
            blocks=[list(range(row * each, (row + 1) * each)) for row in range(len(num_new))],
            logit_rows=list(range(len(num_new))),
        )

    def forward(self, num_new: Sequence[int], context: Sequence[int]) -> Tensor:
        """Queue a pass."""
        return self.stage.forward(self.batch(num_new, context), None, self.pool)

    @torch.inference_mode()
    def time_prompt(self, batch: int, prompt_len: int, repeats: int) -> "Times":
        """Time passes over whole prompts, one at a time."""
        return self._time(lambda: self.forward([prompt_len] * batch, [0] * batch), 1, repeats)

    @torch.inference_mode()
    def time_token(self, batch: int, context: int, repeats: int) -> "Times":
        """Time token steps, several behind each other where they are short, as in serving."""

        def step() -> Tensor:
            return self.forward([1] * batch, [context] * batch)

        once = self._time(step, 1, 1)
        count = max(1, int(LEAST_S / max(once.median_s, 1e-6))) if self.group.on_cuda else 1
        return self._time(step, count, repeats)

    def _time(self, work: Callable[[], Tensor], count: int, repeats: int) -> "Times":
        times, posts = [], []
        for _ in range(repeats + 1):  # the first warms up
            self.group.settle()
            self.group.comm.barrier()
            begin_s = time.perf_counter()
            for _ in range(count):
                work()
            posts.append((time.perf_counter() - begin_s) / count)
            self.group.settle()
            times.append(self.group.slowest((time.perf_counter() - begin_s) / count))
        return Times(times[1:], posts[1:])


@dataclass(frozen=True, slots=True)
class Times:
    """Hold seconds: of each pass (of the slowest rank), and those that the host's thread took to post it."""

    passes: list[float]
    posts: list[float]

    @property
    def median_s(self) -> float:
        """Give the median time of a pass."""
        return statistics.median(self.passes)


def measure_ceilings(group: Group, dtype: torch.dtype, repeats: int) -> Ceilings:
    """Time a large copy and a large matrix product, on all ranks at once; the slowest counts.

    On a CPU memory is only read, since a core may first read what it is to write.
    """
    kind, place = group.device.properties.kind, group.device.torch_device
    source = torch.empty(COPY_BYTES[kind] // 4, dtype=torch.int32, device=place).random_()
    if group.on_cuda:
        target = torch.empty_like(source)
        move_s = best(group, lambda: target.copy_(source), repeats) / 2
    else:
        move_s = best(group, source.amax, repeats)
    size = MATRIX_SIZE[kind]
    left, right = (torch.randn(size, size, device=place).to(dtype) for _ in range(2))
    multiply = Linear(right, None, pick_matmul(dtype, kind))
    product_s = best(group, lambda: multiply(left), repeats)
    return Ceilings(source.nbytes / move_s, 2 * size**3 / product_s)


def best(group: Group, work: Callable[[], object], repeats: int) -> float:
    """Give the median seconds of some work on the slowest rank: several behind each other on a GPU."""
    count, times = 5 if group.on_cuda else 1, []
    for _ in range(repeats + 1):
        group.settle()
        group.comm.barrier()
        begin_s = time.perf_counter()
        for _ in range(count):
            work()
        group.settle()
        times.append(group.slowest((time.perf_counter() - begin_s) / count))
    return statistics.median(times[1:])


def measure_links(device: Device, nbytes: int = 1 << 28) -> dict[str, float]:
    """Give the bytes a second of a GPU's copies: to pinned host memory, and to another GPU that it reaches."""
    from .calibrate import open_peer

    if device.properties.kind == "cpu":
        return {}
    peer, name = open_peer(device, nbytes)
    with device.allocate(nbytes) as here, device.allocate_host(nbytes) as host:
        links = {"host": time_copy(device, host, here)}
        if name != str(device):
            links["peer"] = time_copy(device, peer, here)
    peer.close()
    return links


def time_copy(device: Device, target: Buffer, source: Buffer) -> float:
    """Give the bytes a second of the fastest of a few copies."""
    times = []
    with device.create_stream("copy") as stream:
        for _ in range(4):
            begin_s = time.perf_counter()
            device.copy(target, source, stream=stream)
            stream.synchronize(60)
            times.append(time.perf_counter() - begin_s)
    return source.nbytes / min(times)
