"""Say what a decoder-only transformer is: its shape, its variants, and the part of it that one rank holds."""

from dataclasses import dataclass
from typing import Literal

from dejavu.errors import TopologyError


@dataclass(frozen=True, slots=True)
class RopeScaling:
    """Stretch rotary positions as Llama 3.1 does (`llama3`), or evenly (`linear`)."""

    kind: Literal["linear", "llama3"]
    factor: float
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    original_max_positions: int = 8192


@dataclass(frozen=True, slots=True)
class ModelSpec:
    """Describe a model by the features that its code depends on; `family` names its checkpoint layout only."""

    family: Literal["gpt2", "opt", "bloom", "llama"]
    num_layers: int
    hidden_size: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    ffn_size: int
    vocab_size: int
    max_positions: int
    positions: Literal["learned", "rope", "alibi"]
    norm: Literal["layernorm", "rmsnorm"]
    activation: Literal["relu", "gelu", "gelu_tanh", "silu"]
    norm_eps: float = 1e-5
    norm_first: bool = True  # False: OPT-350m normalises after each residual addition
    final_norm: bool = True
    embedding_norm: bool = False  # BLOOM
    embedding_size: int | None = None  # OPT-350m embeds into fewer dimensions and projects
    gated_ffn: bool = False
    qkv_bias: bool = True
    out_bias: bool = True
    ffn_bias: bool = True
    tied_embeddings: bool = True
    position_offset: int = 0  # OPT's table starts two rows late
    rope_theta: float = 10000.0
    rope_scaling: RopeScaling | None = None
    bos_token_id: int | None = None
    eos_token_ids: tuple[int, ...] = ()
    dtype: str = "float32"  # of the checkpoint

    def kv_bytes_per_token(self, itemsize: int, num_layers: int | None = None, tp_size: int = 1) -> int:
        """Count the bytes of K and V that one token takes in `num_layers` layers (default: all) of one tensor rank."""
        layers = self.num_layers if num_layers is None else num_layers
        return layers * 2 * (self.num_kv_heads // tp_size) * self.head_dim * itemsize

    def check_tensor_parallel(self, tp_size: int) -> None:
        """Raise TopologyError where `tp_size` does not divide the heads, the KV heads or the FFN."""
        for name, value in (
            ("attention heads", self.num_heads),
            ("KV heads", self.num_kv_heads),
            ("FFN channels", self.ffn_size),
        ):
            if value % tp_size:
                fits = [n for n in range(1, self.num_kv_heads + 1) if self.supports_tensor_parallel(n)]
                raise TopologyError(
                    f"tensor degree {tp_size} does not divide the model's {value} {name}: "
                    f"use one of {', '.join(map(str, fits))}"
                )

    def supports_tensor_parallel(self, tp_size: int) -> bool:
        """Tell whether `tp_size` divides the heads, the KV heads and the FFN."""
        return not any(n % tp_size for n in (self.num_heads, self.num_kv_heads, self.ffn_size))


@dataclass(frozen=True, slots=True)
class Shard:
    """Name the part of a model that one rank holds: layers [first_layer, last_layer) of `num_layers`, 1/tp of each."""

    first_layer: int
    last_layer: int
    num_layers: int
    tp_rank: int = 0
    tp_size: int = 1

    @property
    def is_first(self) -> bool:
        """Tell whether this stage embeds tokens."""
        return self.first_layer == 0

    @property
    def is_last(self) -> bool:
        """Tell whether this stage computes logits."""
        return self.last_layer == self.num_layers

    def vocab_range(self, vocab_size: int) -> tuple[int, int]:
        """Give the vocabulary entries [start, stop) whose logits this tensor rank computes; near-even, may be empty."""
        each = -(-vocab_size // self.tp_size)
        return min(vocab_size, self.tp_rank * each), min(vocab_size, (self.tp_rank + 1) * each)
