"""Join the engine's parts on every rank: weights, pool, source and sink of each worker, and the controller."""

import os
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeVar

import torch
from torch import Tensor

from dejavu.engine.controller import Controller
from dejavu.engine.messages import Ready, Report
from dejavu.engine.rows import RowTable
from dejavu.engine.scheduler import Scheduler
from dejavu.engine.setup import EngineSetup
from dejavu.engine.sink import NextStage, Sampling, Sink, ToLeader
from dejavu.engine.source import Scheduled, Source, Upstream
from dejavu.engine.text import StreamFactory
from dejavu.engine.worker import Stage, Worker
from dejavu.measure.clock import ClockSample, RunClock, estimate_offset
from dejavu.measure.cpu import CpuMeter, CpuUsage
from dejavu.topology import CONTROLLER, Placement
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
    peak_blocks: int
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
    config, cache = setup.config, setup.cache
    workers = [placement.rank for placement in setup.topology.workers]
    table = RowTable(config.microbatches, config.microbatch_size, cache.block_size, cache.num_blocks)
    head = setup.topology.rank_of(0)
    controller = Controller(channel, head, table, setup.spec.eos_token_ids, make_stream, config.stall_timeout)
    controller.wait_ready(workers, LOAD_DEADLINE_S)
    controller.clock = share_clock(channel, workers)
    meter = CpuMeter()
    result = drive(controller)
    cpu = meter.read()
    return result, Outcome(controller.stop(workers), table.blocks.peak, cpu)


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


def run_worker(channel: Channel, setup: EngineSetup) -> None:
    """Take this rank's place in the pipeline until the run ends."""
    placement = setup.topology.placements[channel.rank]
    started = time.monotonic()
    torch.set_num_threads(setup.config.threads or threads_per_worker(channel))
    stage = make_stage(channel, setup, placement)
    pool = make_pool(setup, placement)
    channel.send(CONTROLLER, Ready(time.monotonic() - started))
    worker = make_worker(channel, setup, placement, stage, pool, join_clock(channel))
    meter = CpuMeter()
    worker.run()
    channel.send(CONTROLLER, Report(worker.steps, meter.read()))


def threads_per_worker(channel: Channel) -> int:
    """Share this host's cores between the workers on it."""
    workers_here = len((channel.near | {channel.rank}) - {CONTROLLER})
    return max(1, len(os.sched_getaffinity(0)) // workers_here)


def make_stage(channel: Channel, setup: EngineSetup, placement: Placement) -> Stage:
    """Load this rank's part of the model."""
    shard = placement.shard
    assert shard is not None
    if setup.config.synthetic:
        from dejavu.model.synthetic import SyntheticStage

        return SyntheticStage(shard, setup.spec.vocab_size, *setup.config.synthetic)
    from dejavu.model.decoder import StageModel
    from dejavu.model.weights import dummy_stage, load_stage

    ranks = setup.topology.stage_ranks(placement.stage)

    def all_reduce(tensor: Tensor) -> None:
        channel.all_reduce(tensor, ranks)

    dtype = getattr(torch, setup.dtype)
    if setup.directory:
        weights = load_stage(setup.directory, setup.spec, shard, dtype)
    else:
        weights = dummy_stage(setup.spec, shard, dtype)
    return StageModel(setup.spec, shard, weights, all_reduce if len(ranks) > 1 else None)


def make_pool(setup: EngineSetup, placement: Placement) -> Tensor:
    """Take this rank's KV memory: zeros [block, layer, k/v, token, kv_head, head_dim]."""
    shard, spec, cache = placement.shard, setup.spec, setup.cache
    assert shard is not None
    num_layers = 0 if setup.config.synthetic else shard.last_layer - shard.first_layer
    heads = spec.num_kv_heads // shard.tp_size
    shape = (cache.num_blocks, num_layers, 2, cache.block_size, heads, spec.head_dim)
    return torch.zeros(shape, dtype=getattr(torch, setup.dtype))


def make_worker(
    channel: Channel, setup: EngineSetup, placement: Placement, stage: Stage, pool: Tensor, clock: RunClock
) -> Worker:
    """Connect a worker to the ranks before and behind it."""
    topology, shard = setup.topology, placement.shard
    assert shard is not None
    here = placement.stage, shard.tp_rank
    first, last = placement.stage == 0, placement.stage == topology.pp - 1
    peers = topology.stage_ranks(0)[1:] if here == (0, 0) else []
    next_rank = [] if last else [topology.rank_of(placement.stage + 1, shard.tp_rank)]
    scheduler = Scheduler(
        setup.config.microbatches,
        setup.config.prompt_chunk,
        setup.config.max_prompt_tokens,
        setup.spec.eos_token_ids,
    )
    return Worker(
        channel,
        stage,
        pool,
        make_source(channel, setup, placement, scheduler),
        make_sink(channel, setup, placement, scheduler, clock),
        previous=None if first else topology.rank_of(placement.stage - 1, shard.tp_rank),
        followers=[*peers, *next_rank],
        peers=peers,
        place=here,
        now_s=clock.now_s,
    )


def make_source(channel: Channel, setup: EngineSetup, placement: Placement, scheduler: Scheduler) -> Source:
    """Let the first stage's leader schedule, its tensor peers follow it, and every later stage the one before."""
    assert placement.shard is not None
    if placement.stage > 0:
        return Upstream(channel, setup.topology.rank_of(placement.stage - 1, placement.shard.tp_rank))
    return (
        Scheduled(channel, scheduler) if placement.shard.tp_rank == 0 else Upstream(channel, setup.topology.rank_of(0))
    )


def make_sink(
    channel: Channel, setup: EngineSetup, placement: Placement, scheduler: Scheduler, clock: RunClock
) -> Sink:
    """Pass hidden states on; on the last stage sample, and tell the first stage and the controller."""
    topology, shard = setup.topology, placement.shard
    assert shard is not None
    if not shard.is_last:
        return NextStage(channel, topology.rank_of(placement.stage + 1, shard.tp_rank))
    if shard.tp_rank > 0:
        return ToLeader(channel, topology.rank_of(placement.stage))
    head = topology.rank_of(0)
    to_head = scheduler.sampled if head == channel.rank else lambda sampled: channel.send(head, sampled)
    shards = [(p.rank, p.shard) for p in topology.workers if p.stage == placement.stage and p.shard]
    return Sampling(
        channel, setup.spec, shards, clock.now_s, [to_head, lambda sampled: channel.send(CONTROLLER, sampled)]
    )
