"""Check how configurations of both generations are read, and what is refused."""

from __future__ import annotations

from typing import Any

import pytest

from dejavu.errors import ModelError
from dejavu.model.families import spec_from_config
from dejavu.model.spec import RopeScaling
from dejavu.model.table import MODELS

# config.json of HuggingFaceTB/SmolLM2-135M-Instruct (transformers 4), without what does not matter
SMOLLM2: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"],
    "attention_bias": False,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "hidden_act": "silu",
    "hidden_size": 576,
    "intermediate_size": 1536,
    "max_position_embeddings": 8192,
    "model_type": "llama",
    "num_attention_heads": 9,
    "num_hidden_layers": 30,
    "num_key_value_heads": 3,
    "rms_norm_eps": 1e-05,
    "rope_scaling": None,
    "rope_theta": 100000,
    "tie_word_embeddings": True,
    "torch_dtype": "bfloat16",
    "vocab_size": 49152,
}
OPT_350M: dict[str, Any] = {
    "activation_function": "relu",
    "bos_token_id": 2,
    "do_layer_norm_before": False,
    "eos_token_id": 2,
    "ffn_dim": 4096,
    "hidden_size": 1024,
    "max_position_embeddings": 2048,
    "model_type": "opt",
    "num_attention_heads": 16,
    "num_hidden_layers": 24,
    "torch_dtype": "float16",
    "vocab_size": 50272,
    "word_embed_proj_dim": 512,
}
BLOOM_560M: dict[str, Any] = {
    "bos_token_id": 1,
    "eos_token_id": 2,
    "model_type": "bloom",
    "n_embed": 1024,
    "n_layer": 24,
    "num_attention_heads": 16,
    "seq_length": 2048,
    "torch_dtype": "float16",
    "vocab_size": 250880,
}


def test_published_configurations():
    assert spec_from_config(SMOLLM2) == MODELS["smollm2-135m"]
    assert spec_from_config(OPT_350M) == MODELS["opt-350m"]
    assert spec_from_config(BLOOM_560M) == MODELS["bloom-560m"]


def test_both_generations_of_rope_agree():
    old = {**SMOLLM2, "rope_scaling": {"type": "linear", "factor": 2.0}}
    new = {key: value for key, value in SMOLLM2.items() if not key.startswith(("rope", "torch"))}
    new |= {"rope_parameters": {"rope_type": "linear", "factor": 2.0, "rope_theta": 1e5}, "dtype": "bfloat16"}
    assert spec_from_config(old) == spec_from_config(new)
    assert spec_from_config(new).rope_scaling == RopeScaling("linear", 2.0)


def test_llama3_scaling():
    scaling = {
        "factor": 8.0,
        "high_freq_factor": 4.0,
        "low_freq_factor": 1.0,
        "original_max_position_embeddings": 8192,
        "rope_type": "llama3",
    }
    assert spec_from_config({**SMOLLM2, "rope_scaling": scaling}).rope_scaling == RopeScaling("llama3", 8.0, 1.0, 4.0)


def test_several_end_tokens():
    assert spec_from_config({**SMOLLM2, "eos_token_id": [7, 9]}).eos_token_ids == (7, 9)
    assert spec_from_config({**SMOLLM2, "eos_token_id": None}).eos_token_ids == ()


@pytest.mark.parametrize(
    ("extra", "expected"),
    [
        ({"model_type": "mistral", "sliding_window": 4096}, 4096),
        ({"model_type": "mistral", "sliding_window": None}, 8192),
        ({"model_type": "mistral", "sliding_window": 100000}, 8192),
        ({"model_type": "qwen2", "sliding_window": 4096}, 8192),
        ({"model_type": "qwen2", "sliding_window": 4096, "use_sliding_window": True}, 4096),
    ],
)
def test_sliding_window_caps_positions(extra, expected):
    assert spec_from_config({**SMOLLM2, **extra}).max_positions == expected


@pytest.mark.parametrize(
    ("config", "words"),
    [
        ({"model_type": "mamba"}, ["'mamba'", "gpt2, opt, bloom, llama, mistral, qwen2"]),
        ({}, ["None", "use one of"]),
        ({**SMOLLM2, "rope_scaling": {"rope_type": "yarn", "factor": 4}}, ["'yarn'", "linear or llama3"]),
        ({**SMOLLM2, "quantization_config": {"bits": 4}}, ["quantised", "bfloat16"]),
        ({**SMOLLM2, "hidden_act": "xielu"}, ["'xielu'", "silu"]),
        ({**SMOLLM2, "hidden_size": None}, ["hidden_size = None", "positive integer"]),
        ({**SMOLLM2, "num_hidden_layers": -1}, ["num_hidden_layers = -1"]),
        ({**SMOLLM2, "num_key_value_heads": 2}, ["9 attention heads", "2 KV heads"]),
        ({**SMOLLM2, "hidden_size": 577}, ["577", "9 heads"]),
        ({**SMOLLM2, "partial_rotary_factor": 0.5}, ["partial rotary"]),
        (
            {**BLOOM_560M, "apply_residual_connection_post_layernorm": True},
            ["apply_residual_connection_post_layernorm"],
        ),
        ({**OPT_350M, "layer_norm_elementwise_affine": False}, ["layer_norm_elementwise_affine"]),
    ],
)
def test_refusals_name_value_and_remedy(config, words):
    with pytest.raises(ModelError) as error:
        spec_from_config(config)
    for word in words:
        assert word in str(error.value)
