"""Translate a GGUF file's metadata and tensor names into a Hugging Face configuration and checkpoint names.

Source: the GGUF specification (ggml `docs/gguf.md`) and llama.cpp's converter from Hugging Face checkpoints. Pure.
"""

import math
import re
from collections.abc import Mapping, Sequence
from typing import Any

from dejavu.errors import ModelError

Metadata = Mapping[str, Any]

ARCHITECTURES = {"llama": ("llama", "LlamaForCausalLM"), "qwen2": ("qwen2", "Qwen2ForCausalLM")}

_TOP_NAMES = {"token_embd": "model.embed_tokens", "output_norm": "model.norm", "output": "lm_head"}
_LAYER_NAMES = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
ROPE_FACTORS = "rope_freqs.weight"  # Llama 3.1's per-frequency divisors, which its configuration states as parameters


def checkpoint_name(tensor: str) -> str:
    """Give the Hugging Face name of the GGUF tensor `tensor`; raises ModelError for one that no known layer has."""
    match = re.fullmatch(r"(?:blk\.(\d+)\.)?(\w+)\.(weight|bias)", tensor)
    layer, part, kind = match.groups() if match else (None, "", "")
    name = _TOP_NAMES.get(part) if layer is None else _LAYER_NAMES.get(part)
    if name is None:
        raise ModelError(f"tensor {tensor!r} belongs to no layer that this program knows: give a plain dense model")
    return f"model.layers.{layer}.{name}.{kind}" if layer is not None else f"{name}.{kind}"


def build_config(metadata: Metadata, tensors: Sequence[str], vocab_size: int) -> dict[str, Any]:
    """Build the `config.json` of the model that `metadata` and the names of its tensors describe.

    Raises ModelError for an architecture, or a variant of one, that is not supported.
    """
    architecture = _architecture(metadata)
    model_type, class_name = ARCHITECTURES[architecture]
    values = {key.removeprefix(f"{architecture}."): value for key, value in metadata.items()}
    heads = _required(values, "attention.head_count")
    config = {
        "architectures": [class_name],
        "model_type": model_type,
        "hidden_size": _required(values, "embedding_length"),
        "num_hidden_layers": _required(values, "block_count"),
        "num_attention_heads": heads,
        "num_key_value_heads": values.get("attention.head_count_kv", heads),
        "head_dim": _head_dim(values, heads),
        "intermediate_size": _required(values, "feed_forward_length"),
        "vocab_size": vocab_size,
        "max_position_embeddings": _required(values, "context_length"),
        "rms_norm_eps": shortest_float32(_required(values, "attention.layer_norm_rms_epsilon")),
        "rope_theta": shortest_float32(values.get("rope.freq_base", 10000.0)),
        "rope_scaling": _rope_scaling(values),
        "hidden_act": "silu",
        "attention_bias": "blk.0.attn_output.bias" in tensors,
        "mlp_bias": "blk.0.ffn_down.bias" in tensors,
        "tie_word_embeddings": "output.weight" not in tensors,
        "bos_token_id": metadata.get("tokenizer.ggml.bos_token_id"),
        "eos_token_id": metadata.get("tokenizer.ggml.eos_token_id"),
    }
    _check_tensors(config, tensors)
    return config


def build_generation_config(metadata: Metadata) -> dict[str, Any]:
    """Build `generation_config.json`: the begin-of-sequence id, and every id that ends a sequence, turn or message."""
    ends = (metadata.get(f"tokenizer.ggml.{name}_token_id") for name in ("eos", "eot", "eom"))
    return {
        "bos_token_id": metadata.get("tokenizer.ggml.bos_token_id"),
        "eos_token_id": list(dict.fromkeys(token for token in ends if token is not None)),
        "pad_token_id": metadata.get("tokenizer.ggml.padding_token_id"),
    }


def llama3_scaling(factors: Sequence[float], theta: float, head_dim: int) -> dict[str, Any]:
    """Recover Llama 3.1's `rope_scaling` from the divisors of its frequencies.

    llama.cpp stores the divisors only. The bounds (1, 4) and the 8192 original positions are those of every published
    model of that kind; they are accepted where they give the stored divisors back, else ModelError is raised.
    """
    scaling: dict[str, Any] = {
        "rope_type": "llama3",
        "factor": shortest_float32(max(factors)),
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
    }
    expected = [_llama3_divisor(theta ** (2 * i / head_dim), scaling["factor"]) for i in range(head_dim // 2)]
    same = len(expected) == len(factors)
    if not same or any(not math.isclose(a, b, rel_tol=1e-4) for a, b in zip(expected, factors, strict=True)):
        raise ModelError(f"the divisors in {ROPE_FACTORS!r} are not Llama 3.1's: give its safetensors directory")
    return scaling


def _llama3_divisor(inverse_frequency: float, factor: float) -> float:
    """Give the divisor of one rotary frequency as Llama 3.1 defines it (bounds 1 and 4, 8192 original positions)."""
    turns = 8192 / (2 * math.pi * inverse_frequency)
    if turns > 4:
        return 1.0
    if turns < 1:
        return factor
    smooth = (turns - 1) / 3
    return 1 / ((1 - smooth) / factor + smooth)


def shortest_float32(value: float) -> float:
    """Give the shortest decimal that is `value` in single precision (GGUF keeps 1e-5 as 9.999999747378752e-06)."""
    import numpy as np

    return float(str(np.float32(value)))


def _architecture(metadata: Metadata) -> str:
    """Give the architecture; raises ModelError unless it is one of the supported, dense ones in one file."""
    architecture = str(metadata.get("general.architecture"))
    if architecture not in ARCHITECTURES:
        raise ModelError(
            f"GGUF architecture {architecture!r} is not supported: use one of {', '.join(ARCHITECTURES)}, "
            f"or the model's safetensors directory"
        )
    if metadata.get(f"{architecture}.expert_count", 0):
        raise ModelError("mixture-of-experts GGUF files are not supported: give a dense model")
    if metadata.get("split.count", 0) > 1:
        raise ModelError("this GGUF file is one of several parts: join them with `llama-gguf-split --merge` first")
    return architecture


def _required(values: Metadata, key: str) -> Any:
    """Give one value of the architecture; raises ModelError where the file lacks it or has one value per layer."""
    value = values.get(key)
    if value is None:
        raise ModelError(f"the GGUF file lacks the key {key!r}: download or convert it again")
    if isinstance(value, list):
        raise ModelError(f"the GGUF key {key!r} differs between layers: give a model whose layers are alike")
    return value


def _head_dim(values: Metadata, heads: int) -> int:
    """Give the size of one head; raises ModelError where only a part of it is rotated."""
    rotated = values.get("rope.dimension_count")
    head_dim = int(values.get("attention.key_length") or rotated or values["embedding_length"] // heads)
    if rotated not in (None, head_dim):
        raise ModelError(f"rotary positions on {rotated} of {head_dim} dimensions are unsupported: give another model")
    return head_dim


def _rope_scaling(values: Metadata) -> dict[str, Any] | None:
    """Give the stretch of the rotary positions that the keys state; raises ModelError for an unknown kind."""
    kind = values.get("rope.scaling.type", "none")
    if kind == "none":
        return None
    if kind != "linear":
        raise ModelError(f"rotary scaling {kind!r} is not supported: give a model with linear, llama3 or no scaling")
    return {"rope_type": "linear", "factor": float(values["rope.scaling.factor"])}


def _check_tensors(config: Mapping[str, Any], tensors: Sequence[str]) -> None:
    """Raise ModelError where a tensor that the configuration calls for is missing, or one has no place."""
    if config["num_hidden_layers"] > len(tensors):
        raise ModelError(f"the GGUF file lacks layers of its {config['num_hidden_layers']}: download it again")
    expected = set(_expected_tensors(config))
    present = set(tensors) - {ROPE_FACTORS}
    if missing := sorted(expected - present):
        raise ModelError(f"the GGUF file lacks the tensor {missing[0]!r}: download or convert it again")
    if extra := sorted(present - expected):
        raise ModelError(
            f"tensor {extra[0]!r} has no place in a {config['model_type']} model: give a plain dense model"
        )


def _expected_tensors(config: Mapping[str, Any]) -> list[str]:
    """List the GGUF tensors of a model with this configuration."""
    biased = {"attn_q", "attn_k", "attn_v"} if config["model_type"] == "qwen2" or config["attention_bias"] else set()
    biased |= {"attn_output"} if config["attention_bias"] else set()
    biased |= {"ffn_gate", "ffn_up", "ffn_down"} if config["mlp_bias"] else set()
    top = ["token_embd.weight", "output_norm.weight"]
    if not config["tie_word_embeddings"]:
        top.append("output.weight")
    layers = [f"blk.{layer}." for layer in range(config["num_hidden_layers"])]
    weights = [f"{layer}{part}.weight" for layer in layers for part in _LAYER_NAMES]
    return top + weights + [f"{layer}{part}.bias" for layer in layers for part in sorted(biased)]
