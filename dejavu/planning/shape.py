"""Say what a model weighs: all that a planner needs to know of it."""

from dataclasses import dataclass

from dejavu.errors import ConfigError
from dejavu.model.spec import ModelSpec, Shard


@dataclass(frozen=True, slots=True)
class ModelShape:
    """Count a model's layers, the numbers of one layer and around the layers, and K or V numbers per token and layer.

    `kv_heads` limits the tensor degree: a degree has to divide it.
    """

    num_layers: int
    layer_params: int
    attention_size: int
    outer_params: int = 0
    kv_heads: int = 1
    max_positions: int = 1 << 30

    def __post_init__(self) -> None:
        for name in ("num_layers", "layer_params", "attention_size"):
            if getattr(self, name) < 1:
                raise ConfigError(f"{name} {getattr(self, name)} makes no model: give at least 1")

    def stage_layers(self, stages: int) -> int:
        """Give the layers of the fullest of `stages` even stages."""
        return -(-self.num_layers // stages)

    def weight_bytes(self, stages: int, tp: int, dtype_bytes: int) -> int:
        """Give the weights of one device of the fullest stage, embeddings or head included."""
        numbers = self.stage_layers(stages) * self.layer_params + self.outer_params
        return -(-numbers * dtype_bytes // tp)

    def kv_bytes_per_token(self, stages: int, tp: int, dtype_bytes: int) -> int:
        """Give the KV of one token on one device of the fullest stage."""
        return 2 * self.stage_layers(stages) * self.attention_size * dtype_bytes // tp


def shape_of(spec: ModelSpec) -> ModelShape:
    """Weigh a model."""
    from dejavu.model.parameters import stage_elements

    last = spec.num_layers
    if last < 3:
        raise ConfigError(f"a model of {last} layers is too small to plan for: name one with at least 3")
    layer = stage_elements(spec, Shard(1, 2, last))
    ends = [stage_elements(spec, Shard(0, 1, last)), stage_elements(spec, Shard(last - 1, last, last))]
    return ModelShape(
        num_layers=last,
        layer_params=layer,
        attention_size=spec.num_kv_heads * spec.head_dim,
        outer_params=max(ends) - layer,
        kv_heads=spec.num_kv_heads,
        max_positions=spec.max_positions,
    )
