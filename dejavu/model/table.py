"""The published shapes that need no checkpoint: for dummy weights, planning and simulation."""

from __future__ import annotations

from dejavu.model.spec import ModelSpec


def _gpt2(num_layers: int, hidden_size: int, num_heads: int) -> ModelSpec:
    return ModelSpec(
        family="gpt2",
        num_layers=num_layers,
        hidden_size=hidden_size,
        num_heads=num_heads,
        num_kv_heads=num_heads,
        head_dim=hidden_size // num_heads,
        ffn_size=4 * hidden_size,
        vocab_size=50257,
        max_positions=1024,
        positions="learned",
        norm="layernorm",
        activation="gelu_tanh",
        bos_token_id=50256,
        eos_token_ids=(50256,),
    )


def _opt(num_layers: int, hidden_size: int, num_heads: int, embedding_size: int | None = None) -> ModelSpec:
    """Shape an OPT model (arXiv 2205.01068, table 1); the 350M one alone projects its embeddings and is post-norm."""
    return ModelSpec(
        family="opt",
        num_layers=num_layers,
        hidden_size=hidden_size,
        num_heads=num_heads,
        num_kv_heads=num_heads,
        head_dim=hidden_size // num_heads,
        ffn_size=4 * hidden_size,
        vocab_size=50272,
        max_positions=2048,
        positions="learned",
        norm="layernorm",
        activation="relu",
        norm_first=embedding_size is None,
        final_norm=embedding_size is None,
        embedding_size=embedding_size,
        position_offset=2,
        bos_token_id=2,
        eos_token_ids=(2,),
        dtype="float16",
    )


def _bloom(num_layers: int, hidden_size: int, num_heads: int, dtype: str = "float16") -> ModelSpec:
    """Shape a BLOOM model (arXiv 2211.05100, table 3)."""
    return ModelSpec(
        family="bloom",
        num_layers=num_layers,
        hidden_size=hidden_size,
        num_heads=num_heads,
        num_kv_heads=num_heads,
        head_dim=hidden_size // num_heads,
        ffn_size=4 * hidden_size,
        vocab_size=250880,
        max_positions=2048,
        positions="alibi",
        norm="layernorm",
        activation="gelu_tanh",
        embedding_norm=True,
        bos_token_id=1,
        eos_token_ids=(2,),
        dtype=dtype,
    )


def _llama3(num_layers: int, hidden_size: int, num_heads: int, ffn_size: int) -> ModelSpec:
    """Shape a Llama 3 model (arXiv 2407.21783, table 3)."""
    return ModelSpec(
        family="llama",
        num_layers=num_layers,
        hidden_size=hidden_size,
        num_heads=num_heads,
        num_kv_heads=8,
        head_dim=128,
        ffn_size=ffn_size,
        vocab_size=128256,
        max_positions=8192,
        positions="rope",
        norm="rmsnorm",
        activation="silu",
        gated_ffn=True,
        qkv_bias=False,
        out_bias=False,
        ffn_bias=False,
        tied_embeddings=False,
        rope_theta=500000.0,
        bos_token_id=128000,
        eos_token_ids=(128001, 128009),
        dtype="bfloat16",
    )


_SMOLLM2_135M = ModelSpec(
    family="llama",
    num_layers=30,
    hidden_size=576,
    num_heads=9,
    num_kv_heads=3,
    head_dim=64,
    ffn_size=1536,
    vocab_size=49152,
    max_positions=8192,
    positions="rope",
    norm="rmsnorm",
    activation="silu",
    gated_ffn=True,
    qkv_bias=False,
    out_bias=False,
    ffn_bias=False,
    rope_theta=100000.0,
    bos_token_id=1,
    eos_token_ids=(2,),
    dtype="bfloat16",
)

MODELS: dict[str, ModelSpec] = {
    "gpt2": _gpt2(12, 768, 12),
    "gpt2-medium": _gpt2(24, 1024, 16),
    "gpt2-large": _gpt2(36, 1280, 20),
    "gpt2-xl": _gpt2(48, 1600, 25),
    "opt-125m": _opt(12, 768, 12),
    "opt-350m": _opt(24, 1024, 16, embedding_size=512),
    "opt-1.3b": _opt(24, 2048, 32),
    "opt-2.7b": _opt(32, 2560, 32),
    "opt-6.7b": _opt(32, 4096, 32),
    "opt-13b": _opt(40, 5120, 40),
    "opt-30b": _opt(48, 7168, 56),
    "opt-66b": _opt(64, 9216, 72),
    "opt-175b": _opt(96, 12288, 96),
    "bloom-560m": _bloom(24, 1024, 16),
    "bloom-1b1": _bloom(24, 1536, 16),
    "bloom-1b7": _bloom(24, 2048, 16),
    "bloom-3b": _bloom(30, 2560, 32),
    "bloom-7b1": _bloom(30, 4096, 32),
    "bloom-176b": _bloom(70, 14336, 112, dtype="bfloat16"),
    "smollm2-135m": _SMOLLM2_135M,
    "llama-3-8b": _llama3(32, 4096, 32, 14336),
    "llama-3-70b": _llama3(80, 8192, 64, 28672),
}
