"""Read a Hugging Face `config.json`, as transformers 4 and 5 write it, into a ModelSpec."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal, cast

from dejavu.errors import ModelError
from dejavu.model.spec import ModelSpec, RopeScaling

Config = dict[str, Any]
Activation = Literal["relu", "gelu", "gelu_tanh", "silu"]

_ACTIVATIONS: dict[str, Activation] = {
    "relu": "relu",
    "gelu": "gelu",
    "gelu_new": "gelu_tanh",
    "gelu_fast": "gelu_tanh",
    "gelu_pytorch_tanh": "gelu_tanh",
    "silu": "silu",
    "swish": "silu",
}


def _size(config: Config, *keys: str) -> int:
    """Give the first of `keys` (synonyms) that the configuration has, as a positive integer."""
    value = next((config[key] for key in keys if config.get(key) is not None), None)
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise ModelError(f"config.json has {keys[0]} = {value!r}: a positive integer is needed")
    return value


def _size_or(config: Config, key: str, default: int) -> int:
    return default if config.get(key) is None else _size(config, key)


def _head_dim(hidden_size: int, num_heads: int) -> int:
    if hidden_size % num_heads:
        raise ModelError(f"config.json has hidden size {hidden_size}, which its {num_heads} heads do not divide")
    return hidden_size // num_heads


def _activation(config: Config, key: str, default: str) -> Activation:
    name = config.get(key) or default
    if name not in _ACTIVATIONS:
        raise ModelError(f"activation {name!r} is not supported: use a model with {', '.join(_ACTIVATIONS)}")
    return _ACTIVATIONS[name]


def _refuse(config: Config, key: str, default: bool, wanted: bool, meaning: str) -> None:
    if bool(config.get(key, default)) != wanted:
        raise ModelError(f"config.json has {key} = {config[key]!r}, which is not supported: {meaning}")


def _token_ids(config: Config) -> dict[str, Any]:
    """Read the first and the last tokens, and the data type, under the names that every family uses."""
    ends = config.get("eos_token_id")
    dtype = config.get("dtype") or config.get("torch_dtype") or "float32"
    return {
        "bos_token_id": config.get("bos_token_id"),
        "eos_token_ids": tuple(ends) if isinstance(ends, list) else () if ends is None else (ends,),
        "dtype": str(dtype).removeprefix("torch."),
    }


def _gpt2(config: Config) -> ModelSpec:
    _refuse(config, "scale_attn_weights", True, True, "attention is scaled by the root of the head size")
    _refuse(config, "scale_attn_by_inverse_layer_idx", False, False, "attention is scaled alike in every layer")
    _refuse(config, "add_cross_attention", False, False, "only decoders are served")
    hidden, heads = _size(config, "n_embd", "hidden_size"), _size(config, "n_head", "num_attention_heads")
    return ModelSpec(
        family="gpt2",
        num_layers=_size(config, "n_layer", "num_hidden_layers"),
        hidden_size=hidden,
        num_heads=heads,
        num_kv_heads=heads,
        head_dim=_head_dim(hidden, heads),
        ffn_size=_size_or(config, "n_inner", 4 * hidden),
        vocab_size=_size(config, "vocab_size"),
        max_positions=_size_or(config, "n_positions", 1024),
        positions="learned",
        norm="layernorm",
        activation=_activation(config, "activation_function", "gelu_new"),
        norm_eps=config.get("layer_norm_epsilon", 1e-5),
        tied_embeddings=config.get("tie_word_embeddings", True),
        **_token_ids(config),
    )


def _opt(config: Config) -> ModelSpec:
    _refuse(config, "layer_norm_elementwise_affine", True, True, "normalisations need weights")
    hidden, heads = _size(config, "hidden_size"), _size(config, "num_attention_heads")
    norm_first, bias = config.get("do_layer_norm_before", True), config.get("enable_bias", True)
    embedding = _size_or(config, "word_embed_proj_dim", hidden)
    return ModelSpec(
        family="opt",
        num_layers=_size(config, "num_hidden_layers"),
        hidden_size=hidden,
        num_heads=heads,
        num_kv_heads=heads,
        head_dim=_head_dim(hidden, heads),
        ffn_size=_size(config, "ffn_dim"),
        vocab_size=_size(config, "vocab_size"),
        max_positions=_size_or(config, "max_position_embeddings", 2048),
        positions="learned",
        norm="layernorm",
        activation=_activation(config, "activation_function", "relu"),
        norm_first=norm_first,
        final_norm=norm_first and not config.get("_remove_final_layer_norm", False),
        embedding_size=None if embedding == hidden else embedding,
        qkv_bias=bias,
        out_bias=bias,
        ffn_bias=bias,
        tied_embeddings=config.get("tie_word_embeddings", True),
        position_offset=2,
        **_token_ids(config),
    )


def _bloom(config: Config) -> ModelSpec:
    _refuse(config, "apply_residual_connection_post_layernorm", False, False, "residuals are taken before the norm")
    hidden = _size(config, "hidden_size", "n_embed")
    heads = _size(config, "n_head", "num_attention_heads")
    return ModelSpec(
        family="bloom",
        num_layers=_size(config, "n_layer", "num_hidden_layers"),
        hidden_size=hidden,
        num_heads=heads,
        num_kv_heads=heads,
        head_dim=_head_dim(hidden, heads),
        ffn_size=4 * hidden,
        vocab_size=_size(config, "vocab_size"),
        max_positions=_size_or(config, "seq_length", 2048),
        positions="alibi",
        norm="layernorm",
        activation="gelu_tanh",
        norm_eps=config.get("layer_norm_epsilon", 1e-5),
        embedding_norm=True,
        tied_embeddings=config.get("tie_word_embeddings", True),
        **_token_ids(config),
    )


def _rope(config: Config) -> tuple[float, RopeScaling | None]:
    """Read the rotary base and scaling from `rope_parameters` (5) or `rope_theta` and `rope_scaling` (4)."""
    rope: Config = config.get("rope_parameters") or config.get("rope_scaling") or {}
    theta = float(rope.get("rope_theta") or config.get("rope_theta") or 10000.0)
    kind = rope.get("rope_type") or rope.get("type") or "default"
    if any(isinstance(value, dict) for value in rope.values()):
        raise ModelError("rotary settings per kind of layer are not supported: use a model with one for all layers")
    if rope.get("partial_rotary_factor", config.get("partial_rotary_factor", 1.0)) != 1.0:
        raise ModelError("partial rotary embeddings are not supported: use a model that rotates the whole head")
    if kind == "default":
        return theta, None
    if kind not in ("linear", "llama3"):
        raise ModelError(f"rotary scaling {kind!r} is not supported: use a model with default, linear or llama3")
    return theta, RopeScaling(
        kind=cast(Literal["linear", "llama3"], kind),
        factor=float(rope["factor"]),
        low_freq_factor=float(rope.get("low_freq_factor", 1.0)),
        high_freq_factor=float(rope.get("high_freq_factor", 4.0)),
        original_max_positions=int(rope.get("original_max_position_embeddings") or 8192),
    )


def _max_positions(config: Config) -> int:
    """Give the longest sequence: within a sliding window, full attention (all there is here) is exact."""
    longest = _size_or(config, "max_position_embeddings", 2048)
    kind = config["model_type"]
    slides = kind == "mistral" or (kind == "qwen2" and config.get("use_sliding_window", False))
    window = config.get("sliding_window") if slides else None
    return longest if window is None else min(longest, int(window))


def _llama(config: Config) -> ModelSpec:
    """Read Llama, Mistral and Qwen2: one architecture but for the biases and the window."""
    hidden, heads = _size(config, "hidden_size"), _size(config, "num_attention_heads")
    kv_heads = _size_or(config, "num_key_value_heads", heads)
    if heads % kv_heads:
        raise ModelError(f"config.json has {heads} attention heads, which its {kv_heads} KV heads do not divide")
    is_qwen2, attention_bias = config["model_type"] == "qwen2", bool(config.get("attention_bias", False))
    theta, scaling = _rope(config)
    return ModelSpec(
        family="llama",
        num_layers=_size(config, "num_hidden_layers"),
        hidden_size=hidden,
        num_heads=heads,
        num_kv_heads=kv_heads,
        head_dim=_size_or(config, "head_dim", 0) if config.get("head_dim") else _head_dim(hidden, heads),
        ffn_size=_size(config, "intermediate_size"),
        vocab_size=_size(config, "vocab_size"),
        max_positions=_max_positions(config),
        positions="rope",
        norm="rmsnorm",
        activation=_activation(config, "hidden_act", "silu"),
        norm_eps=config.get("rms_norm_eps", 1e-6),
        gated_ffn=True,
        qkv_bias=is_qwen2 or attention_bias,
        out_bias=attention_bias and not is_qwen2,
        ffn_bias=bool(config.get("mlp_bias", False)),
        tied_embeddings=config.get("tie_word_embeddings", False),
        rope_theta=theta,
        rope_scaling=scaling,
        **_token_ids(config),
    )


_READERS: dict[str, Callable[[Config], ModelSpec]] = {
    "gpt2": _gpt2,
    "opt": _opt,
    "bloom": _bloom,
    "llama": _llama,
    "mistral": _llama,
    "qwen2": _llama,
}


def spec_from_config(config: Config) -> ModelSpec:
    """Read a model's `config.json`, parsed.

    Raises ModelError, saying what is supported, for another architecture, a quantised checkpoint or an unknown
    feature, and where a size is missing or impossible.
    """
    reader = _READERS.get(cast(str, config.get("model_type")))
    if reader is None:
        raise ModelError(f"model type {config.get('model_type')!r} is not supported: use one of {', '.join(_READERS)}")
    if config.get("quantization_config"):
        raise ModelError("the checkpoint is quantised, which is not supported: use one in float32, float16 or bfloat16")
    return reader(config)
