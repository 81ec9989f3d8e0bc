"""How much KV memory a run needs and gets: pure arithmetic, done before any memory is taken."""

from collections.abc import Iterable
from dataclasses import dataclass

from dejavu.config import ServeConfig
from dejavu.engine.rows import kv_tokens
from dejavu.errors import CapacityError, ConfigError
from dejavu.model.spec import ModelSpec
from dejavu.request import Request
from dejavu.topology import Pipeline, Role, Topology

ITEM_BYTES = {"float32": 4, "bfloat16": 2, "float16": 2}


@dataclass(frozen=True, slots=True)
class CacheSize:
    """Say how a pipeline's KV cache is cut: every rank's pool has `num_blocks` blocks of `block_size` tokens."""

    row_len: int
    block_size: int
    num_blocks: int
    block_bytes: int  # of the rank with the most layers

    @property
    def blocks_per_row(self) -> int:
        """Give the blocks of a full row."""
        return -(-self.row_len // self.block_size)


def choose_row_len(config: ServeConfig, spec: ModelSpec, requests: Iterable[Request] = ()) -> int:
    """Give the tokens that a row holds: as asked, or as the longest request needs."""
    if config.row_len > spec.max_positions:
        raise ConfigError(
            f"row_len {config.row_len} is more than the {spec.max_positions} positions of {config.model}: "
            f"use at most {spec.max_positions}"
        )
    longest = max([kv_tokens(request) + 1 for request in requests], default=min(2048, spec.max_positions))
    return config.row_len or longest


def size_caches(
    config: ServeConfig, spec: ModelSpec, topology: Topology, row_len: int, dtype: str
) -> tuple[CacheSize, ...]:
    """Size the cache of each pipeline; raise CapacityError where not even one row fits."""
    return tuple(size_cache(config, spec, topology, pipeline, row_len, dtype) for pipeline in topology.pipelines)


def size_cache(
    config: ServeConfig, spec: ModelSpec, topology: Topology, pipeline: Pipeline, row_len: int, dtype: str
) -> CacheSize:
    """Cut `kv_memory`, or what all rows of a pipeline need, into blocks."""
    block_size = config.block_size or row_len
    shards = [placement.shard for placement in topology.workers_of(pipeline) if placement.shard]
    most_layers = max(shard.last_layer - shard.first_layer for shard in shards)
    block_bytes = block_size * spec.kv_bytes_per_token(ITEM_BYTES[dtype], most_layers, pipeline.tp)
    per_row = -(-row_len // block_size)
    extra_rows = config.num_handover_rows if pipeline.role is Role.TOKEN else 0
    num_blocks = (pipeline.shape.num_rows + extra_rows) * per_row
    if config.kv_memory is not None:
        num_blocks = min(num_blocks, config.kv_memory // block_bytes)
    if num_blocks < per_row:
        raise CapacityError(
            f"kv_memory {config.kv_memory} bytes holds {num_blocks} blocks of {block_size} tokens and one row of "
            f"{row_len} tokens needs {per_row}: give at least {per_row * block_bytes} bytes, or a shorter row_len"
        )
    return CacheSize(row_len, block_size, num_blocks, block_bytes)
