"""Compare the stages with transformers, in float32, over mixed passes, splits and block sizes."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from dejavu.model.batch import Batch
from dejavu.model.decoder import StageModel
from dejavu.model.families import spec_from_config
from dejavu.model.spec import ModelSpec, Shard
from dejavu.model.weights import check_checkpoint, dummy_stage, load_stage
from tests.model_zoo import KINDS, NUM_LAYERS, VOCAB_SIZE, make_model

TOLERANCE = 1e-4
GARBAGE = 1e4  # what the pool holds where nothing was written: seen at once if a mask lets it through
Row = tuple[int, int, bool]  # request, new tokens, wants logits


@pytest.fixture(scope="module")
def zoo(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], tuple[Any, Path, ModelSpec]]:
    """Give the transformers model, the checkpoint and the spec of a kind, made once."""
    made: dict[str, tuple[Any, Path, ModelSpec]] = {}

    def get(kind: str) -> tuple[Any, Path, ModelSpec]:
        if kind not in made:
            model, directory = make_model(kind), tmp_path_factory.mktemp(kind)
            model.save_pretrained(directory)
            spec = spec_from_config(json.loads((directory / "config.json").read_text()))
            check_checkpoint(directory, spec)
            made[kind] = (model, directory, spec)
        return made[kind]

    return get


class Sum:
    """Add tensors over threads that stand for tensor ranks; every thread gets the same result."""

    def __init__(self, size: int) -> None:
        self.barrier = threading.Barrier(size, timeout=20)
        self.parts: list[Tensor | None] = [None] * size

    def for_rank(self, rank: int) -> Callable[[Tensor], None]:
        def all_reduce(tensor: Tensor) -> None:
            assert tensor.is_contiguous()
            self.parts[rank] = tensor.clone()
            self.barrier.wait()
            tensor.copy_(torch.stack([part for part in self.parts if part is not None]).sum(0))
            self.barrier.wait()

        return all_reduce


def in_threads(calls: Sequence[Callable[[], Any]]) -> list[Any]:
    """Run calls side by side; give their results, or raise the first error."""
    results: list[Any] = [None] * len(calls)

    def run(index: int) -> None:
        try:
            results[index] = calls[index]()
        except BaseException as error:
            results[index] = error

    threads = [threading.Thread(target=run, args=(i,)) for i in range(len(calls))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    for result in results:
        if isinstance(result, BaseException):
            raise result
    return results


class Pipeline:
    """A model split over pp stages of tp ranks, each rank with its own pool, in one process."""

    def __init__(self, load: Callable[[Shard], dict[str, Tensor]], spec: ModelSpec, pp: int, tp: int, block: int):
        each = spec.num_layers // pp
        self.stages, self.pools = [], []
        for stage in range(pp):
            shards = [Shard(stage * each, (stage + 1) * each, spec.num_layers, rank, tp) for rank in range(tp)]
            total = Sum(tp)
            self.stages.append(
                [StageModel(spec, s, load(s), total.for_rank(s.tp_rank) if tp > 1 else None) for s in shards]
            )
            dtype = self.stages[0][0].dtype
            shape = (40 if block < 64 else 6, each, 2, block, spec.num_kv_heads // tp, spec.head_dim)
            self.pools.append([torch.full(shape, GARBAGE, dtype=dtype) for _ in shards])

    def forward(self, batch: Batch) -> Tensor:
        """Run all stages; give the logits of the whole vocabulary."""
        hidden: list[Tensor | None] = [None] * len(self.stages[0])
        for ranks, pools in zip(self.stages, self.pools, strict=True):
            before = [None if h is None else h.clone() for h in hidden]
            calls = [
                partial(model.forward, batch, h, pool) for model, h, pool in zip(ranks, hidden, pools, strict=True)
            ]
            after = in_threads(calls)
            for h, b in zip(hidden, before, strict=True):
                assert h is None or b is None or torch.equal(h, b), "the stage changed its input"
            hidden = after
        return torch.cat([part for part in hidden if part is not None], dim=1)


class Client:
    """Feed requests through a pipeline, and compare every row of logits with the reference's."""

    def __init__(self, reference: Any, pipeline: Pipeline, lengths: list[int], block: int) -> None:
        generator = torch.Generator().manual_seed(len(lengths))
        self.reference, self.pipeline, self.block = reference, pipeline, block
        self.texts = [torch.randint(VOCAB_SIZE, (n,), generator=generator).tolist() for n in lengths]
        self.done = [0] * len(lengths)
        self.blocks: list[list[int]] = [[] for _ in lengths]
        num_blocks = pipeline.pools[0][0].shape[0]
        # neighbouring blocks of a row lie apart, and rows are not in the pool's order
        self.free = list(range(0, num_blocks, 2)) + list(range(num_blocks - 1, 0, -2))
        self.checked = 0

    def step(self, rows: list[Row]) -> None:
        """Run one pass, compare, and append each row's greedy token to its text."""
        token_ids: list[int] = []
        context = [self.done[request] for request, _, _ in rows]
        for request, num_new, _ in rows:
            token_ids += self.texts[request][self.done[request] : self.done[request] + num_new]
            self.done[request] += num_new
            while len(self.blocks[request]) * self.block < self.done[request]:
                self.blocks[request].append(self.free.pop(0))
        wanted = [i for i, (_, _, wants) in enumerate(rows) if wants]
        new = [num_new for _, num_new, _ in rows]
        blocks = [list(self.blocks[request]) for request, _, _ in rows]
        logits = self.pipeline.forward(Batch(torch.tensor(token_ids), new, context, blocks, wanted))
        assert logits.shape == (len(wanted), VOCAB_SIZE)
        assert logits.dtype == torch.float32
        for place, index in enumerate(wanted):
            self.compare(rows[index][0], logits[place])

    def compare(self, request: int, logits: Tensor) -> None:
        with torch.no_grad():
            expected = self.reference(torch.tensor([self.texts[request]])).logits[0, -1]
        torch.testing.assert_close(logits, expected, atol=TOLERANCE, rtol=0)
        token = int(expected.argmax())
        assert int(logits.argmax()) == token
        self.texts[request].append(token)
        self.checked += 1

    def finish(self, request: int) -> None:
        """Give the row's blocks back, with what they hold, for the next request."""
        self.free[:0] = self.blocks[request]
        self.blocks[request] = []


def play(client: Client) -> None:
    """Mix prompts of different and of equal lengths, chunks, token steps and a reused row."""
    lengths = [len(text) for text in client.texts]  # 7, 12, 12, 17, 1, 9
    client.step([(0, lengths[0], True), (1, lengths[1], True), (2, lengths[2], True)])
    client.step([(0, 1, True), (1, 1, True), (2, 1, True)])
    client.step([(1, 1, True), (3, 6, False), (0, 1, True)])
    client.step([(3, 7, False), (2, 1, True), (4, 1, True)])
    client.finish(1)
    client.step([(0, 1, True), (3, 4, True), (5, lengths[5], True), (2, 1, True), (4, 1, True)])
    client.step([(4, 1, True), (3, 1, True), (0, 1, True), (5, 1, True)])
    client.step([(5, 1, True)])
    assert client.checked == 20


LENGTHS = [7, 12, 12, 17, 1, 9]


def splits() -> Iterator[tuple[str, int, int, int]]:
    for kind in KINDS:
        yield kind, 1, 1, 64
        yield kind, 3, 2, 4
    yield from [("llama", 2, 2, 64), ("opt-post-norm", 2, 1, 5), ("bloom", 1, 2, 64), ("gpt2", 6, 1, 3)]


@pytest.mark.parametrize(("kind", "pp", "tp", "block"), list(splits()))
def test_matches_transformers(zoo, kind, pp, tp, block):
    reference, directory, spec = zoo(kind)
    pipeline = Pipeline(lambda shard: load_stage(directory, spec, shard, torch.float32), spec, pp, tp, block)
    play(Client(reference, pipeline, LENGTHS, block))


@pytest.mark.parametrize("kind", ["llama", "bloom"])
def test_long_prompt_in_query_chunks(zoo, kind, monkeypatch):
    """Cut masked attention into many calls."""
    reference, directory, spec = zoo(kind)
    monkeypatch.setattr("dejavu.model.attention._QUERY_CHUNK", 8)
    pipeline = Pipeline(lambda shard: load_stage(directory, spec, shard, torch.float32), spec, 1, 1, 64)
    client = Client(reference, pipeline, [30, 50], 64)
    client.step([(0, 30, True), (1, 21, False)])
    client.step([(1, 29, True), (0, 1, True)])


@pytest.mark.parametrize("matmul", ["onednn-packed", "torch"])
def test_both_matrix_products(zoo, matmul, monkeypatch):
    from dejavu.model import layers

    if matmul != layers.pick_matmul(torch.float32, "cpu") and matmul != "torch":
        pytest.skip("this machine's torch has no oneDNN")
    monkeypatch.setattr("dejavu.model.decoder.pick_matmul", lambda dtype, device: matmul)
    reference, directory, spec = zoo("llama-untied")
    pipeline = Pipeline(lambda shard: load_stage(directory, spec, shard, torch.float32), spec, 1, 1, 64)
    assert pipeline.stages[0][0].matmul == matmul
    play(Client(reference, pipeline, LENGTHS, 64))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("kind", ["gpt2", "llama", "bloom"])
def test_half_precision_is_near(zoo, kind, dtype):
    reference, directory, spec = zoo(kind)
    pipeline = Pipeline(lambda shard: load_stage(directory, spec, shard, dtype), spec, 1, 1, 16)
    prompts = torch.randint(VOCAB_SIZE, (2, 20), generator=torch.Generator().manual_seed(3))
    blocks = [[1, 3], [0, 2]]
    logits = pipeline.forward(Batch(prompts.flatten(), [20, 20], [0, 0], blocks, [0, 1]))
    step = pipeline.forward(Batch(torch.tensor([5, 6]), [1, 1], [20, 20], blocks, [0, 1]))
    with torch.no_grad():
        expected = reference(torch.cat([prompts, torch.tensor([[5], [6]])], dim=1)).logits
    tolerance = 0.15 if dtype == torch.bfloat16 else 0.02
    torch.testing.assert_close(logits, expected[:, -2], atol=tolerance, rtol=0)
    torch.testing.assert_close(step, expected[:, -1], atol=tolerance, rtol=0)


def test_no_logits_wanted(zoo):
    _, directory, spec = zoo("llama")
    pipeline = Pipeline(lambda shard: load_stage(directory, spec, shard, torch.float32), spec, 1, 1, 16)
    logits = pipeline.forward(Batch(torch.tensor([4, 5]), [2], [0], [[0]], []))
    assert logits.shape == (0, VOCAB_SIZE)


def test_tied_embeddings_share_memory(zoo):
    _, directory, spec = zoo("llama")
    weights = load_stage(directory, spec, Shard(0, NUM_LAYERS, NUM_LAYERS), torch.float32)
    table = weights["embed.tokens"]
    model = StageModel(spec, Shard(0, NUM_LAYERS, NUM_LAYERS), weights)
    assert model._head is not None
    assert model._head.logits.weight.data_ptr() == table.data_ptr()


@pytest.mark.parametrize("kind", ["gpt2", "opt-post-norm", "bloom", "qwen2"])
def test_dummy_weights_agree_in_every_split(zoo, kind):
    spec = zoo(kind)[2]

    def first_logits(pp: int, tp: int) -> Tensor:
        pipeline = Pipeline(lambda shard: dummy_stage(spec, shard, torch.float32), spec, pp, tp, 16)
        return pipeline.forward(Batch(torch.arange(9), [4, 5], [0, 0], [[1], [0]], [0, 1]))

    whole = first_logits(1, 1)
    assert whole.std() > 1e-3
    torch.testing.assert_close(first_logits(3, 2), whole, atol=1e-5, rtol=0)
