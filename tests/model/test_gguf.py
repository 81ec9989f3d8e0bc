"""Convert tiny GGUF files written here, and compare with arrays dequantised and rounded by an independent reference."""

import contextlib
import json
import math
import multiprocessing
import os
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file

from dejavu.errors import ModelError
from dejavu.model.gguf import cached_directory, convert_gguf
from dejavu.model.gguf_config import llama3_scaling
from dejavu.model.gguf_reader import open_gguf

HIDDEN, HEADS, KV_HEADS, FFN, LAYERS = 64, 4, 2, 96, 2
TOKENS = [*(f"<c{i}>" for i in range(3)), *"abcdefghij", "ab", "abc"]
Q8, Q4 = gguf.GGMLQuantizationType.Q8_0, gguf.GGMLQuantizationType.Q4_1
F32, F16 = gguf.GGMLQuantizationType.F32, gguf.GGMLQuantizationType.F16


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("DEJAVU_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def original_tensors(biases: bool, tied: bool) -> dict[str, tuple[str, np.ndarray, gguf.GGMLQuantizationType]]:
    """Give the tensors of a tiny model by checkpoint name, with the GGUF name and the type that each is stored in."""
    rng = np.random.default_rng(0)
    kv = HIDDEN // HEADS * KV_HEADS
    layer_shapes: dict[tuple[str, str], tuple[tuple[int, ...], Any]] = {
        ("input_layernorm", "attn_norm"): ((HIDDEN,), F32),
        ("self_attn.q_proj", "attn_q"): ((HIDDEN, HIDDEN), Q4),
        ("self_attn.k_proj", "attn_k"): ((kv, HIDDEN), Q8),
        ("self_attn.v_proj", "attn_v"): ((kv, HIDDEN), F16),
        ("self_attn.o_proj", "attn_output"): ((HIDDEN, HIDDEN), Q8),
        ("post_attention_layernorm", "ffn_norm"): ((HIDDEN,), F32),
        ("mlp.gate_proj", "ffn_gate"): ((FFN, HIDDEN), Q4),
        ("mlp.up_proj", "ffn_up"): ((FFN, HIDDEN), Q8),
        ("mlp.down_proj", "ffn_down"): ((HIDDEN, FFN), Q4),
    }
    shapes: dict[tuple[str, str], tuple[tuple[int, ...], Any]] = {
        ("model.embed_tokens.weight", "token_embd.weight"): ((len(TOKENS), HIDDEN), Q8)
    }
    shapes[("model.norm.weight", "output_norm.weight")] = ((HIDDEN,), F32)
    if not tied:
        shapes[("lm_head.weight", "output.weight")] = ((len(TOKENS), HIDDEN), Q8)
    for layer in range(LAYERS):
        for (name, stored), entry in layer_shapes.items():
            shapes[(f"model.layers.{layer}.{name}.weight", f"blk.{layer}.{stored}.weight")] = entry
            if biases and stored in ("attn_q", "attn_k", "attn_v"):
                bias = (entry[0][:1], F32)
                shapes[(f"model.layers.{layer}.{name}.bias", f"blk.{layer}.{stored}.bias")] = bias
    return {
        name: (stored, rng.standard_normal(shape).astype(np.float32), kind)
        for (name, stored), (shape, kind) in shapes.items()
    }


def reference_dequantize(data: np.ndarray, kind: gguf.GGMLQuantizationType) -> np.ndarray:
    """Read ggml's blocks of 32 values byte by byte, as ggml-common.h lays them out."""
    if kind in (F32, F16):
        return data.astype(np.float32)
    size = {Q8: 34, Q4: 20}[kind]
    rows = []
    for row in data:
        values: list[np.ndarray] = []
        for start in range(0, len(row), size):
            block = row[start : start + size].tobytes()
            scale = np.float32(np.frombuffer(block[:2], np.float16)[0])
            if kind == Q8:
                values.append(scale * np.frombuffer(block[2:], np.int8).astype(np.float32))
                continue
            offset = np.float32(np.frombuffer(block[2:4], np.float16)[0])
            packed = np.frombuffer(block[4:], np.uint8)
            nibbles = np.concatenate([packed & 15, packed >> 4]).astype(np.float32)  # low halves first
            values.append(scale * nibbles + offset)
        rows.append(np.concatenate(values))
    return np.stack(rows)


def permute(weights: np.ndarray, heads: int) -> np.ndarray:
    """Order rows as llama.cpp's converter does (convert_hf_to_gguf.py, LlamaModel.permute)."""
    return (
        weights.reshape(heads, 2, weights.shape[0] // heads // 2, *weights.shape[1:])
        .swapaxes(1, 2)
        .reshape(weights.shape)
    )


def write_gguf(
    path: Path, architecture: str = "llama", tied: bool = True, leave_out: str = "", rope: np.ndarray | None = None
) -> dict[str, np.ndarray]:
    """Write a tiny model; gives what a faithful reader gets, by checkpoint name, in float32."""
    writer = gguf.GGUFWriter(path, architecture)
    writer.add_context_length(128)
    writer.add_embedding_length(HIDDEN)
    writer.add_block_count(LAYERS)
    writer.add_feed_forward_length(FFN)
    writer.add_head_count(HEADS)
    writer.add_head_count_kv(KV_HEADS)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_rope_freq_base(10000.0)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("gpt-2")
    writer.add_token_list(TOKENS)
    writer.add_token_types([3] * 3 + [1] * (len(TOKENS) - 3))
    writer.add_token_merges(["a b", "ab c"])
    writer.add_bos_token_id(0)
    writer.add_eos_token_id(1)
    writer.add_eot_token_id(2)
    expected = {}
    for name, (stored, values, kind) in original_tensors(architecture == "qwen2", tied).items():
        part = stored.split(".")[-2]
        ordered = values
        if architecture == "llama" and part in ("attn_q", "attn_k"):
            ordered = permute(values, HEADS if part == "attn_q" else KV_HEADS)
        if stored != leave_out:
            writer.add_tensor(stored, gguf.quants.quantize(ordered, kind), raw_dtype=kind)
        expected[name] = reference_dequantize(gguf.quants.quantize(values, kind), kind)
    if rope is not None:
        writer.add_tensor("rope_freqs.weight", rope.astype(np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return expected


@pytest.mark.parametrize(("architecture", "tied"), [("llama", True), ("llama", False), ("qwen2", False)])
def test_every_tensor_comes_back_bit_for_bit(tmp_path, architecture, tied):
    expected = write_gguf(tmp_path / "tiny.gguf", architecture, tied)
    wide = load_file(convert_gguf(tmp_path / "tiny.gguf", "float32") / "model.safetensors")
    narrow = load_file(convert_gguf(tmp_path / "tiny.gguf") / "model.safetensors")
    assert set(wide) == set(narrow) == set(expected)
    for name, values in expected.items():
        reference = torch.from_numpy(values)
        assert torch.equal(wide[name], reference), name
        assert narrow[name].dtype is torch.bfloat16
        assert torch.equal(narrow[name], reference.bfloat16()), name


def test_configuration_states_the_shape_and_the_stops(tmp_path):
    write_gguf(tmp_path / "tiny.gguf", "qwen2", tied=False)
    directory = convert_gguf(tmp_path / "tiny.gguf")
    config = json.loads((directory / "config.json").read_text())
    wanted = {
        "architectures": ["Qwen2ForCausalLM"],
        "hidden_size": HIDDEN,
        "num_hidden_layers": LAYERS,
        "num_attention_heads": HEADS,
        "num_key_value_heads": KV_HEADS,
        "head_dim": HIDDEN // HEADS,
        "intermediate_size": FFN,
        "vocab_size": len(TOKENS),
        "rms_norm_eps": 1e-5,
        "rope_theta": 10000.0,
        "tie_word_embeddings": False,
        "eos_token_id": 1,
    }
    assert {key: config[key] for key in wanted} == wanted
    assert json.loads((directory / "generation_config.json").read_text())["eos_token_id"] == [1, 2]


def test_cache_follows_the_file(tmp_path):
    path = tmp_path / "tiny.gguf"
    write_gguf(path)
    first = convert_gguf(path)
    stamp = (first / "model.safetensors").stat().st_mtime_ns
    assert convert_gguf(path) == first
    assert (first / "model.safetensors").stat().st_mtime_ns == stamp
    os.utime(path, ns=(1, 1))
    assert convert_gguf(path) != first
    assert convert_gguf(path, "float32") != convert_gguf(path)


def test_two_processes_at_once_both_end_well(tmp_path, cache):
    write_gguf(tmp_path / "tiny.gguf")
    leftover = cached_directory(tmp_path / "tiny.gguf")
    leftover.parent.mkdir(parents=True)
    (leftover.parent / f".{leftover.name}.partial-dead").mkdir()
    with multiprocessing.get_context("fork").Pool(2) as pool:
        found = pool.map(convert_gguf, [tmp_path / "tiny.gguf"] * 2, chunksize=1)
    assert found[0] == found[1]
    assert [entry.name for entry in (cache / "models").iterdir() if entry.is_dir()] == [found[0].name]
    assert cache.stat().st_mode & 0o777 == 0o700


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"architecture": "gemma2"}, "gemma2.*llama, qwen2"),
        ({"leave_out": "blk.1.ffn_up.weight"}, r"blk\.1\.ffn_up\.weight"),
        ({"leave_out": "token_embd.weight"}, "token_embd"),
        ({"rope": np.linspace(1, 5, 8)}, "rope_freqs"),
    ],
)
def test_unsupported_files_are_refused_and_leave_nothing(tmp_path, cache, arguments, message):
    write_gguf(tmp_path / "tiny.gguf", **arguments)
    with pytest.raises(ModelError, match=message):
        convert_gguf(tmp_path / "tiny.gguf")
    assert not [entry for entry in (cache / "models").iterdir() if entry.is_dir()]


@pytest.mark.parametrize("content", [b"", b"not a model", b"GGUF" + bytes(20)])
def test_unreadable_files_are_refused(tmp_path, content):
    (tmp_path / "bad.gguf").write_bytes(content)
    with pytest.raises(ModelError, match=r"bad\.gguf"):
        convert_gguf(tmp_path / "bad.gguf")


def test_truncated_file_is_refused(tmp_path):
    write_gguf(tmp_path / "tiny.gguf")
    content = (tmp_path / "tiny.gguf").read_bytes()
    for length in (100, len(content) // 4, len(content) - 40):
        (tmp_path / "cut.gguf").write_bytes(content[:length])
        with pytest.raises(ModelError, match=r"cut\.gguf"):
            convert_gguf(tmp_path / "cut.gguf")


def test_reader_agrees_with_the_gguf_package(tmp_path):
    write_gguf(tmp_path / "tiny.gguf", "qwen2", rope=np.ones(8))
    ours, theirs = open_gguf(tmp_path / "tiny.gguf"), gguf.GGUFReader(tmp_path / "tiny.gguf")
    fields = {name: field.contents() for name, field in theirs.fields.items() if not name.startswith("GGUF.")}
    assert ours.metadata == fields
    assert list(ours.tensors) == [tensor.name for tensor in theirs.tensors]
    for tensor in theirs.tensors:
        assert ours.tensors[tensor.name].shape == tuple(reversed(tensor.shape.tolist()))
        assert ours.tensors[tensor.name].data.tobytes() == tensor.data.tobytes()


@given(st.lists(st.tuples(st.integers(0, 1500), st.sampled_from([0, 1, 9, 127, 255])), min_size=1, max_size=4))
@settings(max_examples=300, deadline=None)
def test_damaged_headers_are_read_or_refused(damaged, changes):
    path, content = damaged
    altered = bytearray(content)
    for place, value in changes:
        altered[place] = value
    path.write_bytes(altered)
    with contextlib.suppress(ModelError):
        open_gguf(path)


@pytest.fixture(scope="module")
def damaged(tmp_path_factory) -> tuple[Path, bytes]:
    path = tmp_path_factory.mktemp("damaged") / "tiny.gguf"
    write_gguf(path)
    return path, path.read_bytes()


def test_missing_file_is_named(tmp_path):
    with pytest.raises(ModelError, match=r"nowhere\.gguf"):
        convert_gguf(tmp_path / "nowhere.gguf")


def test_llama3_scaling_is_recovered_from_its_divisors():
    """The divisors follow from the definition by wave length in the Llama 3.1 release (`apply_scaling`)."""
    theta, head_dim, factor = 500000.0, 128, 32.0
    divisors = []
    for index in range(head_dim // 2):
        frequency = theta ** (-2 * index / head_dim)
        wavelength = 2 * math.pi / frequency
        scaled = frequency
        if wavelength > 8192 / 1.0:
            scaled = frequency / factor
        elif wavelength > 8192 / 4.0:
            smooth = (8192 / wavelength - 1.0) / (4.0 - 1.0)
            scaled = (1 - smooth) * frequency / factor + smooth * frequency
        divisors.append(float(np.float32(frequency / scaled)))
    assert len({1.0, factor} | set(divisors)) > 4
    assert llama3_scaling(divisors, theta, head_dim)["factor"] == factor
    divisors[20] *= 1.01
    with pytest.raises(ModelError):
        llama3_scaling(divisors, theta, head_dim)
