"""Join the engine's parts on every rank: weights, pool, source and sink of each worker, and the controller."""

import os
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, closing, contextmanager
from dataclasses import dataclass, replace
from functools import partial
from typing import TYPE_CHECKING, Any, TypeVar

import torch
from torch import Tensor

from dejavu.cluster.accelerator import claim_memory, enter_device, most_tokens, share_memory
from dejavu.cluster.keeping import (
    make_replicators,
    needs_replica_carrier,
    open_replica_carrier,
    open_vault,
    outlives_worker,
    take_pool,
    take_weights,
)
from dejavu.cluster.links import Links, open_inbox, open_outbox, open_sums
from dejavu.device import Device, Location, Stream
from dejavu.device.vault import Vault
from dejavu.engine.controller import Controller
from dejavu.engine.flight import Flights
from dejavu.engine.handover import Mover, Movers, NoMover, PromptMover, SyntheticMover, TokenMover
from dejavu.engine.inlet import DirectInlet, HostInlet, Inlet, NoInlet, StagedInlet
from dejavu.engine.logits import Logits, LogitSum, MpiLogits, OneRank
from dejavu.engine.messages import Ready, Report
from dejavu.engine.replication import ReplicaSource
from dejavu.engine.residency import Residency
from dejavu.engine.rows import RowTable
from dejavu.engine.scheduler import Scheduler
from dejavu.engine.seating import Colocated, Disaggregated, Lane, Seating, peak_blocks
from dejavu.engine.setup import EngineSetup
from dejavu.engine.sink import DirectNextStage, NextStage, Sampling, Sink, StagedNextStage, ToLeader, ToSum
from dejavu.engine.sizing import CacheSize
from dejavu.engine.source import Scheduled, Source, Upstream
from dejavu.engine.swapping import SwapMover
from dejavu.engine.text import StreamFactory
from dejavu.engine.timeline import DeviceTimeline, HostTimeline, Timeline
from dejavu.engine.worker import BlockTable, GivenBlocks, Stage, Worker
from dejavu.errors import CapacityError
from dejavu.kv.layout import PoolLayout, RowMap
from dejavu.kv.plan import Resharding
from dejavu.kv.pool import KVPool
from dejavu.kv.side import CacheSide, RankCache
from dejavu.kv.stream import Level
from dejavu.kv.swap import PoolLink, SimulatedLink
from dejavu.measure.clock import ClockSample, RunClock, estimate_offset
from dejavu.measure.cpu import CpuMeter, CpuUsage
from dejavu.model.spec import Shard
from dejavu.model.weight_arena import WeightArena
from dejavu.topology import CONTROLLER, Pipeline, Placement, Role
from dejavu.transport.mpi import Channel

if TYPE_CHECKING:
    from dejavu.model.weights import Allocate, Weights

LOAD_DEADLINE_S = 1800.0
CLOCK_SAMPLES = 10
AllReduce = Callable[[Tensor], None]
Result = TypeVar("Result")


@dataclass(frozen=True, slots=True)
class Outcome:
    """Hold what the workers reported at the end of a run, by rank, and the most blocks that were taken at once.

    `cpu` is what the controller took meanwhile.
    """

    reports: dict[int, Report]
    peak_blocks: tuple[int, ...]  # by pipeline
    cpu: CpuUsage


def run_controller(
    channel: Channel,
    setup: EngineSetup,
    drive: Callable[[Controller], Result],
    make_stream: StreamFactory | None = None,
    announce: Callable[[str], None] = lambda line: None,
) -> tuple[Result, Outcome]:
    """Serve from rank 0: wait for the workers, let `drive` use the controller, end the run.

    Every other rank of the channel has to call `run_worker` with the same setup. `announce` is told how each GPU's
    memory is shared out, before `drive` is called; CapacityError where not all rows fit.
    """
    workers = [placement.rank for placement in setup.topology.workers]
    workers_comm(channel, setup)
    seating = make_seating(channel, setup)
    controller = Controller(channel, seating, setup.spec.eos_token_ids, make_stream, setup.config.stall_timeout)
    for line in share_memory(channel, setup, workers, LOAD_DEADLINE_S):
        announce(line)
    for line in describe_links(controller.wait_ready(workers, LOAD_DEADLINE_S)):
        announce(line)
    controller.clock = share_clock(channel, workers)
    meter = CpuMeter()
    result = drive(controller)
    cpu = meter.read()
    return result, Outcome(controller.stop(workers), tuple(peak_blocks(seating.lanes)), cpu)


def make_seating(channel: Channel, setup: EngineSetup) -> Seating:
    """Make the books of all pipelines."""
    lanes = []
    for pipeline, cache in zip(setup.topology.pipelines, setup.caches, strict=True):
        shape, prompts_only = pipeline.shape, pipeline.role is Role.PROMPT
        table = RowTable(
            shape.num_microbatches,
            shape.microbatch_size,
            cache.block_size,
            cache.num_blocks,
            prompts_only,
            cache.blocks_per_row if cache.is_swapped else 0,
        )
        lanes.append(Lane(pipeline.ranks, table))
    if not setup.config.is_disaggregated:
        return Colocated(lanes, channel.send)
    prompt, token = lanes
    return Disaggregated(prompt, token, channel.send)


def share_clock(channel: Channel, workers: list[int]) -> RunClock:
    """Start the run's clock, and let workers on other hosts find out how far theirs is off."""
    clock = RunClock.start()
    for rank in workers:
        channel.send(rank, clock.origin_s)
        if rank not in channel.near:
            for _ in range(CLOCK_SAMPLES):
                channel.receive(rank, channel.deadline_s)
                channel.send(rank, time.monotonic())
    return clock


def join_clock(channel: Channel) -> RunClock:
    """Take the controller's clock."""
    _, origin_s = channel.receive(CONTROLLER)
    if CONTROLLER in channel.near:
        return RunClock.join(origin_s)
    samples = []
    for _ in range(CLOCK_SAMPLES):
        sent_s = time.monotonic()
        channel.send(CONTROLLER, None)
        _, remote_s = channel.receive(CONTROLLER, channel.deadline_s)
        samples.append(ClockSample(sent_s, remote_s, time.monotonic()))
    return RunClock.join(origin_s, estimate_offset(samples))


def workers_comm(channel: Channel, setup: EngineSetup) -> Any:
    """Make the workers' own communicator, where a rank is one less, if KV moves between them; all ranks call this."""
    if not setup.moves_kv and not needs_replica_carrier(channel, setup):
        return None
    return channel.comm.Split(int(channel.rank == CONTROLLER), channel.rank)


def run_worker(channel: Channel, setup: EngineSetup) -> None:
    """Take this rank's place in its pipeline until the run ends."""
    placement = setup.topology.placements[channel.rank]
    comm = workers_comm(channel, setup)
    started = time.monotonic()
    torch.set_num_threads(setup.config.threads or threads_per_worker(channel))
    with ExitStack() as stack, named_memory_errors(channel):
        vault = None if setup.config.synthetic else stack.enter_context(open_vault(setup))
        site = Site(channel, setup, placement, enter_device(channel, setup, stack), vault)
        links = open_links(site, stack)
        stage, weight_bytes = make_stage(site, make_all_reduce(site, links), stack)
        claim_memory(channel, setup, placement, site.device, weight_bytes)
        swap = make_swap(site, stack) if site.cache.is_swapped else None
        mover, pool = make_mover(site, comm, stack, swap)
        channel.send(CONTROLLER, Ready(time.monotonic() - started, tuple(links.describe())))
        clock = join_clock(channel)
        worker = make_worker(site, stage, pool, swap.mover.books if swap else GivenBlocks(), mover, links, clock)
        meter = CpuMeter()
        worker.run()
        report = Report(worker.flights.steps, meter.read(), worker.flights.host_s)
        channel.send(CONTROLLER, mover.report(report, channel.rank, clock.at_s))


@contextmanager
def named_memory_errors(channel: Channel) -> Iterator[None]:
    """Turn torch's error of a GPU without memory into one that says what to do."""
    try:
        yield
    except torch.OutOfMemoryError as error:
        raise CapacityError(
            f"the GPU of rank {channel.rank} has no memory left ({str(error).splitlines()[0]}): "
            "lower --microbatch-size, --max-prompt-tokens or --row-len, or free what other programs hold on it"
        ) from error


def threads_per_worker(channel: Channel) -> int:
    """Share this host's cores between the workers on it."""
    workers_here = len((channel.near | {channel.rank}) - {CONTROLLER})
    return max(1, len(os.sched_getaffinity(0)) // workers_here)


@dataclass(frozen=True, slots=True)
class Site:
    """Say where in which run a worker stands."""

    channel: Channel
    setup: EngineSetup
    placement: Placement
    device: Device
    vault: Vault | None  # synthetic stages have nothing to keep

    @property
    def shard(self) -> Shard:
        """Give this rank's part of the model."""
        assert self.placement.shard is not None
        return self.placement.shard

    @property
    def pipeline(self) -> Pipeline:
        """Give the pipeline that this rank is part of."""
        return self.setup.topology.pipelines[self.placement.pipeline]

    @property
    def cache(self) -> CacheSize:
        """Give the size of this rank's pool."""
        return self.setup.caches[self.placement.pipeline]

    def neighbour(self, distance: int) -> int:
        """Give the same tensor rank of a stage before or behind this one."""
        return self.pipeline.rank_of(self.placement.stage + distance, self.shard.tp_rank)


def make_stage(site: Site, all_reduce: AllReduce | None, stack: ExitStack) -> tuple[Stage, int]:
    """Load this rank's part of the model, or map what the keeper has of it; give it and the bytes of its weights."""
    setup, shard = site.setup, site.shard
    if setup.config.synthetic:
        from dejavu.model.synthetic import SyntheticStage

        return SyntheticStage(shard, setup.spec.vocab_size, *setup.config.synthetic), 0
    from dejavu.model.decoder import StageModel

    arena, memory = WeightArena(setup.spec, shard, dtype_of(setup)), None
    if site.vault and outlives_worker(site.device, arena):
        weights, memory = take_weights(
            site.vault, site.device, site.placement, arena, lambda allocate: load_weights(site, allocate)
        )
    else:
        weights = load_weights(site)
    weight_bytes = sum(weight.nbytes for weight in weights.values())
    stage = StageModel(setup.spec, shard, weights, all_reduce)
    if memory and setup.on_cuda:
        stack.enter_context(memory)
    elif memory:
        memory.close()  # tensors that are used where they lie hold it
    return stage, weight_bytes


def load_weights(site: Site, allocate: "Allocate | None" = None) -> "Weights":
    """Read this rank's weights from the checkpoint, or make them up, into what `allocate` gives."""
    from dejavu.model.weights import dummy_stage, load_stage

    setup, dtype, torch_device = site.setup, dtype_of(site.setup), site.device.torch_device
    if setup.directory:
        return load_stage(setup.directory, setup.spec, site.shard, dtype, torch_device, allocate)
    return dummy_stage(setup.spec, site.shard, dtype, torch_device, allocate)


def open_links(site: Site, stack: ExitStack) -> Links:
    """Join this worker's GPU to its stage's and its neighbour stages'; on a CPU they are joined by MPI alone."""
    setup, channel, device, shard = site.setup, site.channel, site.device, site.shard
    if not setup.on_cuda:
        return Links()
    links = Links(open_sums(channel, device, site.pipeline.stage_ranks(site.placement.stage), stack))
    if not shard.is_first:
        most = most_tokens(setup, site.placement)
        size = setup.spec.hidden_size
        links.inbox = open_inbox(channel, device, site.neighbour(-1), most, size, dtype_of(setup), stack)
    if not shard.is_last:
        links.outbox = open_outbox(channel, device, site.neighbour(1), stack)
    return links


def describe_links(answers: Mapping[int, Ready]) -> list[str]:
    """Say how the GPUs are joined, each way once with the ranks that use it."""
    users: dict[str, list[int]] = {}
    for rank, ready in sorted(answers.items()):
        for note in ready.notes:
            users.setdefault(note, []).append(rank)
    return [f"{note} (rank {', '.join(map(str, ranks))})" for note, ranks in users.items()]


def make_all_reduce(site: Site, links: Links) -> AllReduce | None:
    """Give what sums over the stage's tensor ranks, if there are several."""
    channel, ranks = site.channel, site.pipeline.stage_ranks(site.placement.stage)
    if len(ranks) == 1:
        return None
    return links.sums or (lambda tensor: channel.all_reduce(tensor, ranks))


@dataclass(frozen=True, slots=True)
class SwappedMemory:
    """Hold a rank's swapped KV memory: the device's part [block, layer, k/v, token, kv_head, head_dim], and all of it.

    Synthetic stages have none.
    """

    mover: SwapMover
    tensor: Tensor
    host: KVPool | None


def make_swap(site: Site, stack: ExitStack) -> SwappedMemory:
    """Take swapped KV memory, of which the keeper has the host's, and what swaps it; `stack` gives both back."""
    setup, shape, cache, device = site.setup, site.pipeline.shape, site.cache, site.device
    books = Residency(shape.num_microbatches, shape.microbatch_size, cache.blocks_per_row, setup.config.resident)
    whole = rank_cache(setup, site.placement)
    if setup.config.synthetic_link:
        simulated = SimulatedLink(whole.layout.bytes_per_token, setup.config.synthetic_link)
        mover = SwapMover(device, books, simulated, device.compute_stream)
        return SwappedMemory(stack.enter_context(closing(mover)), make_empty_pool(site), None)
    assert site.vault
    layout = replace(whole.layout, num_blocks=cache.device_blocks)
    memory = stack.enter_context(device.allocate_exportable(layout.total_bytes))
    device.fill(memory, 0, stream=device.compute_stream)
    kept = stack.enter_context(take_pool(site.vault, device, site.placement, whole.layout, Location.HOST)[0])
    host = KVPool(device, whole, make_rows(site), dtype_of(setup), memory=kept)
    mover = SwapMover(device, books, PoolLink(device, layout, memory, host.memory), device.compute_stream)
    tensor = memory.view(0, layout.total_bytes).tensor(dtype_of(setup), layout.shape)
    return SwappedMemory(stack.enter_context(closing(mover)), tensor, host)


def make_mover(site: Site, comm: Any, stack: ExitStack, swap: SwappedMemory | None = None) -> tuple[Mover, Tensor]:
    """Take this rank's KV memory, and what moves KV in or out of it; `stack` gives both back.

    The memory is zeros [block, layer, k/v, token, kv_head, head_dim], unless the keeper has had it before.
    """
    setup, device = site.setup, site.device
    movers: list[Mover] = [swap.mover] if swap else []
    if not site.vault:
        movers.append(SyntheticMover(site.channel) if setup.config.is_disaggregated else NoMover())
        return Movers(movers), swap.tensor if swap else make_empty_pool(site)
    cache = rank_cache(setup, site.placement)
    if swap:
        # A prompt lands in host memory, behind the flushes for whoever had its blocks before; copies leave from there.
        assert swap.host
        pool, stream, tensor = swap.host, swap.mover.lanes.flush_stream, swap.tensor
    else:
        memory = stack.enter_context(take_pool(site.vault, device, site.placement, cache.layout)[0])
        pool, stream = KVPool(device, cache, make_rows(site), dtype_of(setup), memory=memory), device.compute_stream
        tensor = pool.tensor
    if setup.moves_kv:
        movers.append(make_handover(site, comm, pool, stream, stack))
    carrier = open_replica_carrier(site.channel, setup, device, comm, stack)
    copied = ReplicaSource(device, pool.memory, stream)
    movers += make_replicators(site.channel, setup, site.vault, copied, partial(pool_layout, setup), carrier, stack)
    return Movers(movers) if movers else NoMover(), tensor


def make_handover(site: Site, comm: Any, pool: KVPool, stream: Stream, stack: ExitStack) -> Mover:
    """Move prompts' KV between the pipelines, in or out of this rank's pool, behind the work of `stream`."""
    from dejavu.transport.registry import open_carrier

    setup, device = site.setup, site.device
    level = Level(setup.config.stream_level)
    carrier = stack.enter_context(open_carrier(setup.config.transport, device, comm, gathering=level.gathering))
    sides = [
        CacheSide(tuple(rank_cache(setup, p) for p in setup.topology.workers_of(pipeline)), {})
        for pipeline in setup.topology.pipelines
    ]
    kind = PromptMover if site.pipeline.role is Role.PROMPT else TokenMover
    return kind(site.channel, carrier, pool, Resharding(*sides), level, stream)


def pool_layout(setup: EngineSetup, placement: Placement) -> PoolLayout:
    """Describe the pool of a worker."""
    return rank_cache(setup, placement).layout


def rank_cache(setup: EngineSetup, placement: Placement) -> RankCache:
    """Describe the pool of a worker, by its rank among the workers."""
    shard, cache, spec = placement.shard, setup.caches[placement.pipeline], setup.spec
    assert shard is not None
    heads = spec.num_kv_heads // shard.tp_size
    layers = shard.last_layer - shard.first_layer
    itemsize = dtype_of(setup).itemsize
    first_head = shard.tp_rank * heads
    layout = PoolLayout(
        cache.num_blocks, shard.first_layer, layers, cache.block_size, first_head, heads, spec.head_dim, itemsize
    )
    return RankCache(placement.rank - 1, layout)


def make_rows(site: Site) -> RowMap:
    """Make the table of rows that KV moves out of, or of slots that it moves into."""
    shape, cache = site.pipeline.shape, site.cache
    if site.pipeline.role is Role.PROMPT:
        return RowMap(shape.num_microbatches, shape.microbatch_size, cache.blocks_per_row, cache.block_size)
    return RowMap(1, cache.num_blocks, cache.blocks_per_row, cache.block_size)


def dtype_of(setup: EngineSetup) -> torch.dtype:
    """Give the number format of the run."""
    dtype: torch.dtype = getattr(torch, setup.dtype)
    return dtype


def make_empty_pool(site: Site) -> Tensor:
    """Give the pool of a synthetic stage: of no layers."""
    spec, cache, heads = site.setup.spec, site.cache, site.setup.spec.num_kv_heads // site.shard.tp_size
    return torch.zeros((cache.num_blocks, 0, 2, cache.block_size, heads, spec.head_dim), dtype=dtype_of(site.setup))


def make_worker(
    site: Site,
    stage: Stage,
    pool: Tensor,
    blocks: BlockTable,
    mover: Mover,
    links: Links,
    clock: RunClock,
) -> Worker:
    """Connect a worker to the ranks before and behind it."""
    pipeline, config = site.pipeline, site.setup.config
    stage_index, tp_rank = site.placement.stage, site.shard.tp_rank
    leads_first = (stage_index, tp_rank) == (0, 0)
    peers = pipeline.stage_ranks(0)[1:] if leads_first else []
    next_rank = [] if site.shard.is_last else [site.neighbour(1)]
    scheduler = Scheduler(
        pipeline.shape.num_microbatches,
        config.prompt_chunk,
        config.max_prompt_tokens,
        site.setup.spec.eos_token_ids,
        prompts_only=pipeline.role is Role.PROMPT,
        tells_seats=site.cache.is_swapped,
    )
    flights = Flights(site.channel.rank, (pipeline.first_stage + stage_index, tp_rank), clock.now_s, links.check)
    source: Source = Upstream(site.channel, mover, flights)
    if leads_first:
        source = Scheduled(site.channel, mover, flights, scheduler, clock.now_s)
    return Worker(
        site.channel,
        stage,
        pool,
        blocks,
        make_inlet(site, stage, links),
        source,
        make_sink(site, links, scheduler, clock),
        mover,
        flights,
        make_timeline(site, clock),
        followers=[*peers, *next_rank],
        peers=peers,
    )


def make_timeline(site: Site, clock: RunClock) -> Timeline:
    """Time passes by the clock, or on a GPU by events."""
    return DeviceTimeline(site.device, clock.now_s) if site.setup.on_cuda else HostTimeline(clock.now_s)


def make_inlet(site: Site, stage: Stage, links: Links) -> Inlet:
    """Take hidden states from the stage before."""
    if site.shard.is_first:
        return NoInlet()
    if links.inbox is not None:
        return DirectInlet(links.inbox)
    inlet = HostInlet(site.channel, site.neighbour(-1), stage.hidden_size, stage.dtype)
    return StagedInlet(inlet, site.device.torch_device) if site.setup.on_cuda else inlet


def make_sink(site: Site, links: Links, scheduler: Scheduler, clock: RunClock) -> Sink:
    """Pass hidden states on; on the last stage sample, and tell the first stage and the controller."""
    channel, shard, on_cuda = site.channel, site.shard, site.setup.on_cuda
    if not shard.is_last and links.outbox is not None:
        return DirectNextStage(channel, site.neighbour(1), links.outbox)
    if not shard.is_last:
        return (StagedNextStage if on_cuda else NextStage)(channel, site.neighbour(1))
    logits = make_logits(site, links)
    if shard.tp_rank > 0:
        leader = site.pipeline.rank_of(site.placement.stage)
        return ToSum(logits) if isinstance(logits, LogitSum) else ToLeader(channel, leader)
    head = site.pipeline.head
    to_head = scheduler.sampled if head == channel.rank else lambda sampled: channel.send(head, sampled)
    tell = [to_head, lambda sampled: channel.send(CONTROLLER, sampled)]
    return Sampling(site.setup.spec, logits, clock.now_s, tell)


def make_logits(site: Site, links: Links) -> Logits:
    """Bring the last stage's parts of the logits together: by MPI, or between GPUs by a sum."""
    spec, workers = site.setup.spec, site.setup.topology.workers_of(site.pipeline)
    shards = [(p.rank, p.shard) for p in workers if p.stage == site.placement.stage and p.shard]
    if site.shard.tp_size == 1:
        return OneRank()
    if links.sums is not None:
        return LogitSum(spec.vocab_size, site.shard, links.sums)
    return MpiLogits(site.channel, spec.vocab_size, shards)
