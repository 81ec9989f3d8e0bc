"""Join the engine's parts on every rank: weights, pool, source and sink of each worker, and the controller."""

import os
import time
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from torch import Tensor

from dejavu.engine.controller import Controller
from dejavu.engine.flight import Flights
from dejavu.engine.handover import Mover, NoMover, PromptMover, SyntheticMover, TokenMover
from dejavu.engine.inlet import HostInlet, Inlet, NoInlet
from dejavu.engine.messages import Ready, Report
from dejavu.engine.rows import RowTable
from dejavu.engine.scheduler import Scheduler
from dejavu.engine.seating import Colocated, Disaggregated, Lane, Seating, peak_blocks
from dejavu.engine.setup import EngineSetup
from dejavu.engine.sink import NextStage, Sampling, Sink, ToLeader
from dejavu.engine.sizing import CacheSize
from dejavu.engine.source import Scheduled, Source, Upstream
from dejavu.engine.text import StreamFactory
from dejavu.engine.timeline import HostTimeline
from dejavu.engine.worker import Stage, Worker
from dejavu.kv.layout import PoolLayout, RowMap
from dejavu.kv.plan import Resharding
from dejavu.kv.pool import KVPool
from dejavu.kv.side import CacheSide, RankCache
from dejavu.kv.stream import Level
from dejavu.measure.clock import ClockSample, RunClock, estimate_offset
from dejavu.measure.cpu import CpuMeter, CpuUsage
from dejavu.model.spec import Shard
from dejavu.topology import CONTROLLER, Pipeline, Placement, Role
from dejavu.transport.mpi import Channel

LOAD_DEADLINE_S = 1800.0
CLOCK_SAMPLES = 10
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
) -> tuple[Result, Outcome]:
    """Serve from rank 0: wait for the workers, let `drive` use the controller, end the run.

    Every other rank of the channel has to call `run_worker` with the same setup.
    """
    workers = [placement.rank for placement in setup.topology.workers]
    workers_comm(channel, setup)
    seating = make_seating(channel, setup)
    controller = Controller(channel, seating, setup.spec.eos_token_ids, make_stream, setup.config.stall_timeout)
    controller.wait_ready(workers, LOAD_DEADLINE_S)
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
            shape.num_microbatches, shape.microbatch_size, cache.block_size, cache.num_blocks, prompts_only
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
    if not setup.moves_kv:
        return None
    return channel.comm.Split(int(channel.rank == CONTROLLER), channel.rank)


def run_worker(channel: Channel, setup: EngineSetup) -> None:
    """Take this rank's place in its pipeline until the run ends."""
    site = Site(channel, setup, setup.topology.placements[channel.rank])
    comm = workers_comm(channel, setup)
    started = time.monotonic()
    torch.set_num_threads(setup.config.threads or threads_per_worker(channel))
    stage = make_stage(site)
    with ExitStack() as stack:
        mover, pool = make_mover(site, comm, stack)
        channel.send(CONTROLLER, Ready(time.monotonic() - started))
        worker = make_worker(site, stage, pool, mover, join_clock(channel))
        meter = CpuMeter()
        worker.run()
        channel.send(CONTROLLER, Report(worker.flights.steps, meter.read(), worker.flights.host_s))


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


def make_stage(site: Site) -> Stage:
    """Load this rank's part of the model."""
    setup, shard, channel = site.setup, site.shard, site.channel
    if setup.config.synthetic:
        from dejavu.model.synthetic import SyntheticStage

        return SyntheticStage(shard, setup.spec.vocab_size, *setup.config.synthetic)
    from dejavu.model.decoder import StageModel
    from dejavu.model.weights import dummy_stage, load_stage

    ranks = site.pipeline.stage_ranks(site.placement.stage)

    def all_reduce(tensor: Tensor) -> None:
        channel.all_reduce(tensor, ranks)

    dtype = getattr(torch, setup.dtype)
    if setup.directory:
        weights = load_stage(setup.directory, setup.spec, shard, dtype)
    else:
        weights = dummy_stage(setup.spec, shard, dtype)
    return StageModel(setup.spec, shard, weights, all_reduce if len(ranks) > 1 else None)


def make_mover(site: Site, comm: Any, stack: ExitStack) -> tuple[Mover, Tensor]:
    """Take this rank's KV memory, and what moves KV in or out of it; `stack` gives both back.

    The memory is zeros [block, layer, k/v, token, kv_head, head_dim].
    """
    setup, role = site.setup, site.pipeline.role
    if not setup.moves_kv:
        mover = SyntheticMover(site.channel) if setup.config.is_disaggregated else NoMover()
        return mover, make_pool(site)
    from dejavu.device import open_device
    from dejavu.transport.registry import open_carrier

    level = Level(setup.config.stream_level)
    device = stack.enter_context(open_device("cpu"))
    pool = stack.enter_context(KVPool(device, rank_cache(site.setup, site.placement), make_rows(site), dtype_of(setup)))
    carrier = stack.enter_context(open_carrier(setup.config.transport, device, comm, gathering=level.gathering))
    sides = [
        CacheSide(tuple(rank_cache(setup, p) for p in setup.topology.workers_of(pipeline)), {})
        for pipeline in setup.topology.pipelines
    ]
    kind = PromptMover if role is Role.PROMPT else TokenMover
    return kind(site.channel, carrier, pool, Resharding(*sides), level, device.compute_stream), pool.tensor.zero_()


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


def make_pool(site: Site) -> Tensor:
    """Take KV memory that nothing moves in or out of."""
    spec, cache, shard = site.setup.spec, site.cache, site.shard
    num_layers = 0 if site.setup.config.synthetic else shard.last_layer - shard.first_layer
    heads = spec.num_kv_heads // shard.tp_size
    return torch.zeros(
        (cache.num_blocks, num_layers, 2, cache.block_size, heads, spec.head_dim), dtype=dtype_of(site.setup)
    )


def make_worker(site: Site, stage: Stage, pool: Tensor, mover: Mover, clock: RunClock) -> Worker:
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
    )
    flights = Flights(site.channel.rank, (pipeline.first_stage + stage_index, tp_rank), clock.now_s)
    source: Source = Upstream(site.channel, mover, flights)
    if leads_first:
        source = Scheduled(site.channel, mover, flights, scheduler, clock.now_s)
    return Worker(
        site.channel,
        stage,
        pool,
        make_inlet(site, stage),
        source,
        make_sink(site, scheduler, clock),
        mover,
        flights,
        HostTimeline(clock.now_s),
        followers=[*peers, *next_rank],
        peers=peers,
    )


def make_inlet(site: Site, stage: Stage) -> Inlet:
    """Take hidden states from the stage before."""
    if site.shard.is_first:
        return NoInlet()
    return HostInlet(site.channel, site.neighbour(-1), stage.hidden_size, stage.dtype)


def make_sink(site: Site, scheduler: Scheduler, clock: RunClock) -> Sink:
    """Pass hidden states on; on the last stage sample, and tell the first stage and the controller."""
    channel, pipeline, shard = site.channel, site.pipeline, site.shard
    if not shard.is_last:
        return NextStage(channel, site.neighbour(1))
    if shard.tp_rank > 0:
        return ToLeader(channel, pipeline.rank_of(site.placement.stage))
    head = pipeline.head
    to_head = scheduler.sampled if head == channel.rank else lambda sampled: channel.send(head, sampled)
    workers = site.setup.topology.workers_of(pipeline)
    shards = [(p.rank, p.shard) for p in workers if p.stage == site.placement.stage and p.shard]
    return Sampling(
        channel, site.setup.spec, shards, clock.now_s, [to_head, lambda sampled: channel.send(CONTROLLER, sampled)]
    )
