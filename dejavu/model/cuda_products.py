"""Multiply by a stage's matrices on CUDA: a kernel for few rows where it is faster than cuBLAS, tried out once.

Which one multiplies is chosen for each (matrix, rows) by timing all on the stage's own weights, before the first graph
of that many rows is captured, and kept on disk (cuda_choices.py); `Products.chosen` says what came out.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from dejavu.assets import data_path
from dejavu.model.cuda_choices import NORM_CHUNK, Variant, agree, recall
from dejavu.model.cuda_operations import ACTIVATIONS, Operations, compile_module, current_stream, type_definition
from dejavu.model.layers import LayerNorm, Linear, Norm

if TYPE_CHECKING:
    from dejavu.device.cuda_launch import Kernel

MOST_ROWS = 32  # of the kernel
ROWS_OF_TILE = 8
MOST_NORM_BYTES = 40 << 10
_TRIALS = 3
_TRIED_LAYERS = 6  # so that no weights are in the cache when their turn comes


SHAPES = (
    Variant(1, 1, 4, 6),
    Variant(1, 1, 8, 4),
    Variant(1, 1, 16, 2),
    Variant(1, 2, 8, 3),
    Variant(2, 1, 8, 3),
    Variant(2, 2, 4, 3),
)
SPLITS = (1, 2, 3, 4)
# What an own kernel is worth in a whole step, beyond its time: attention reads its first K and V while QKV is being
# multiplied, and the next product its first weights meanwhile. Measured in steps of opt-1.3b with 32 rows.
HEAD_START_US = {"qkv": 3.0, "out": 0.5}


@dataclass(frozen=True, slots=True)
class Product:
    """Hold what one matrix of a layer does to its input: out = activation(x . weight + bias) (+ residual).

    `name` is the same for all layers. Where `gated`, out has half the matrix's channels: activation(first) * second.
    `norm` is that of the input, where one comes right before the product.
    """

    name: str
    linear: Linear
    activation: int = 0
    gated: bool = False
    norm: Norm | None = None

    @property
    def num_out(self) -> int:
        """Count the output channels."""
        return self.linear.weight.shape[0] // (2 if self.gated else 1)


class Products:
    """Multiply, by the way that was found fastest."""

    def __init__(self, operations: Operations) -> None:
        self.operations, self.dtype, self.device = operations, operations.dtype, operations.device
        self.chosen: dict[tuple[str, int], Variant | None] = {}  # None: cuBLAS
        self.times_us: dict[tuple[str, int], dict[Variant | None, float]] = {}
        self._kernels: dict[int, dict[str, Kernel]] = {}

    def fuses(self, product: Product, num_rows: int) -> bool:
        """Tell whether activation and residual are part of the product for so many rows."""
        return self.chosen.get((product.name, num_rows)) is not None

    def normalises(self, product: Product, num_rows: int) -> bool:
        """Tell whether the product normalises its input for so many rows."""
        variant = self.chosen.get((product.name, num_rows))
        return variant is not None and variant.normed

    def run(self, product: Product, x: Tensor, out: Tensor, residual: Tensor | None, normed: bool = False) -> None:
        """Multiply x [rows, in]; `out` may be float32. The activation and `residual` only where `fuses` says so.

        `normed`: x has still to be normalised, where `normalises` says so.
        """
        variant = self.chosen.get((product.name, len(x)))
        if variant is not None:
            self._launch(replace(variant, normed=normed), product, x, out, residual)
            return
        assert residual is None, "cuBLAS's sum goes to the normalisation, which adds it"
        assert not normed, "cuBLAS takes a normalised input"
        multiply(product.linear, x, out)

    def choose(self, alike: Sequence[Product], num_rows: int, num_out_bytes: int) -> None:
        """Time every way for `alike`, one product of each layer, with its norm and activation; keep the fastest."""
        first = alike[0]
        if (first.name, num_rows) in self.chosen:
            return
        key = self._key(first, num_rows)
        try:
            self.chosen[first.name, num_rows] = recall(key)
            return
        except KeyError:  # the first time on this host
            pass
        times: dict[Variant | None, float] = {None: self._time(None, alike, num_rows, num_out_bytes)}
        for variant in self._variants(first, num_rows):
            times[variant] = self._time(variant, alike, num_rows, num_out_bytes)
        self.times_us[first.name, num_rows] = times
        self.chosen[first.name, num_rows] = agree(key, fastest(times, first.name))

    def _key(self, product: Product, num_rows: int) -> tuple[object, ...]:
        kernel = data_path("kernels", "skinny.cu").read_text(), SHAPES, SPLITS, HEAD_START_US, torch.__version__
        flags = product.activation, product.gated, product.norm is not None, product.linear.bias is not None
        device = torch.cuda.get_device_name(self.device)
        return *kernel, device, str(self.dtype), tuple(product.linear.weight.shape), *flags, num_rows

    def _variants(self, product: Product, num_rows: int) -> list[Variant]:
        num_in = product.linear.weight.shape[1]
        if self.dtype == torch.float32 or num_rows > MOST_ROWS or num_in % 8 or product.linear.weight.numel() == 0:
            return []
        shapes = [s for s in SHAPES if not (product.gated and s.blocks_m % 2)]
        variants = [
            replace(shape, splits=splits)
            for shape in shapes
            for splits in SPLITS
            if splits == 1 or num_in >= 64 * shape.warps_k * splits * 2
        ]
        return variants + [replace(v, normed=True) for v in variants if self._can_normalise(v, product, num_rows)]

    def _can_normalise(self, variant: Variant, product: Product, num_rows: int) -> bool:
        num_in = product.linear.weight.shape[1]
        fits = num_rows <= ROWS_OF_TILE and num_rows * num_in * self.dtype.itemsize <= MOST_NORM_BYTES
        return product.norm is not None and variant.splits == 1 and num_in % NORM_CHUNK == 0 and fits

    def _time(self, variant: Variant | None, alike: Sequence[Product], num_rows: int, num_out_bytes: int) -> float:
        """Give the microseconds of one product, over the layers' own weights in turn."""
        first = alike[0]
        x = torch.randn(num_rows, first.linear.weight.shape[1], device=self.device, dtype=self.dtype)
        wide = torch.float32 if num_out_bytes == 4 else self.dtype
        sums = torch.empty(num_rows, first.linear.weight.shape[0], device=self.device, dtype=wide)
        out = torch.empty(num_rows, first.num_out, device=self.device, dtype=wide)
        normalised = torch.empty_like(x)

        def once() -> None:
            for product in alike[:_TRIED_LAYERS]:
                if product.norm is not None and not (variant and variant.normed):
                    self.operations.add_norm(normalised, x, None, product.norm, True)
                if variant is not None:
                    self._launch(variant, product, x, out, None)
                elif can_activate(product):
                    multiply_activated(product, x, out)
                else:
                    multiply(product.linear, x, sums)
                    if product.activation:
                        self.operations.activate(out, sums, True)

        return 1e3 * graph_ms(once, self.device) / len(alike[:_TRIED_LAYERS])

    def _launch(self, variant: Variant, product: Product, x: Tensor, out: Tensor, residual: Tensor | None) -> None:
        weight = product.linear.weight
        channels = variant.channels // (2 if product.gated else 1)
        grid = -(-product.num_out // channels), variant.splits
        sizes = (len(x), product.num_out, weight.shape[1])
        flags = (product.activation, product.num_out if product.gated else 0, int(out.dtype == torch.float32))
        norm = product.norm
        scale, shift = (norm.weight if norm else None), (norm.bias if isinstance(norm, LayerNorm) else None)
        values = (scale, shift, float(norm.eps if norm else 0.0))
        self._kernel(variant, -(-len(x) // ROWS_OF_TILE)).launch(
            grid,
            variant.num_threads,
            (out, x, weight, product.linear.bias, residual, *sizes, *flags, *values),
            stream=current_stream(self.device),
            shared_bytes=variant.shared_bytes(len(x), weight.shape[1], self.dtype.itemsize),
            overlaps=True,
            cluster=variant.splits,
        )

    def _kernel(self, variant: Variant, tiles: int) -> Kernel:
        if tiles not in self._kernels:
            lines = " ".join(shape.source for shape in SHAPES)
            definitions = type_definition(self.dtype) | {"TILES": tiles, "VARIANTS": lines}
            module = compile_module("skinny", self.device, definitions)
            most = MOST_NORM_BYTES * 9 // 8  # with what lies between rows, and the sums
            self._kernels[tiles] = {s.function: module.kernel(s.function, s.queue_bytes) for s in SHAPES}
            for shape in [replace(s, normed=True) for s in SHAPES if tiles == 1]:
                self._kernels[tiles][shape.function] = module.kernel(shape.function, shape.queue_bytes + most)
        return self._kernels[tiles][variant.function]


def fastest(times_us: Mapping[Variant | None, float], name: str) -> Variant | None:
    """Choose a way by its time alone, less what it lets the attention beside it begin earlier."""
    head_start_us = HEAD_START_US.get(name, 0.0)
    return min(times_us, key=lambda variant: times_us[variant] - (head_start_us if variant else 0.0))


def multiply(linear: Linear, x: Tensor, out: Tensor) -> None:
    """Multiply by cuBLAS into `out` [rows, out], which may be float32."""
    weight = linear.weight.t()
    if out.dtype != x.dtype:
        out.copy_(torch.mm(x, weight))
    elif linear.bias is None:
        torch.mm(x, weight, out=out)
    else:
        torch.addmm(linear.bias, x, weight, out=out)


def can_activate(product: Product) -> bool:
    """Tell whether cuBLAS can add the bias and activate behind the product."""
    activated = product.activation in (ACTIVATIONS["relu"], ACTIVATIONS["gelu_tanh"])
    return activated and product.linear.bias is not None and not product.gated


def multiply_activated(product: Product, x: Tensor, out: Tensor) -> None:
    """Multiply by cuBLAS with the activation behind it into `out` [rows, out]."""
    use_gelu = product.activation == ACTIVATIONS["gelu_tanh"]
    bias, weight = product.linear.bias, product.linear.weight
    torch.ops.aten._addmm_activation.out(bias, x, weight.t(), use_gelu=use_gelu, out=out)


def capture(work: Callable[[], object], device: torch.device) -> torch.cuda.CUDAGraph:
    """Capture what `work` queues on torch's current stream; other threads may use the device meanwhile."""
    torch.cuda.synchronize(device)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.stream(torch.cuda.Stream(device)):  # type: ignore[no-untyped-call]
        graph.capture_begin(capture_error_mode="thread_local")
        work()
        graph.capture_end()
    return graph


def graph_ms(work: Callable[[], object], device: torch.device) -> float:
    """Give the median milliseconds of a graph of `work`, warmed up."""
    work()
    graph = capture(work, device)
    times: list[float] = []
    for trial in range(_TRIALS + 1):
        start, stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))  # type: ignore[no-untyped-call]
        start.record()
        graph.replay()
        stop.record()
        stop.synchronize()
        if trial:
            times.append(start.elapsed_time(stop))
    return statistics.median(times)
