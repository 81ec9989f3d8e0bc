"""How much KV memory a run needs and gets: pure arithmetic, done before any memory is taken."""

from collections.abc import Container, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace

from dejavu.config import ServeConfig
from dejavu.engine.rows import kv_tokens
from dejavu.errors import CapacityError, ConfigError
from dejavu.measure.render import format_bytes
from dejavu.model.parameters import stage_elements
from dejavu.model.spec import ModelSpec, Shard
from dejavu.request import Request
from dejavu.topology import Pipeline, Placement, Role, Topology

ITEM_BYTES = {"float32": 4, "bfloat16": 2, "float16": 2}
CUDA_BLOCK_TOKENS = 32
GRAPH_BYTES = 1 << 30  # for captured graphs, the libraries' workspaces and the allocator's gaps
USABLE = 0.97  # of a GPU's memory: contexts take the rest
SHORTEST_CUT, LARGEST_PASS = 256, 1 << 30  # tokens


@dataclass(frozen=True, slots=True)
class CacheSize:
    """Say how a pipeline's KV cache is cut: every rank's pool has `num_blocks` blocks of `block_size` tokens."""

    row_len: int
    block_size: int
    num_blocks: int
    block_bytes: int  # of the rank with the most layers
    device_blocks: int = 0  # of the part that is on the device, where the pool is in host memory and swapped; else 0

    @property
    def blocks_per_row(self) -> int:
        """Give the blocks of a full row."""
        return -(-self.row_len // self.block_size)

    @property
    def is_swapped(self) -> bool:
        """Tell whether the pool lies in host memory, and only a part of it on the device."""
        return self.device_blocks > 0

    @property
    def pool_blocks(self) -> int:
        """Count the blocks on the device."""
        return self.device_blocks or self.num_blocks

    @property
    def host_bytes(self) -> int:
        """Count the bytes of a rank's pool in host memory."""
        return self.num_blocks * self.block_bytes if self.is_swapped else 0


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
    config: ServeConfig, spec: ModelSpec, topology: Topology, row_len: int, dtype: str, device: str
) -> tuple[CacheSize, ...]:
    """Size the cache of each pipeline; raise CapacityError where not even one row fits."""
    block_size = config.block_size or (CUDA_BLOCK_TOKENS if device == "cuda" else row_len)
    return tuple(
        size_cache(config, spec, topology, pipeline, row_len, dtype, block_size) for pipeline in topology.pipelines
    )


def size_cache(
    config: ServeConfig,
    spec: ModelSpec,
    topology: Topology,
    pipeline: Pipeline,
    row_len: int,
    dtype: str,
    block_size: int,
) -> CacheSize:
    """Cut `kv_memory`, or what all rows of a pipeline need, into blocks."""
    shards = [placement.shard for placement in topology.workers_of(pipeline) if placement.shard]
    most_layers = max(shard.last_layer - shard.first_layer for shard in shards)
    block_bytes = block_size * spec.kv_bytes_per_token(ITEM_BYTES[dtype], most_layers, pipeline.tp)
    per_row = -(-row_len // block_size)
    num_blocks = (pipeline.shape.num_rows + extra_rows(config, pipeline, per_row)) * per_row
    wanted = CacheSize(row_len, block_size, num_blocks, block_bytes)
    if resident := config.resident_of(pipeline.shape):
        return fit_swapped(config, wanted, resident * pipeline.shape.microbatch_size)
    if config.kv_memory is not None:
        num_blocks = min(num_blocks, config.kv_memory // block_bytes)
    if num_blocks < per_row:
        raise CapacityError(
            f"kv_memory {config.kv_memory} bytes holds {num_blocks} blocks of {block_size} tokens and one row of "
            f"{row_len} tokens needs {per_row}: give at least {per_row * block_bytes} bytes, or a shorter row_len"
        )
    return replace(wanted, num_blocks=num_blocks)


def extra_rows(config: ServeConfig, pipeline: Pipeline, blocks_per_row: int) -> int:
    """Count the rows for which a pipeline has blocks beyond its own.

    Of tokens: for KV that waits for a row. Of prompts: for KV that is kept until the token side has a replica of it;
    rows of several blocks have some for it, since they are as long as prompt and output together.
    """
    if pipeline.role is Role.PROMPT:
        return config.num_handover_rows if config.replicate != "off" and blocks_per_row == 1 else 0
    return config.num_handover_rows if pipeline.role is Role.TOKEN else 0


def fit_swapped(config: ServeConfig, wanted: CacheSize, resident_rows: int) -> CacheSize:
    """Size a swapped cache: the resident rows on the device, and in host memory as many blocks as are wanted or fit."""
    row_bytes = wanted.blocks_per_row * wanted.block_bytes
    if config.kv_memory is not None and resident_rows * row_bytes > config.kv_memory:
        raise CapacityError(
            f"kv_memory {config.kv_memory} bytes holds {config.kv_memory // row_bytes} rows of {wanted.row_len} tokens "
            f"and {config.resident} resident microbatches have {resident_rows}: give {resident_rows * row_bytes} "
            "bytes, or a smaller microbatch_size or row_len"
        )
    num_blocks = wanted.num_blocks
    if config.host_kv_memory is not None:
        num_blocks = min(num_blocks, config.host_kv_memory // wanted.block_bytes)
    if num_blocks < wanted.blocks_per_row:
        raise CapacityError(
            f"host_kv_memory {config.host_kv_memory} bytes holds no row of {wanted.row_len} tokens: "
            f"give at least {row_bytes} bytes, or a shorter row_len"
        )
    return replace(wanted, num_blocks=num_blocks, device_blocks=resident_rows * wanted.blocks_per_row)


def check_host_memory(topology: Topology, caches: Sequence[CacheSize], ranks: Container[int], available: int) -> None:
    """Raise CapacityError if the swapped KV of those of the `ranks` that swap, all on one host, is not `available`."""
    needed = sum(caches[place.pipeline].host_bytes for place in topology.workers if place.rank in ranks)
    if needed > available:
        raise CapacityError(
            f"swapping needs {format_bytes(needed)} of host memory on this host and {format_bytes(available)} are "
            "available: give a smaller host_kv_memory, num_microbatches, microbatch_size or row_len"
        )


def describe_capacity(config: ServeConfig, pipeline: Pipeline, cache: CacheSize) -> str:
    """Say how many rows the device memory of a worker holds with and without swapping, and what the host gives.

    Of `kv_memory`, or of what the run takes; microbatches have equally many rows.
    """
    shape, row_bytes = pipeline.shape, cache.blocks_per_row * cache.block_bytes
    device_bytes = config.kv_memory or cache.pool_blocks * cache.block_bytes
    resident = min(config.resident, shape.num_microbatches)
    plain, swapped = (
        device_bytes // row_bytes // n * shape.num_microbatches for n in (shape.num_microbatches, resident)
    )
    text = (
        f"{pipeline.role} pipeline: {format_bytes(device_bytes)} of device memory for KV hold {plain} rows of "
        f"{cache.row_len} tokens without swapping and {swapped} with it ({resident} of {shape.num_microbatches} "
        "microbatches resident)"
    )
    if not cache.is_swapped:
        return text
    return f"{text}; {shape.num_rows} rows are swapped through {format_bytes(cache.host_bytes)} of host memory a worker"


def pass_tokens(config: ServeConfig, row_len: int, num_rows: int, cut_at: int = 0) -> int:
    """Count the tokens of the largest pass of a microbatch: of prompts, or of chunks beside token steps."""
    if config.prompt_chunk:
        return config.prompt_chunk + num_rows
    longest = cut_at or max(config.max_prompt_tokens, row_len)
    return max(num_rows, min(longest, num_rows * row_len))


def choose_cut(
    config: ServeConfig,
    spec: ModelSpec,
    topology: Topology,
    caches: Sequence[CacheSize],
    dtype: str,
    gpu_bytes: Sequence[int],
) -> int:
    """Give the prompt tokens of a pass at which prompts are cut, where GPUs cannot hold the largest pass; else 0.

    `gpu_bytes` is the memory of each of the GPUs of the one host, which the workers take in turn. KV that goes on to
    another pipeline leaves with its whole prompt, so there prompts stay whole.
    """
    if not gpu_bytes or config.is_disaggregated or config.prompt_chunk:
        return 0
    fits = min(
        tokens_that_fit([p for p in topology.workers if (p.rank - 1) % len(gpu_bytes) == gpu], nbytes, *sizes)
        for gpu, nbytes in enumerate(gpu_bytes)
        for sizes in [(spec, topology, caches, dtype)]
    )
    num_rows = topology.pipelines[0].shape.microbatch_size
    whole = pass_tokens(config, caches[0].row_len, num_rows)
    return 0 if fits >= whole else max(SHORTEST_CUT, fits - fits % SHORTEST_CUT)


def tokens_that_fit(
    workers: Sequence[Placement],
    gpu_bytes: int,
    spec: ModelSpec,
    topology: Topology,
    caches: Sequence[CacheSize],
    dtype: str,
) -> int:
    """Count the tokens of a pass for which a GPU has memory beside its workers' weights, KV and graphs."""
    left, per_token = int(gpu_bytes * USABLE), 0
    for place in workers:
        shard, cache = place.shard, caches[place.pipeline]
        assert shard is not None
        num_rows = topology.pipelines[place.pipeline].shape.microbatch_size
        left -= stage_elements(spec, shard) * ITEM_BYTES[dtype] + GRAPH_BYTES
        left -= cache.pool_blocks * cache.block_size * kv_bytes_per_token(spec, shard, dtype)
        left -= activation_bytes(spec, shard, 0, num_rows, dtype)
        per_token += activation_bytes(spec, shard, 1, 0, dtype)
    return max(0, left) // per_token if per_token else LARGEST_PASS


def kv_bytes_per_token(spec: ModelSpec, shard: Shard, dtype: str) -> int:
    """Count the bytes of K and V that a token takes on one rank."""
    return spec.kv_bytes_per_token(ITEM_BYTES[dtype], shard.last_layer - shard.first_layer, shard.tp_size)


def activation_bytes(spec: ModelSpec, shard: Shard, num_tokens: int, num_rows: int, dtype: str) -> int:
    """Estimate what a pass of `num_tokens` tokens needs beside weights and KV: a layer's products, and the logits.

    Hidden states are there four times (input, residual, normalised, output), the FFN's twice, logits in float32 thrice.
    """
    heads = (spec.num_heads + 2 * spec.num_kv_heads) // shard.tp_size
    ffn = (3 if spec.gated_ffn else 2) * spec.ffn_size // shard.tp_size
    per_token = 4 * spec.hidden_size + 2 * heads * spec.head_dim + ffn
    logits = 3 * 4 * num_rows * spec.vocab_size if shard.is_last else 0
    return num_tokens * per_token * ITEM_BYTES[dtype] + logits


@dataclass(frozen=True, slots=True)
class Room:
    """Say what one worker found on its GPU when all workers had loaded, and what it is going to take there."""

    gpu: str  # the same for all workers that share it
    name: str
    total_bytes: int
    free_bytes: int  # of the GPU
    weight_bytes: int
    reserve_bytes: int
    pool_bytes: int  # for all rows of its pipeline


def share_of(rooms: Mapping[int, Room], rank: int) -> float:
    """Give the part of the pools wanted on a rank's GPU that fits there; above 1 where there is more room."""
    sharing = [room for room in rooms.values() if room.gpu == rooms[rank].gpu]
    left = rooms[rank].free_bytes - sum(room.reserve_bytes for room in sharing)
    return max(0.0, left / sum(room.pool_bytes for room in sharing))


def rows_that_fit(rooms: Mapping[int, Room], rank: int, cache: CacheSize) -> int:
    """Count the full rows of a rank's pipeline for which its GPU has room."""
    return int(share_of(rooms, rank) * cache.pool_blocks) // cache.blocks_per_row


def check_rooms(rooms: Mapping[int, Room], caches: Mapping[int, CacheSize]) -> None:
    """Raise CapacityError, saying how many rows would fit, where the pools that are wanted on a GPU do not.

    Every rank of a pipeline has as many blocks, so the GPU with the least room decides.
    """
    short = [rank for rank in rooms if share_of(rooms, rank) < 1]
    if not short:
        return
    rank = min(short, key=lambda rank: rows_that_fit(rooms, rank, caches[rank]))
    room, cache = rooms[rank], caches[rank]
    raise CapacityError(
        f"{cache.pool_blocks // cache.blocks_per_row} rows of {cache.row_len} tokens need {gb(room.pool_bytes)} of KV "
        f"memory on rank {rank}, and {room.gpu} has {gb(room.free_bytes)} free with {gb(room.reserve_bytes)} kept for "
        f"activations: {rows_that_fit(rooms, rank, cache)} rows would fit, so lower --microbatch-size, --row-len or "
        "--kv-memory"
    )


def describe_rooms(rooms: Mapping[int, Room], caches: Mapping[int, CacheSize]) -> list[str]:
    """Say for people how each worker's GPU is shared out."""
    return [describe_room(rank, rooms, caches[rank]) for rank in rooms]


def describe_room(rank: int, rooms: Mapping[int, Room], cache: CacheSize) -> str:
    """Say how one worker's GPU is shared out."""
    room, num_rows = rooms[rank], cache.pool_blocks // cache.blocks_per_row
    return (
        f"rank {rank} on {room.gpu}, {room.name}: {gb(room.total_bytes)}, weights {gb(room.weight_bytes)}, "
        f"KV pool {gb(room.pool_bytes)} = {num_rows} rows of {cache.row_len} tokens in blocks of {cache.block_size}, "
        f"activations {gb(room.reserve_bytes)}; {rows_that_fit(rooms, rank, cache)} rows would fit"
    )


def gb(num_bytes: int) -> str:
    """Write bytes in GB, as GPUs are sold."""
    return f"{num_bytes / 1e9:.1f} GB" if num_bytes >= 1e8 else f"{num_bytes / 1e6:.1f} MB"
