"""Compare the CUDA kernels one by one with plain references in float64, at odd shapes too."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from dejavu.device import num_cuda_devices
from dejavu.model.batch import Batch
from dejavu.model.cuda_plan import BlockTables, ItemCutter, StepLayout, write_step
from dejavu.model.layers import LayerNorm, Linear, RMSNorm, alibi_slopes, rope_frequencies
from dejavu.model.spec import Shard
from dejavu.model.table import MODELS

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(num_cuda_devices() == 0, reason="no CUDA device, or no cuda-python"),
]
TOLERANCE = {torch.float32: 2e-5, torch.float16: 2e-3, torch.bfloat16: 1.6e-2}
GARBAGE = 1e4


def make_spec(head_dim, heads, kv_heads, positions, num_layers=2):
    return replace(
        MODELS["llama-3-8b"],
        num_layers=num_layers,
        hidden_size=heads * head_dim,
        num_heads=heads,
        num_kv_heads=kv_heads,
        head_dim=head_dim,
        positions=positions,
        max_positions=4096,
    )


def operations(spec, dtype):
    from dejavu.model.cuda_operations import Operations

    return Operations(spec, Shard(0, spec.num_layers, spec.num_layers), dtype, torch.device("cuda"))


def error(result, expected):
    difference = (result.double().cpu() - expected.double().cpu()).norm()
    assert torch.isfinite(difference)
    return float(difference / expected.double().norm().cpu())


def rotate(heads, position, spec):
    angles = position * rope_frequencies(spec).double()
    first, second = heads.double().chunk(2, dim=-1)
    return torch.cat((first * angles.cos() - second * angles.sin(), second * angles.cos() + first * angles.sin()), -1)


def naive(spec, query, keys, values):
    """Attend from one row's last token, query [heads, dim], to keys and values [tokens, kv_heads, dim], float64."""
    group = spec.num_heads // spec.num_kv_heads
    keys, values = (x.double().repeat_interleave(group, dim=1) for x in (keys, values))
    scores = torch.einsum("hd,thd->ht", query.double(), keys) * spec.head_dim**-0.5
    if spec.positions == "alibi":
        scores += alibi_slopes(spec.num_heads)[:, None].double() * (torch.arange(len(keys)) - len(keys) + 1)
    return torch.einsum("ht,thd->hd", scores.softmax(-1), values)


CASES = [
    # head size, heads, K/V heads, positions, block size
    (128, 40, 40, "learned", 16),
    (64, 9, 3, "rope", 16),
    (128, 8, 1, "rope", 32),
    (80, 4, 4, "learned", 64),
    (96, 7, 1, "rope", 16),
    (128, 6, 6, "alibi", 16),
    (10, 6, 2, "rope", 100),
    (12, 6, 2, "alibi", 16),
    (8, 4, 1, "learned", 1500),
    (256, 4, 2, "rope", 16),
]


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_attend(case, dtype):
    head_dim, heads, kv_heads, positions, block_size = case
    spec = make_spec(head_dim, heads, kv_heads, positions)
    ops = operations(spec, dtype)
    context = [1, 700, 63, 64, 1300]
    generator = torch.Generator().manual_seed(1)
    needed = [c // block_size + 1 for c in context]
    order = torch.randperm(sum(needed), generator=generator).tolist()
    blocks = [[order.pop() for _ in range(n)] for n in needed]
    pool = torch.full((sum(needed), 2, 2, block_size, kv_heads, head_dim), GARBAGE, dtype=dtype)
    qkv = torch.randn(8, heads + 2 * kv_heads, head_dim, generator=generator).to(dtype)
    expected = []
    for row, length in enumerate(context):
        cache = torch.randn(length, 2, kv_heads, head_dim, generator=generator).to(dtype)
        for token in range(length):
            pool[blocks[row][token // block_size], 1, :, token % block_size] = cache[token]
        new = qkv[row, heads:].view(2, kv_heads, head_dim).double()
        query = qkv[row, :heads]
        if positions == "rope":
            query = rotate(query, length, spec)
            new[0] = rotate(new[0], length, spec).to(dtype)
        whole = torch.cat((cache.double(), new[None]))
        expected.append((naive(spec, query, whole[:, 0], whole[:, 1]), new))
    layout = StepLayout(8, 8 + 5, 400)
    words = np.zeros(layout.num_words, np.int32)
    batch = Batch(torch.zeros(5), [1] * 5, context, blocks, [])
    write_step(layout, batch, BlockTables(), ItemCutter(layout.num_items), words)
    on_device, pool = torch.from_numpy(words).cuda(), pool.cuda()
    before = pool.clone()
    from dejavu.model.cuda_operations import StepInputs

    rows = layout.num_rows
    ids, contexts, starts = (on_device[i * rows : (i + 1) * rows] for i in range(3))
    items = on_device[layout.items_start : layout.tables_start].view(-1, 4)
    inputs = StepInputs(ids, contexts, starts, items, on_device[layout.tables_start :])
    out = torch.full((8, heads * head_dim), GARBAGE, dtype=dtype, device="cuda")
    partials = torch.empty(layout.num_items, heads, head_dim + 2, device="cuda")
    arrivals = torch.zeros(8, ops.attention_blocks, dtype=torch.int32, device="cuda")
    for _ in range(2):  # the counters are as they were
        ops.attend(out, qkv.cuda(), pool, inputs, partials, arrivals, 1)
    torch.cuda.synchronize()
    assert not arrivals.any()
    assert (out[5:] == GARBAGE).all()
    for row, (attended, new) in enumerate(expected):
        assert error(out[row].view(heads, head_dim), attended) < TOLERANCE[dtype]
        place = blocks[row][context[row] // block_size], 1, slice(None), context[row] % block_size
        assert error(pool[place], new) < TOLERANCE[dtype]
        before[place] = pool[place]
    assert torch.equal(pool, before), "nothing else is written"


def make_products(dtype):
    from dejavu.model.cuda_products import Products

    return Products(dtype, torch.device("cuda"))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("num_rows", [1, 2, 3, 8, 16, 24, 29, 32])
@pytest.mark.parametrize(("num_out", "num_in"), [(1000, 1544), (96, 72), (257, 4096)])
def test_products(num_out, num_in, num_rows, dtype):
    from dejavu.model.cuda_products import SHAPES, Product, Variant

    products, generator = make_products(dtype), torch.Generator().manual_seed(num_rows)
    x = torch.randn(num_rows, num_in, generator=generator).to(dtype).cuda()
    for gated in (False, True):
        weight, bias = (
            torch.randn(num_out * (1 + gated), num_in + 1, generator=generator).to(dtype).split([num_in, 1], 1)
        )
        linear = Linear(weight.contiguous().cuda(), bias.flatten().contiguous().cuda(), "torch")
        residual = torch.randn(num_rows, num_out, generator=generator).to(dtype).cuda()
        sums = x.double() @ linear.weight.double().T + linear.bias.double()
        expected = torch.nn.functional.silu(sums[:, :num_out]) * sums[:, num_out:] if gated else sums.relu()
        for shape in SHAPES:
            for splits in (1, 2, 3, 4):
                if gated and shape.blocks_m % 2:
                    continue
                variant = Variant(shape.blocks_m, shape.warps_m, shape.warps_k, shape.stages, splits)
                product = Product("one", linear, 4 if gated else 1, gated)
                for wide in (False, True):
                    kind = torch.float32 if wide else dtype
                    out = torch.full((num_rows, num_out), torch.nan, dtype=kind, device="cuda")
                    products._launch(variant, product, x, out, residual)
                    assert error(out, expected + residual.double()) < TOLERANCE[dtype], (variant, gated, wide)


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("hidden_size", [5120, 768, 50, 14336])
def test_normalisations(hidden_size, dtype):
    spec = replace(MODELS["opt-13b"], hidden_size=hidden_size)
    hidden, partial = torch.randn(2, 7, hidden_size).to(dtype).cuda()
    weight, shift = torch.randn(2, hidden_size).to(dtype).cuda()
    for norm in (LayerNorm(weight, shift, 1e-5), RMSNorm(weight, 1e-6)):
        ops = operations(replace(spec, norm="layernorm" if isinstance(norm, LayerNorm) else "rmsnorm"), dtype)
        for more in (None, partial):
            total = hidden if more is None else hidden + more
            held, out = hidden.clone(), torch.full_like(hidden, torch.nan)
            ops.add_norm(out, held, more, norm, False)
            assert torch.equal(held, total)
            assert error(out, norm(total.float()) if dtype == torch.float32 else norm(total)) < TOLERANCE[dtype]
            ops.add_norm(held, hidden.clone() if more is None else held.copy_(hidden), more, norm, True)
    held = hidden.clone()
    ops.add_norm(None, held, partial, None, False)
    assert torch.equal(held, hidden + partial)


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("activation", ["relu", "gelu", "gelu_tanh", "silu"])
@pytest.mark.parametrize("gated", [False, True])
def test_activations(activation, gated, dtype):
    from dejavu.model.layers import make_activation

    spec = replace(MODELS["opt-13b"], activation=activation, gated_ffn=gated)
    x = torch.randn(5, 1234).to(dtype).cuda()
    out = torch.full((5, 617), torch.nan, dtype=dtype, device="cuda") if gated else x.clone()
    operations(spec, dtype).activate(out, x if gated else out, False)
    assert error(out, make_activation(spec)(x.double())) < TOLERANCE[dtype]
