"""The pieces of a decoder layer: matrix products, normalisations, activations, rotary positions."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import cache
from typing import Literal

import torch
import torch.nn.functional as F  # noqa: N812 (the name that every torch program uses)
from torch import Tensor

from dejavu.model.spec import ModelSpec

Matmul = Literal["onednn-packed", "onednn", "torch"]
_PACKED_ROWS = 8  # rows that the packed layout is chosen for: as good for 1 and for 1024, unlike a choice for 1


@cache
def pick_matmul(dtype: torch.dtype, device_type: str) -> Matmul:
    """Pick how matrices multiply: from weights in oneDNN's own layout where this machine can, else as torch does.

    On CPUs, packed weights are worth a factor of 2 (docs/notes.md). Which one is in use is `StageModel.matmul`.
    """
    if device_type != "cpu" or dtype == torch.float64:
        return "torch"
    generator = torch.Generator().manual_seed(0)
    weight, x = (torch.rand(rows, 32, generator=generator).to(dtype) for rows in (16, 4))
    try:
        packed = _onednn_product(x, torch.ops.mkldnn._reorder_linear_weight(weight, _PACKED_ROWS), None)
    except (RuntimeError, NotImplementedError, AttributeError):  # no oneDNN, or no such type on this processor
        return "torch"
    exact = torch.allclose(packed.float(), x.float() @ weight.float().T, rtol=2e-2, atol=2e-2)
    return "onednn-packed" if exact else "torch"


def share_matmul(matmul: Matmul) -> Matmul:
    """Pick how to multiply by weights that stay plain, as those that the embedding uses too."""
    return "onednn" if matmul == "onednn-packed" else matmul


def _onednn_product(x: Tensor, packed: Tensor, bias: Tensor | None) -> Tensor:
    product: Tensor = torch.ops.mkldnn._linear_pointwise.default(x, packed, bias, "none", [], "")
    return product


class Linear:
    """Multiply by a matrix [out, in], given plain; a packed one replaces it, so that it is held once."""

    __slots__ = ("_product", "bias", "weight")

    def __init__(self, weight: Tensor, bias: Tensor | None, matmul: Matmul) -> None:
        pack = matmul == "onednn-packed" and weight.numel() > 0
        self.weight = torch.ops.mkldnn._reorder_linear_weight(weight, _PACKED_ROWS) if pack else weight
        self.bias = bias
        self._product: Callable[[Tensor, Tensor, Tensor | None], Tensor] = (
            F.linear if matmul == "torch" or weight.numel() == 0 else _onednn_product
        )

    def __call__(self, x: Tensor) -> Tensor:
        """Give x [tokens, in] times the matrix, plus the bias, as a new tensor [tokens, out]."""
        return self._product(x, self.weight, self.bias)


class LayerNorm:
    """Normalise the mean and the variance of each token."""

    __slots__ = ("bias", "eps", "shape", "weight")

    def __init__(self, weight: Tensor, bias: Tensor, eps: float) -> None:
        self.weight, self.bias, self.eps, self.shape = weight, bias, eps, weight.shape

    def __call__(self, x: Tensor) -> Tensor:
        """Give a new tensor of x's shape [tokens, hidden_size]."""
        return F.layer_norm(x, self.shape, self.weight, self.bias, self.eps)


class RMSNorm:
    """Normalise the mean square of each token, computed in float32."""

    __slots__ = ("_eps_tensor", "_mean_factor", "eps", "weight")

    def __init__(self, weight: Tensor, eps: float) -> None:
        self.weight, self.eps = weight, eps
        self._mean_factor = 1.0 / weight.numel()
        self._eps_tensor = torch.full((1,), eps, dtype=torch.float32, device=weight.device)

    def __call__(self, x: Tensor) -> Tensor:
        """Give a new tensor of x's shape [tokens, hidden_size]."""
        if x.device.type != "cpu":
            return F.rms_norm(x, self.weight.shape, self.weight, self.eps)
        # torch has no fused kernel on CPUs: five small operations instead of its nine.
        norm = torch.linalg.vector_norm(x, 2, -1, keepdim=True, dtype=torch.float32)
        inverse = torch.addcmul(self._eps_tensor, norm, norm, value=self._mean_factor).rsqrt_()
        return torch.mul(x, inverse, out=torch.empty_like(x)).mul_(self.weight)


Norm = LayerNorm | RMSNorm


def make_norm(spec: ModelSpec, weights: dict[str, Tensor], name: str) -> Norm:
    """Make the normalisation `name` of the kind that the model has."""
    if spec.norm == "rmsnorm":
        return RMSNorm(weights[f"{name}.weight"], spec.norm_eps)
    return LayerNorm(weights[f"{name}.weight"], weights[f"{name}.bias"], spec.norm_eps)


def _gelu(x: Tensor) -> Tensor:
    return F.gelu(x)


def _gelu_tanh(x: Tensor) -> Tensor:
    return F.gelu(x, approximate="tanh")


_ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "relu": torch.relu_,
    "gelu": _gelu,
    "gelu_tanh": _gelu_tanh,
    "silu": F.silu,
}


def make_activation(spec: ModelSpec) -> Callable[[Tensor], Tensor]:
    """Make the function from the FFN's first product to the second's input; it may overwrite the former."""
    activate = _ACTIVATIONS[spec.activation]
    if not spec.gated_ffn:
        return activate

    def gated(x: Tensor) -> Tensor:
        gate, up = x.chunk(2, dim=-1)
        return activate(gate).mul_(up)

    return gated


def rope_frequencies(spec: ModelSpec) -> Tensor:
    """Give the angle per position of each pair of a head's channels: float32 [head_dim / 2].

    Scaling as in Llama 3.1: low frequencies are divided by the factor, high ones kept, those between interpolated.
    """
    exponents = torch.arange(0, spec.head_dim, 2, dtype=torch.int64).float() / spec.head_dim
    frequencies = 1.0 / spec.rope_theta**exponents
    scaling = spec.rope_scaling
    if scaling is None:
        return frequencies
    if scaling.kind == "linear":
        return frequencies / scaling.factor
    turns = scaling.original_max_positions * frequencies / (2 * math.pi)
    kept = (turns - scaling.low_freq_factor) / (scaling.high_freq_factor - scaling.low_freq_factor)
    kept = kept.clamp(0.0, 1.0)
    return frequencies * (kept + (1.0 - kept) / scaling.factor)


class Rotation:
    """Rotate Q and K heads by the positions of one pass; made once per pass."""

    __slots__ = ("cos", "sin")

    def __init__(self, positions: Tensor, frequencies: Tensor, dtype: torch.dtype) -> None:
        angles = positions[:, None].float() * frequencies
        cos, sin = angles.cos(), angles.sin()
        # Both halves of a head, [tokens, 1, 2, head_dim / 2]: (a, b) turns to (a cos - b sin, b cos + a sin).
        self.cos = torch.stack((cos, cos), dim=1).unsqueeze(1).to(dtype)
        self.sin = torch.stack((-sin, sin), dim=1).unsqueeze(1).to(dtype)

    def apply_(self, heads: Tensor) -> None:
        """Rotate heads [tokens, num_heads, head_dim] in place."""
        halves = heads.view(*heads.shape[:2], 2, -1)
        swapped = halves.flip(2)
        halves.mul_(self.cos).addcmul_(swapped, self.sin)


def alibi_slopes(num_heads: int) -> Tensor:
    """Give each head's penalty per token of distance: float32 [num_heads].

    As arXiv 2108.12409: a geometric series for a power of two, and every other term of the next finer one for the
    heads beyond it.
    """
    power = 1 << (num_heads.bit_length() - 1)
    slopes = [2.0 ** (-8.0 * (i + 1) / power) for i in range(power)]
    slopes += [2.0 ** (-4.0 * (2 * i + 1) / power) for i in range(num_heads - power)]
    return torch.tensor(slopes, dtype=torch.float32)
