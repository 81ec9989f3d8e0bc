"""What a pass has to do at the least, and how long the machine would take for that alone: arithmetic, no measurement.

A pass reads its weights once, reads the KV of its context and writes that of its new tokens; it multiplies every new
token with every matrix, and those tokens whose logits are wanted with the vocabulary's. Activations are left out.
"""

from dataclasses import dataclass

from dejavu.model.parameters import stage_parameters
from dejavu.model.spec import ModelSpec, Shard

AROUND_LAYERS = ("embed.tokens", "embed.positions", "head.logits")


@dataclass(frozen=True, slots=True)
class Work:
    """Count what one rank must move to and from its memory, and compute."""

    nbytes: int
    flop: int


@dataclass(frozen=True, slots=True)
class Ceilings:
    """Hold what one rank's machine reaches, measured: bytes read and written a second, and operations a second."""

    bytes_per_s: float
    flop_per_s: float

    def seconds(self, work: Work) -> float:
        """Give the least time of some work: the larger of moving and computing, which can go on together."""
        return max(work.nbytes / self.bytes_per_s, work.flop / self.flop_per_s)

    def bound(self, work: Work) -> str:
        """Name what takes that time."""
        return "memory" if work.nbytes / self.bytes_per_s >= work.flop / self.flop_per_s else "compute"


@dataclass(frozen=True, slots=True)
class StageSize:
    """Count one rank's part of a model: all numbers that a pass reads, those in layers' matrices, the logits'."""

    numbers: int
    layer_matrices: int
    logits: int
    kv_bytes_per_token: int
    attention_size: int  # heads by their size, over all layers
    itemsize: int


def stage_size(spec: ModelSpec, shard: Shard, itemsize: int) -> StageSize:
    """Count a shard; the embedding is looked up, so it counts only where the logits are computed with it."""
    parameters = [each for each in stage_parameters(spec, shard) if each.name not in AROUND_LAYERS]
    start, stop = shard.vocab_range(spec.vocab_size)
    logits = (stop - start) * (spec.embedding_size or spec.hidden_size) if shard.is_last else 0
    num_layers = shard.last_layer - shard.first_layer
    return StageSize(
        numbers=sum(each.num_elements for each in parameters) + logits,
        layer_matrices=sum(each.num_elements for each in parameters if len(each.shape) == 2),
        logits=logits,
        kv_bytes_per_token=spec.kv_bytes_per_token(itemsize, num_layers, shard.tp_size),
        attention_size=num_layers * spec.num_heads // shard.tp_size * spec.head_dim,
        itemsize=itemsize,
    )


def token_work(size: StageSize, batch: int, context: int) -> Work:
    """Count a token step of `batch` rows, each with `context` tokens before the new one."""
    nbytes = size.numbers * size.itemsize + batch * (context + 1) * size.kv_bytes_per_token
    products = 2 * batch * (size.layer_matrices + size.logits)
    return Work(nbytes, products + 4 * batch * (context + 1) * size.attention_size)


def prompt_work(size: StageSize, batch: int, prompt_len: int) -> Work:
    """Count a pass over `batch` whole prompts, whose last tokens' logits are wanted; token i attends to i + 1."""
    tokens = batch * prompt_len
    products = 2 * tokens * size.layer_matrices + 2 * batch * size.logits
    attention = 2 * tokens * (prompt_len + 1) * size.attention_size
    return Work(size.numbers * size.itemsize + tokens * size.kv_bytes_per_token, products + attention)
