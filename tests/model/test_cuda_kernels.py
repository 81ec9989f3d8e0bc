"""Compare the CUDA kernels with plain references in float64, at odd shapes: on a GPU, and a few emulated on the CPU."""

import shutil
from dataclasses import replace
from itertools import product

import numpy as np
import pytest
import torch

from dejavu.device import num_cuda_devices
from dejavu.model import cuda_operations, cuda_products
from dejavu.model.batch import Batch
from dejavu.model.cuda_choices import Variant
from dejavu.model.cuda_operations import ACTIVATIONS, Operations
from dejavu.model.cuda_pass import StageParts, layer_parts
from dejavu.model.cuda_plan import BlockTables, StepLayout, write_step
from dejavu.model.cuda_products import SHAPES, Product, Products
from dejavu.model.cuda_steps import StepMemory, TokenPass
from dejavu.model.decoder import StageModel
from dejavu.model.layers import LayerNorm, Linear, RMSNorm, alibi_slopes, make_activation, rope_frequencies
from dejavu.model.spec import Shard
from dejavu.model.table import MODELS
from dejavu.model.weights import dummy_stage
from tests.model.emulation import COMPILER, EmulatedModule

TOLERANCE = {torch.float32: 2e-5, torch.float16: 2e-3, torch.bfloat16: 1.6e-2}
GARBAGE = 1e4

gpu = [pytest.mark.gpu, pytest.mark.skipif(num_cuda_devices() == 0, reason="no CUDA device, or no cuda-python")]
emulated = pytest.mark.skipif(shutil.which(COMPILER) is None, reason=f"no {COMPILER}")


@pytest.fixture(scope="module")
def compiled(tmp_path_factory):
    return tmp_path_factory.mktemp("emulated")


@pytest.fixture
def device(request, compiled, monkeypatch):
    """Give a device: "cpu" is one whose kernels are emulated."""
    if request.param == "cpu":
        emulate(monkeypatch, compiled)
    return torch.device(request.param)


def emulate(monkeypatch, compiled):
    for module in (cuda_operations, cuda_products):
        monkeypatch.setattr(module, "compile_module", lambda name, _, lines: EmulatedModule(compiled, name, lines))
        monkeypatch.setattr(module, "current_stream", lambda _: 0)


def cases(names, on_gpu, by_emulation):
    """Run a test over all combinations on a GPU, and over a few by emulation, which is slow."""
    given = [pytest.param(*case, "cuda", marks=gpu) for case in product(*on_gpu)]
    given += [pytest.param(*case, "cpu", marks=emulated) for case in by_emulation]
    return pytest.mark.parametrize((*names, "device"), given, indirect=["device"], ids=str)


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


def operations(spec, dtype, device):
    return Operations(spec, Shard(0, spec.num_layers, spec.num_layers), dtype, device)


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


SMALL = [  # head size, heads, K/V heads, positions, block size
    (10, 6, 2, "rope", 100),
    (12, 6, 1, "alibi", 16),
    (64, 2, 2, "learned", 16),
]
CASES = [
    *SMALL,
    (128, 40, 40, "learned", 16),
    (64, 9, 3, "rope", 16),
    (128, 8, 1, "rope", 32),
    (80, 4, 4, "learned", 64),
    (96, 7, 1, "rope", 16),
    (128, 6, 6, "alibi", 16),
    (8, 4, 1, "learned", 1500),
    (256, 4, 2, "rope", 16),
]


@cases(
    ("case", "spare", "dtype"),
    (CASES, (1, 40), TOLERANCE),
    [*((case, 40, torch.float32) for case in SMALL), (SMALL[0], 1, torch.float16)],
)
def test_attend(case, spare, dtype, device):
    head_dim, heads, kv_heads, positions, block_size = case
    spec = make_spec(head_dim, heads, kv_heads, positions)
    ops = operations(spec, dtype, device)
    context = [1, 700, 63, 64, 1300] if device.type == "cuda" else [1, 170, 63, 64, 65]
    generator = torch.Generator().manual_seed(1)
    needed = [c // block_size + 1 for c in context]
    order = torch.randperm(sum(needed), generator=generator).tolist()
    blocks = [[order.pop() for _ in range(n)] for n in needed]
    pool = torch.full((sum(needed), 2, 2, block_size, kv_heads, head_dim), GARBAGE, dtype=dtype)
    pool[:, :, :, 1::2] = torch.nan  # seen even where its weight is 0
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
    layout = StepLayout(8, 8 + spare, 400)
    words = np.zeros(layout.num_words, np.int32)
    write_step(layout, Batch(torch.zeros(5), [1] * 5, context, blocks, []), BlockTables(), words)
    memory = StepMemory(StageParts(spec, Shard(0, 2, 2), ops, None, None, [], None), layout)
    memory.words.copy_(torch.from_numpy(words))
    pool, qkv = pool.to(device), qkv.to(device)
    before = pool.clone()
    out = torch.full((8, heads * head_dim), GARBAGE, dtype=dtype, device=device)
    for _ in range(2):  # the counters are as they were
        ops.attend(out, qkv, pool, memory.inputs, memory.partials, memory.arrivals, 1)
    assert not memory.arrivals.any()
    assert (out[5:] == GARBAGE).all()
    for row, (attended, new) in enumerate(expected):
        assert error(out[row].view(heads, head_dim), attended) < TOLERANCE[dtype]
        place = blocks[row][context[row] // block_size], 1, slice(None), context[row] % block_size
        assert error(pool[place], new) < TOLERANCE[dtype]
        before[place] = pool[place]
    assert torch.equal(pool.nan_to_num(7), before.nan_to_num(7)), "nothing else is written"


def products_on(device, dtype):
    return Products(operations(make_spec(64, 4, 4, "learned"), dtype, device))


@cases(
    ("sizes", "num_rows", "dtype"),
    (((1000, 1544), (96, 72), (257, 4096)), (1, 2, 3, 8, 16, 24, 29, 32), (torch.float16, torch.bfloat16)),
    [((65, 712), 3, torch.float16), ((33, 392), 29, torch.float16)],
)
def test_products(sizes, num_rows, dtype, device):
    num_out, num_in = sizes
    products, generator = products_on(device, dtype), torch.Generator().manual_seed(num_rows)
    x = torch.randn(num_rows, num_in, generator=generator).to(device, dtype)
    for gated in (False, True):
        weight = torch.randn(num_out * (1 + gated), num_in, generator=generator).to(device, dtype)
        linear = Linear(weight, torch.randn(len(weight), generator=generator).to(device, dtype), "torch")
        residual = torch.randn(num_rows, num_out, generator=generator).to(device, dtype)
        sums = x.double() @ linear.weight.double().T + linear.bias.double()
        expected = torch.nn.functional.silu(sums[:, :num_out]) * sums[:, num_out:] if gated else sums.relu()
        task = Product("one", linear, ACTIVATIONS["silu" if gated else "relu"], gated)
        for shape in SHAPES:
            if gated and shape.blocks_m % 2:
                continue
            for splits in (1, 2, 3, 4) if device.type == "cuda" else (1, 3):
                for wide in (torch.float32, dtype)[: 2 if device.type == "cuda" else splits]:
                    out = torch.full((num_rows, num_out), torch.nan, dtype=wide, device=device)
                    variant = replace(shape, splits=splits)
                    products._launch(variant, task, x, out, residual)
                    assert error(out, expected + residual.double()) < TOLERANCE[dtype], (variant, gated, wide)


@cases(
    ("sizes", "dtype"),
    (((1, 256), (2, 5120), (5, 2048), (8, 2048)), (torch.float16, torch.bfloat16)),
    [((3, 512), torch.float16)],
)
def test_products_that_normalise(sizes, dtype, device):
    num_rows, num_in = sizes
    products, generator = products_on(device, dtype), torch.Generator().manual_seed(num_rows)
    x, weight, scale, shift, bias = (
        torch.randn(size, generator=generator).to(device, dtype) + 1
        for size in ((num_rows, num_in), (50, num_in), num_in, num_in, 50)
    )
    for norm in (LayerNorm(scale, shift, 1e-5), RMSNorm(scale, 1e-6)):
        task = Product("one", Linear(weight, bias, "torch"), norm=norm)
        expected = norm(x).double() @ weight.double().T + bias.double()
        for shape in SHAPES:
            variant = replace(shape, normed=True)
            assert products._can_normalise(variant, task, num_rows)
            out = torch.full((num_rows, 50), torch.nan, dtype=dtype, device=device)
            products._launch(variant, task, x, out, None)
            assert error(out, expected) < TOLERANCE[dtype], variant


@cases(
    ("hidden_size", "dtype"),
    ((5120, 768, 50, 14336), TOLERANCE),
    [(768, torch.float32), (50, torch.float16)],
)
def test_normalisations(hidden_size, dtype, device):
    spec = replace(MODELS["opt-13b"], hidden_size=hidden_size)
    hidden, partial = torch.randn(2, 7, hidden_size).to(device, dtype)
    weight, shift = torch.randn(2, hidden_size).to(device, dtype)
    for norm in (LayerNorm(weight, shift, 1e-5), RMSNorm(weight, 1e-6)):
        kind = "layernorm" if isinstance(norm, LayerNorm) else "rmsnorm"
        ops = operations(replace(spec, norm=kind), dtype, device)
        for more in (None, partial):
            total = hidden if more is None else hidden + more
            held, out = hidden.clone(), torch.full_like(hidden, torch.nan)
            ops.add_norm(out, held, more, norm, False)
            assert torch.equal(held, total)
            assert error(out, norm(total)) < TOLERANCE[dtype]
            held.copy_(hidden)
            ops.add_norm(held, held, more, norm, True)
            assert torch.equal(held, out)
    held = hidden.clone()
    ops.add_norm(None, held, partial, None, False)
    assert torch.equal(held, hidden + partial)


@cases(
    ("width", "activation", "gated", "dtype"),
    ((617, 640), ("relu", "gelu", "gelu_tanh", "silu"), (False, True), TOLERANCE),
    [(617, "gelu_tanh", False, torch.float32), (640, "silu", True, torch.float32)],
)
def test_activations(width, activation, gated, dtype, device):
    spec = replace(MODELS["opt-13b"], activation=activation, gated_ffn=gated)
    x = torch.randn(5, width * (1 + gated)).to(device, dtype)
    out = torch.full((5, width), torch.nan, dtype=dtype, device=device)
    operations(spec, dtype, device).activate(out, x, False)
    assert error(out, make_activation(spec)(x.double().clone())) < TOLERANCE[dtype]


def small_spec(name, **changes):
    return replace(
        MODELS[name],
        num_layers=2,
        hidden_size=256,
        num_heads=4,
        num_kv_heads=2 if MODELS[name].gated_ffn else 4,
        head_dim=64,
        ffn_size=96,
        vocab_size=70,
        max_positions=64,
        **changes,
    )


NORMED = {name: Variant(2, 1, 8, 3, normed=True) for name in ("qkv", "ffn_in")}
STEPS = [
    (small_spec("llama-3-8b"), {**NORMED, "out": Variant(1, 1, 4, 6, 2), "ffn_out": None, "logits": SHAPES[0]}),
    (small_spec("opt-13b"), {**NORMED, "out": Variant(2, 2, 4, 3), "ffn_out": SHAPES[0], "logits": None}),
    (small_spec("opt-350m", embedding_size=40), {"qkv": SHAPES[1], "ffn_in": SHAPES[0], "logits": SHAPES[0]}),
    (small_spec("bloom-560m"), {}),
]


@emulated
@pytest.mark.parametrize(("spec", "chosen"), STEPS)
def test_token_step_by_emulated_kernels(spec, chosen, compiled, monkeypatch):
    """Run what a graph captures, with given ways to multiply, beside the CPU's stage."""
    emulate(monkeypatch, compiled)
    shard, context, dtype = Shard(0, 2, 2), [3, 17, 30], torch.float16
    weights = dummy_stage(spec, shard, dtype)
    exact = StageModel(spec, shard, {name: tensor.float() for name, tensor in weights.items()})
    model = StageModel(spec, shard, weights)
    blocks = [[3], [0, 5], [2, 1]]
    pool = torch.full((6, 2, 2, 16, spec.num_kv_heads, spec.head_dim), GARBAGE)
    exact.forward(Batch(torch.arange(50), context, [0, 0, 0], blocks, []), None, pool)
    own_pool = pool.to(dtype)
    step = Batch(torch.tensor([7, 8, 9]), [1, 1, 1], context, blocks, [0, 1, 2])
    expected = exact.forward(step, None, pool)

    operations_ = Operations(spec, shard, dtype, torch.device("cpu"))
    products = Products(operations_)
    products.chosen = {(name, 4): variant for name, variant in chosen.items()}
    layers = [layer_parts(spec, layer, operations_.activation) for layer in model._layers]
    parts = StageParts(spec, shard, operations_, model._embedding, model._head, layers, None)
    layout = StepLayout(4, 9, 20)
    memory = StepMemory(parts, layout)
    words = memory.words.numpy()
    words[:3] = [7, 8, 9]
    write_step(layout, step, BlockTables(), words)
    result = TokenPass(parts, products, memory, own_pool).run()
    assert error(result[:3], expected) < 1e-2
    for row, length in enumerate(context):
        place = blocks[row][length // 16], slice(None), slice(None), length % 16
        assert error(own_pool[place], pool[place]) < 1e-2
