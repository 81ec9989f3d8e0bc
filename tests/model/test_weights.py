"""Check that checkpoints load alike however they are stored, and that broken ones are named before loading."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from dejavu.errors import ModelError
from dejavu.model.families import spec_from_config
from dejavu.model.spec import ModelSpec, Shard
from dejavu.model.weights import check_checkpoint, load_stage
from tests.model_zoo import NUM_LAYERS, make_checkpoint, make_model

SHARD = Shard(2, NUM_LAYERS, NUM_LAYERS, tp_rank=1, tp_size=2)
PREFIXES = {"gpt2": "transformer.", "bloom": "transformer.", "opt": "model.", "llama": "model."}


def read_spec(directory: Path) -> ModelSpec:
    return spec_from_config(json.loads((directory / "config.json").read_text()))


def rewrite(directory: Path, change: Callable[[dict[str, Tensor]], object]) -> None:
    tensors = load_file(directory / "model.safetensors")
    change(tensors)
    save_file(tensors, directory / "model.safetensors")


@pytest.fixture
def llama(tmp_path: Path) -> Path:
    return make_checkpoint("llama", tmp_path / "llama")


@pytest.mark.parametrize("kind", PREFIXES)
def test_names_without_prefix(kind, tmp_path):
    """Read the names of the checkpoints that were saved from the bare decoder, as the real gpt2 and bloom were."""
    directory = make_checkpoint(kind, tmp_path)
    spec = read_spec(directory)
    expected = load_stage(directory, spec, SHARD, torch.float32)
    tensors = load_file(directory / "model.safetensors")
    save_file({k.removeprefix(PREFIXES[kind]): v for k, v in tensors.items()}, directory / "model.safetensors")
    check_checkpoint(directory, spec)
    torch.testing.assert_close(load_stage(directory, spec, SHARD, torch.float32), expected, atol=0, rtol=0)


def test_sharded_checkpoint(llama, tmp_path):
    make_model("llama").save_pretrained(tmp_path / "sharded", max_shard_size="100KB")
    assert len(list((tmp_path / "sharded").glob("*.safetensors"))) > 2
    spec = read_spec(llama)
    check_checkpoint(tmp_path / "sharded", spec)
    whole = load_stage(llama, spec, SHARD, torch.float32)
    torch.testing.assert_close(load_stage(tmp_path / "sharded", spec, SHARD, torch.float32), whole, atol=0, rtol=0)
    missing = sorted((tmp_path / "sharded").glob("*.safetensors"))[1]
    missing.unlink()
    with pytest.raises(ModelError, match=missing.name):
        check_checkpoint(tmp_path / "sharded", spec)


def test_type_and_memory_are_the_callers(llama):
    spec, made = read_spec(llama), {}

    def allocate(parameter):
        made[parameter.name] = torch.zeros(parameter.shape, dtype=torch.bfloat16)
        return made[parameter.name]

    weights = load_stage(llama, spec, SHARD, torch.bfloat16, allocate=allocate)
    assert weights.keys() == made.keys()
    assert all(weights[name] is tensor for name, tensor in made.items())
    exact = load_stage(llama, spec, SHARD, torch.float32)
    assert all(torch.equal(weights[name], tensor.bfloat16()) for name, tensor in exact.items())


def drop(tensors):
    del tensors["model.layers.3.mlp.up_proj.weight"]


def reshape(tensors):
    tensors["model.layers.3.mlp.up_proj.weight"] = torch.zeros(3, 5)


def quantise(tensors):
    name = "model.layers.3.mlp.up_proj.weight"
    tensors[name] = torch.zeros(tensors[name].shape, dtype=torch.int8)


def rename(tensors):
    tensors["model.wte"] = tensors.pop("model.embed_tokens.weight")


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (drop, ["no tensor model.layers.3.mlp.up_proj.weight"]),
        (reshape, ["model.layers.3.mlp.up_proj.weight", "[3, 5]", "[88, 48]"]),
        (quantise, ["model.layers.3.mlp.up_proj.weight", "I8", "bfloat16"]),
        (rename, ["model.embed_tokens.weight", "not a llama language model"]),
    ],
)
def test_broken_checkpoint_is_named(llama, change, words):
    rewrite(llama, change)
    with pytest.raises(ModelError) as error:
        check_checkpoint(llama, read_spec(llama))
    for word in words:
        assert word in str(error.value)


def test_damaged_files_are_named(llama):
    spec, file = read_spec(llama), llama / "model.safetensors"
    data = file.read_bytes()
    file.write_bytes(data[:-100])
    with pytest.raises(ModelError, match="cut short"):
        check_checkpoint(llama, spec)
    file.write_bytes(b"<html>not found</html>" * 9)
    with pytest.raises(ModelError, match="not a safetensors file"):
        check_checkpoint(llama, spec)
    file.unlink()
    with pytest.raises(ModelError, match="fetch the checkpoint again"):
        check_checkpoint(llama, spec)
    (llama / "pytorch_model.bin").write_bytes(b"")
    with pytest.raises(ModelError, match="convert its pickled weights"):
        check_checkpoint(llama, spec)
