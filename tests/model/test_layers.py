"""Compare single layers with their definitions and with transformers."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from transformers import LlamaConfig
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS
from transformers.models.bloom.modeling_bloom import build_alibi_tensor

from dejavu.model.layers import Linear, RMSNorm, alibi_slopes, pick_matmul, rope_frequencies
from dejavu.model.spec import RopeScaling
from dejavu.model.table import MODELS


@pytest.mark.parametrize("num_heads", [1, 2, 3, 6, 8, 25, 32, 71, 112])
def test_alibi_slopes(num_heads):
    expected = build_alibi_tensor(torch.ones(1, 2), num_heads, torch.float32)[:, 0, 1]
    torch.testing.assert_close(alibi_slopes(num_heads), expected)


def test_llama3_frequencies():
    scaling = RopeScaling("llama3", 8.0, 1.0, 4.0, 8192)
    spec = replace(MODELS["llama-3-8b"], rope_scaling=scaling)
    rope = {
        "rope_theta": spec.rope_theta,
        "rope_type": "llama3",
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
    }
    config = LlamaConfig(hidden_size=4096, num_attention_heads=32, rope_parameters=rope)
    expected, _ = ROPE_INIT_FUNCTIONS["llama3"](config, torch.device("cpu"))
    torch.testing.assert_close(rope_frequencies(spec), expected, rtol=1e-6, atol=0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_rms_norm(dtype):
    x = (torch.randn(5, 96) * torch.tensor([[1e-4], [0.1], [1.0], [10.0], [300.0]])).to(dtype)
    weight = torch.rand(96).to(dtype)
    exact = x.double()
    expected = exact / (exact.square().mean(-1, keepdim=True) + 1e-5).sqrt() * weight.double()
    precision = 1e-5 if dtype == torch.float32 else 2 * torch.finfo(dtype).eps
    torch.testing.assert_close(RMSNorm(weight, 1e-5)(x).double(), expected, rtol=precision, atol=precision)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("num_rows", [1, 8, 130])
def test_linear(dtype, num_rows):
    weight, bias, x = (torch.randn(shape).to(dtype) for shape in ((70, 96), (70,), (num_rows, 96)))
    expected = x.double() @ weight.double().t() + bias.double()
    product = Linear(weight, bias, pick_matmul(dtype, "cpu"))(x)
    assert product.dtype == dtype
    precision = 1e-4 if dtype == torch.float32 else 4 * torch.finfo(dtype).eps
    torch.testing.assert_close(product.double(), expected, rtol=precision, atol=precision * 10)


def test_packed_products_only_on_cpus():
    assert pick_matmul(torch.float32, "cuda") == "torch"
    assert pick_matmul(torch.float64, "cpu") == "torch"
