"""Compare CUDA stages with the CPU's: prompts, chunks and token steps of ragged rows, in every family."""

import json
from dataclasses import replace

import pytest
import torch

from dejavu.device import num_cuda_devices
from dejavu.model.batch import Batch
from dejavu.model.decoder import StageModel
from dejavu.model.families import spec_from_config
from dejavu.model.spec import RopeScaling, Shard
from dejavu.model.table import MODELS
from dejavu.model.weights import dummy_stage, load_stage
from tests.model_zoo import KINDS, NUM_LAYERS, VOCAB_SIZE, make_checkpoint

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(num_cuda_devices() == 0, reason="no CUDA device, or no cuda-python"),
]
GARBAGE = 1e4
CLEAR_GAP = 0.05  # between the two best logits, of their standard deviation: beyond rounding to 16 bits


class Twins:
    """The same stages on the CPU in float32 and on CUDA, fed the same passes; every logit is compared."""

    def __init__(self, spec, load, dtype, num_stages, block_size, num_blocks=60):
        self.spec, self.block_size, self.dtype = spec, block_size, dtype
        each = spec.num_layers // num_stages
        shards = [Shard(i * each, (i + 1) * each, spec.num_layers) for i in range(num_stages)]
        shape = (num_blocks, each, 2, block_size, spec.num_kv_heads, spec.head_dim)
        self.stages = {}
        for device, kind in (("cpu", torch.float32), ("cuda", dtype)):
            models = [StageModel(spec, shard, load(shard, device, kind)) for shard in shards]
            pools = [torch.full(shape, GARBAGE, dtype=kind, device=device) for _ in shards]
            self.stages[device] = models, pools
        self.texts, self.done, self.blocks = {}, {}, {}
        self.free = list(range(0, num_blocks, 2)) + list(range(num_blocks - 1, 0, -2))
        self.errors, self.tokens_compared, self.tokens_differ = [], 0, 0

    def forward(self, device, batch):
        hidden = None
        for model, pool in zip(*self.stages[device], strict=True):
            layers = []
            hidden = model.forward(batch, hidden, pool, layers.append)
            assert layers == list(range(model.shard.first_layer, model.shard.last_layer))
        return hidden.cpu()

    def step(self, rows):
        """Run a pass over (request, new tokens, wants logits), and append each wanted row's greedy token."""
        ids, context, new, blocks = [], [], [], []
        for request, num_new, _ in rows:
            done = self.done.setdefault(request, 0)
            ids += self.texts[request][done : done + num_new]
            context.append(done)
            new.append(num_new)
            self.done[request] += num_new
            own = self.blocks.setdefault(request, [])
            while len(own) * self.block_size < self.done[request]:
                own.append(self.free.pop(0))
            blocks.append(list(own))
        wanted = [index for index, row in enumerate(rows) if row[2]]
        batch = Batch(torch.tensor(ids), new, context, blocks, wanted)
        expected, result = self.forward("cpu", batch), self.forward("cuda", batch)
        assert result.shape == expected.shape
        assert result.dtype == torch.float32
        if wanted:
            self.errors.append(float((result - expected).norm() / expected.norm()))
            best = expected.topk(2).values
            is_clear = best[:, 0] - best[:, 1] > (0 if self.dtype == torch.float32 else CLEAR_GAP) * expected.std(1)
            self.tokens_compared += int(is_clear.sum())
            self.tokens_differ += int((result.argmax(1) != expected.argmax(1))[is_clear].sum())
        for index, token in zip(wanted, expected.argmax(1).tolist(), strict=True):
            self.texts[rows[index][0]].append(token)


def play(twins, vocab_size):
    generator = torch.Generator().manual_seed(5)
    for request, length in enumerate([7, 12, 12, 17, 1, 33]):
        twins.texts[request] = torch.randint(vocab_size, (length,), generator=generator).tolist()
    twins.step([(0, 7, True), (1, 12, True), (2, 12, True)])
    twins.step([(0, 1, True), (1, 1, True), (2, 1, True)])
    twins.step([(1, 1, True), (3, 6, False), (0, 1, True)])
    twins.step([(3, 11, True), (2, 1, True), (4, 1, True)])
    for _ in range(6):
        twins.step([(0, 1, True), (4, 1, True), (3, 1, True), (2, 1, True), (1, 1, True)])
    twins.step([(4, 1, True), (2, 1, False)])
    twins.step([(5, 33, True)])
    for _ in range(3):
        twins.step([(5, 1, True)])


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("num_stages", "block_size"), [(1, 16), (2, 64)])
def test_float32_is_the_cpus(kind, num_stages, block_size, tmp_path):
    directory = make_checkpoint(kind, tmp_path)
    spec = spec_from_config(json.loads((directory / "config.json").read_text()))

    def load(shard, device, dtype):
        return {name: tensor.to(device) for name, tensor in load_stage(directory, spec, shard, dtype).items()}

    assert spec.num_layers == NUM_LAYERS
    twins = Twins(spec, load, torch.float32, num_stages, block_size)
    play(twins, VOCAB_SIZE)
    assert twins.tokens_differ == 0
    assert max(twins.errors) < 1e-5


# kind -> (model of the table, heads, KV heads, head size, what else is different)
SHAPES = {
    "gpt2": ("gpt2", 4, 4, 64, {}),
    "opt": ("opt-13b", 3, 3, 128, {}),
    "opt-80": ("opt-2.7b", 4, 4, 80, {}),
    "opt-post-norm": ("opt-350m", 4, 4, 64, {}),
    "bloom": ("bloom-7b1", 4, 4, 128, {}),
    "llama": ("smollm2-135m", 9, 3, 64, {"rope_scaling": RopeScaling("llama3", 4.0, original_max_positions=64)}),
    "llama-untied": ("llama-3-8b", 8, 2, 128, {"qkv_bias": True, "out_bias": True, "ffn_bias": True}),
    "mistral": ("llama-3-8b", 8, 2, 96, {}),
    "qwen2": ("smollm2-135m", 8, 2, 128, {"qkv_bias": True}),
}
assert set(SHAPES) >= set(KINDS)


def small_spec(kind):
    name, heads, kv_heads, head_dim, changes = SHAPES[kind]
    spec, hidden_size = MODELS[name], heads * head_dim
    ffn_size = 3 * hidden_size if spec.gated_ffn else 4 * hidden_size
    sizes = {"hidden_size": hidden_size, "ffn_size": ffn_size, "num_heads": heads, "num_kv_heads": kv_heads}
    embedding = {"embedding_size": 128} if spec.embedding_size else {}
    fixed = {"num_layers": 4, "head_dim": head_dim, "vocab_size": 1001, "max_positions": 512}
    return replace(spec, **fixed, **sizes, **embedding, **changes)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("kind", SHAPES)
def test_half_precision_is_near(kind, dtype):
    spec = small_spec(kind)

    def load(shard, device, number):
        rounded = dummy_stage(spec, shard, dtype)
        return {name: tensor.to(device, number) for name, tensor in rounded.items()}

    twins = Twins(spec, load, dtype, 2, 16)
    play(twins, spec.vocab_size)
    assert max(twins.errors) < 1e-2
    assert twins.tokens_differ == 0
    assert twins.tokens_compared > 20
    chosen = twins.stages["cuda"][0][0].cuda.products.chosen
    assert {rows for _, rows in chosen} == {1, 2, 4, 8}


def test_tokens_may_lie_on_the_device_and_preparing_leaves_the_pool_alone():
    spec = small_spec("opt")
    weights = dummy_stage(spec, Shard(0, 4, 4), torch.float16)
    model = StageModel(spec, Shard(0, 4, 4), {name: tensor.cuda() for name, tensor in weights.items()})
    pool = torch.zeros(8, 4, 2, 16, spec.num_kv_heads, spec.head_dim, dtype=torch.float16, device="cuda")
    pool.normal_()
    before = pool.clone()
    model.warm_up(pool, [2], 100)
    assert torch.equal(pool, before)
    prompt = Batch(torch.arange(20), [11, 9], [0, 0], [[1], [0]], [0, 1])
    model.forward(prompt, None, pool)
    results = []
    for device in ("cpu", *["cuda"] * 20):  # kernels that begin early find what they wait for, every time
        step = Batch(torch.tensor([5, 6], device=device), [1, 1], [11, 9], [[1], [0]], [0, 1])
        results.append(model.forward(step, None, pool).clone())
    assert all(torch.equal(result, results[0]) for result in results)
