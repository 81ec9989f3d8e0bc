"""Make tiny checkpoints of every family with transformers, at odd shapes, for tests that compare against it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

VOCAB_SIZE = 199
NUM_LAYERS = 6  # 1, 2 and 3 stages divide it; every kind's heads and FFN divide by 2 tensor ranks

_LLAMA: dict[str, Any] = {
    "vocab_size": VOCAB_SIZE,
    "hidden_size": 48,
    "intermediate_size": 88,
    "num_hidden_layers": NUM_LAYERS,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
_OPT: dict[str, Any] = {
    "vocab_size": VOCAB_SIZE,
    "hidden_size": 48,
    "ffn_dim": 104,
    "num_hidden_layers": NUM_LAYERS,
    "num_attention_heads": 6,
    "max_position_embeddings": 128,
    "word_embed_proj_dim": 48,
}
_LLAMA3_ROPE = {
    "rope_theta": 500.0,
    "rope_type": "llama3",
    "factor": 4.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}

# kind -> (transformers model type, arguments of its configuration)
KINDS: dict[str, tuple[str, dict[str, Any]]] = {
    "gpt2": (
        "gpt2",
        {
            "vocab_size": VOCAB_SIZE,
            "n_embd": 48,
            "n_layer": NUM_LAYERS,
            "n_head": 6,
            "n_positions": 128,
            "bos_token_id": 198,
            "eos_token_id": 198,
        },
    ),
    "opt": ("opt", _OPT),
    "opt-post-norm": ("opt", {**_OPT, "do_layer_norm_before": False, "word_embed_proj_dim": 20}),
    "bloom": ("bloom", {"vocab_size": VOCAB_SIZE, "hidden_size": 48, "n_layer": NUM_LAYERS, "n_head": 6}),
    "llama": ("llama", {**_LLAMA, "tie_word_embeddings": True, "rope_parameters": _LLAMA3_ROPE}),
    "llama-untied": (
        "llama",
        {
            **_LLAMA,
            "tie_word_embeddings": False,
            "attention_bias": True,
            "mlp_bias": True,
            "head_dim": 12,
            "rope_parameters": {"rope_theta": 1000.0, "rope_type": "linear", "factor": 2.5},
        },
    ),
    "mistral": ("mistral", {**_LLAMA, "sliding_window": 96, "head_dim": 10}),
    "qwen2": ("qwen2", {**_LLAMA, "tie_word_embeddings": True, "num_attention_heads": 4, "hidden_size": 40}),
}


def make_model(kind: str, seed: int = 0) -> Any:
    """Make the transformers model of a kind in float32: weights random, biases and scales too."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    model_type, arguments = KINDS[kind]
    config = AutoConfig.for_model(model_type, **arguments)
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32, attn_implementation="eager").eval()
    with torch.no_grad():
        for parameter in model.parameters():
            # wide enough that greedy choices are clear, and that a bias left out shows
            parameter.add_(torch.randn_like(parameter), alpha=0.15)
    model.generation_config.eos_token_id = None
    return model


def make_checkpoint(kind: str, directory: Path, seed: int = 0) -> Path:
    """Save a kind's model as config.json and safetensors in `directory`; gives the directory."""
    make_model(kind, seed).save_pretrained(directory)
    return directory
