"""Launch the kernels of a stage on torch's current stream: all but the matrix products (cuda_products.py)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Literal

import torch
from torch import Tensor

from dejavu.model.layers import LayerNorm, Norm, alibi_slopes, rope_frequencies
from dejavu.model.spec import ModelSpec, Shard

if TYPE_CHECKING:
    from dejavu.device.cuda_launch import Kernel, KernelModule

THREADS = 256  # of the kernels of tokens.cu but add_norm
ATTENTION_THREADS = 128
VECTOR_BYTES = 16
HEADS_TOGETHER = 4  # query heads that one block of `attend` takes
ACTIVATIONS = {"none": 0, "relu": 1, "gelu": 2, "gelu_tanh": 3, "silu": 4}
_TYPES: Mapping[torch.dtype, Literal["FLOAT16", "BFLOAT16", "FLOAT32"]] = {
    torch.float16: "FLOAT16",
    torch.bfloat16: "BFLOAT16",
    torch.float32: "FLOAT32",
}


def type_definition(dtype: torch.dtype) -> dict[str, object]:
    """Give the definition that names a number format to the kernels."""
    return {_TYPES[dtype]: 1}


def compile_module(name: str, device: torch.device, definitions: Mapping[str, object]) -> KernelModule:
    """Give the kernels of `kernels/<name>.cu` for a device."""
    from dejavu.device.cuda_launch import KernelModule

    major, minor = torch.cuda.get_device_capability(device)
    return KernelModule(name, f"sm_{major}{minor}", definitions)


def current_stream(device: torch.device) -> int:
    """Give torch's current stream."""
    return torch._C._cuda_getCurrentRawStream(device.index or 0)  # a tenth of current_stream's time


@dataclass(frozen=True, slots=True)
class StepInputs:
    """Hold what a token step reads of the host's words (cuda_plan.py), as views of device memory, int32."""

    token_ids: Tensor
    context: Tensor
    table_starts: Tensor
    longest: Tensor
    tables: Tensor


class Operations:
    """The kernels of one stage; `overlaps` lets each begin before the one in front of it has ended."""

    def __init__(self, spec: ModelSpec, shard: Shard, dtype: torch.dtype, device: torch.device) -> None:
        self.spec, self.dtype, self.device = spec, dtype, device
        self.num_heads, self.num_kv_heads = spec.num_heads // shard.tp_size, spec.num_kv_heads // shard.tp_size
        self.num_layers = shard.last_layer - shard.first_layer
        self.activation = ACTIVATIONS[spec.activation]
        self.scale = spec.head_dim**-0.5
        self.rotation = _rotation(spec).to(device) if spec.positions == "rope" else None
        self.slopes: Tensor | None = None
        if spec.positions == "alibi":
            first = shard.tp_rank * self.num_heads
            self.slopes = alibi_slopes(spec.num_heads)[first : first + self.num_heads].to(device)
        self._attend: dict[int, Kernel] = {}

    @cached_property
    def _tokens(self) -> dict[str, Kernel]:
        definitions = type_definition(self.dtype) | {
            "HIDDEN": self.spec.hidden_size,
            "NORM_THREADS": self._norm_threads,
            "HEAD_DIM": self.spec.head_dim,
        }
        if self.spec.norm == "rmsnorm":
            definitions["RMS"] = 1
        module = compile_module("tokens", self.device, definitions)
        return {name: module.kernel(name) for name in ("embed", "activate", "add_norm", "append")}

    @property
    def _norm_threads(self) -> int:
        vectors = -(-self.spec.hidden_size * self.dtype.itemsize // 16)
        return min(1024, -(-vectors // 32) * 32)

    def embed(
        self, out: Tensor, token_ids: Tensor, table: Tensor, positions: Tensor, places: Tensor | None, overlaps: bool
    ) -> None:
        """Write rows of `table` for int32 ids, plus those of `places` for int32 positions, to out [tokens, width]."""
        arguments = (out, None, token_ids, table, positions, places, out.shape[1], self.spec.position_offset)
        self._launch("embed", (len(out), 1), THREADS, arguments, overlaps)

    def add_positions(self, hidden: Tensor, positions: Tensor, places: Tensor, overlaps: bool) -> None:
        """Add rows of `places` to hidden [tokens, hidden_size] in place."""
        arguments = (hidden, hidden, None, None, positions, places, hidden.shape[1], self.spec.position_offset)
        self._launch("embed", (len(hidden), 1), THREADS, arguments, overlaps)

    def add_norm(
        self, out: Tensor | None, hidden: Tensor, partial: Tensor | None, norm: Norm | None, overlaps: bool
    ) -> None:
        """Add `partial` to hidden [tokens, hidden_size] in place, then write its normalisation to `out`.

        `out` may be `hidden`; without it nothing is normalised.
        """
        shift = norm.bias if isinstance(norm, LayerNorm) else None
        weight, epsilon = (None, 0.0) if norm is None else (norm.weight, norm.eps)
        arguments = (out, hidden, partial, None, weight, shift, float(epsilon))
        self._launch("add_norm", (len(hidden), 1), self._norm_threads, arguments, overlaps)

    def activate(self, out: Tensor, x: Tensor, overlaps: bool) -> None:
        """Write the activation of x [tokens, ffn or 2 * ffn] to out [tokens, ffn]: of its first half times the other.

        Where the model's FFN is not gated, `out` may be `x`.
        """
        width = out.shape[1]
        size = VECTOR_BYTES // self.dtype.itemsize
        grid = -(-width // (THREADS * (1 if width % size else size))), len(out)
        arguments = (out, x, width, int(self.spec.gated_ffn), self.activation)
        self._launch("activate", grid, THREADS, arguments, overlaps)

    def append(self, qkv: Tensor, pool: Tensor, positions: Tensor, slots: Tensor, layer: int) -> None:
        """Rotate Q and K of qkv [tokens, (heads + 2 kv_heads) * head_dim] in place, and store K and V to the pool."""
        block_size = pool.shape[3]
        heads = self.num_heads, self.num_kv_heads
        arguments = (qkv, pool, positions, slots, self.rotation, *heads, 2 * block_size, layer, block_size)
        self._launch("append", (len(qkv), 1), THREADS, arguments, False)

    def attend(
        self, out: Tensor, qkv: Tensor, pool: Tensor, inputs: StepInputs, partials: Tensor, arrivals: Tensor, layer: int
    ) -> None:
        """Append a token step's K and V to the pool and attend from its queries, rotated: out [rows, heads * dim].

        `partials` is float32 [items, heads, head_dim + 2], for the most items that the step's `longest` allows;
        `arrivals` int32 zeros [rows, attention_blocks].
        """
        kernel = self._attend_kernel(pool.shape[3])
        words = (inputs.context, inputs.table_starts, inputs.tables, inputs.longest)
        parts = (self.rotation, self.slopes, partials, arrivals)
        arguments = (out, qkv, pool, *words, *parts, len(out), layer, self.scale)
        grid = self.attention_blocks, len(partials)
        stream = current_stream(self.device)
        kernel.launch(grid, ATTENTION_THREADS, arguments, stream=stream, overlaps=True)

    @property
    def attention_blocks(self) -> int:
        """Count the blocks of `attend` that look at one item: at most 4 query heads share one."""
        group = self.num_heads // self.num_kv_heads
        return self.num_kv_heads * -(-group // HEADS_TOGETHER)

    def _attend_kernel(self, block_size: int) -> Kernel:
        if block_size not in self._attend:
            definitions = type_definition(self.dtype) | {
                "HEAD_DIM": self.spec.head_dim,
                "HEADS": self.num_heads,
                "KV_HEADS": self.num_kv_heads,
                "BLOCK_SIZE": block_size,
                "NUM_LAYERS": self.num_layers,
            }
            if self.rotation is not None:
                definitions["ROTARY"] = 1
            if self.slopes is not None:
                definitions["ALIBI"] = 1
            module = compile_module("attend", self.device, definitions)
            self._attend[block_size] = module.kernel("attend")
        return self._attend[block_size]

    def _launch(
        self,
        name: str,
        grid: tuple[int, int],
        num_threads: int,
        arguments: tuple[Tensor | float | None, ...],
        overlaps: bool,
    ) -> None:
        stream = current_stream(self.device)
        self._tokens[name].launch(grid, num_threads, arguments, stream=stream, overlaps=overlaps)


def _rotation(spec: ModelSpec) -> Tensor:
    """Give the cosine and sine of every position and pair of channels: float32 [max_positions, head_dim / 2, 2]."""
    angles = torch.arange(spec.max_positions).float()[:, None] * rope_frequencies(spec)
    return torch.stack((angles.cos(), angles.sin()), dim=-1).contiguous()
