"""Join the engine's parts on every rank: weights, pool, source and sink of each worker, and the controller."""

from collections.abc import Callable, Sequence
from contextlib import ExitStack, closing
from dataclasses import dataclass, replace
from functools import partial
from typing import TYPE_CHECKING, Any, TypeVar

from torch import Tensor

from dejavu.cluster.accelerator import most_tokens
from dejavu.cluster.company import WorkerCompany
from dejavu.cluster.keeping import (
    Replicating,
    RestoredPool,
    open_replica_carrier,
    outlives_worker,
    take_flushed,
    take_pool,
    take_weights,
)
from dejavu.cluster.links import Links, open_inbox, open_outbox, open_sums
from dejavu.cluster.site import Holdings, Site, dtype_of, make_empty_pool, make_rows, pool_layout, rank_cache
from dejavu.cluster.stores import keep_on_disk, restore_from_disk
from dejavu.device.base import Location, Stream
from dejavu.engine.controller import Controller
from dejavu.engine.disaggregated import Disaggregated
from dejavu.engine.flight import Flights
from dejavu.engine.handover import Listener, Mover, Movers, PromptMover, SyntheticMover, TokenMover
from dejavu.engine.inlet import DirectInlet, HostInlet, Inlet, NoInlet, StagedInlet
from dejavu.engine.journal import NoJournal, Past
from dejavu.engine.logits import Logits, LogitSum, MpiLogits, OneRank
from dejavu.engine.messages import Admissions, Report, Resume, Sampled
from dejavu.engine.recovery import Death
from dejavu.engine.replication import ReplicaSource
from dejavu.engine.residency import Residency
from dejavu.engine.rows import RowTable
from dejavu.engine.scheduler import Scheduler
from dejavu.engine.seating import Colocated, Lane, Seating, peak_blocks
from dejavu.engine.setup import EngineSetup
from dejavu.engine.sink import DirectNextStage, NextStage, Sampling, Sink, StagedNextStage, ToLeader, ToSum
from dejavu.engine.source import Scheduled, Source, Upstream
from dejavu.engine.swapping import SwapMover
from dejavu.engine.text import StreamFactory
from dejavu.engine.timeline import DeviceTimeline, HostTimeline, Timeline
from dejavu.engine.unseen import UnseenTokens
from dejavu.engine.worker import GivenBlocks, Stage, Worker
from dejavu.kv.flushed import FlushedRow
from dejavu.kv.plan import Resharding
from dejavu.kv.pool import KVPool
from dejavu.kv.side import CacheSide
from dejavu.kv.stream import Level
from dejavu.kv.swap import PoolLink, SimulatedLink
from dejavu.measure.clock import RunClock
from dejavu.measure.cpu import CpuMeter, CpuUsage
from dejavu.measure.failures import FailureRecord
from dejavu.model.weight_arena import WeightArena
from dejavu.topology import CONTROLLER, Role
from dejavu.transport.mpi import Channel

if TYPE_CHECKING:
    from dejavu.model.weights import Allocate, Weights

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
    failures: list[FailureRecord]


@dataclass(frozen=True, slots=True)
class Inheritance:
    """Hold what a new controller has of the one before: its journal, who died with it, and when that was seen."""

    past: Past
    deaths: Sequence[Death] = ()
    detected_s: float = 0.0  # on the host's clock


def run_controller(
    channel: Channel,
    setup: EngineSetup,
    drive: Callable[[Controller], Result],
    make_stream: StreamFactory | None = None,
    announce: Callable[[str], None] = lambda line: None,
    journal: NoJournal | None = None,
    inheritance: Inheritance | None = None,
) -> tuple[Result, Outcome]:
    """Serve from rank 0: wait for the workers, let `drive` use the controller, end the run.

    Every other rank of the channel has to call `run_worker` with the same setup, or with spares `stand_by`. `announce`
    is told how each GPU's memory is shared out, before `drive` is called, and of failures; CapacityError where not all
    rows fit. What happens goes into the `journal`; with an `inheritance`, the run is one that another process began.
    """
    workers = [placement.rank for placement in setup.topology.workers]
    journal = journal or NoJournal()
    seating = make_seating(channel, setup, journal)
    controller = Controller(channel, seating, setup.spec.eos_token_ids, make_stream, setup.config.stall_timeout)
    controller.announce = announce
    controller.journal = journal
    company = controller.company = WorkerCompany(channel, setup, controller, continues=inheritance is not None)
    if inheritance:
        controller.adopt(inheritance.past)
        controller.take_over(inheritance.deaths, inheritance.detected_s - controller.clock.origin_s)
    else:
        controller.enduring(company.assemble)
    meter = CpuMeter()
    result = drive(controller)
    cpu = meter.read()
    reports = controller.stop(workers)
    for lane in seating.lanes:
        assert lane.table.is_empty, f"blocks of {lane.table.occupants} were never given back"
    return result, Outcome(reports, tuple(peak_blocks(seating.lanes)), cpu, controller.failures.records)


def make_seating(channel: Channel, setup: EngineSetup, journal: NoJournal) -> Seating:
    """Make the books of all pipelines; who takes a row where tokens are generated goes into the journal."""
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
        is_replicated = setup.config.replicate != "off" and not prompts_only and not cache.is_swapped
        lanes.append(Lane(pipeline.ranks, table, is_replicated=is_replicated))

    def send(rank: int, message: object) -> None:
        if isinstance(message, Admissions | Resume):
            number = next(number for number, lane in enumerate(lanes) if rank in lane.ranks)
            if lanes[number].table.prompts_only:
                journal.note_prompts(message.admissions)
            else:
                journal.note_seats(number, message.admissions)
        journal.flush()  # whoever comes next knows what ranks may have done
        channel.send_if_whole(rank, message)

    if not setup.config.is_disaggregated:
        return Colocated(lanes, send)
    prompt, token = lanes
    return Disaggregated(prompt, token, send, journal)


def make_stage(site: Site, all_reduce: AllReduce | None, stack: ExitStack) -> tuple[Stage, int]:
    """Load this rank's part of the model, or map what the keeper has of it; give it and the bytes of its weights."""
    setup, shard = site.setup, site.shard
    if setup.config.synthetic:
        from dejavu.model.synthetic import SyntheticStage

        return SyntheticStage(shard, setup.spec.vocab_size, *setup.config.synthetic), 0
    arena, memory = WeightArena(setup.spec, shard, dtype_of(setup)), None
    if site.vault and outlives_worker(site.device, arena):
        weights, memory = take_weights(
            site.vault, site.device, site.placement, arena, lambda allocate: load_weights(site, allocate)
        )
    else:
        weights = load_weights(site)
    weight_bytes = sum(weight.nbytes for weight in weights.values())
    stage = build_stage(site, weights, all_reduce)
    if memory and setup.on_cuda:
        stack.enter_context(memory)
    elif memory:
        memory.close()  # tensors that are used where they lie hold it
    return stage, weight_bytes


def build_stage(site: Site, weights: "Weights", all_reduce: AllReduce | None) -> Stage:
    """Make what computes with these weights, which it takes over."""
    from dejavu.model.decoder import StageModel

    return StageModel(site.setup.spec, site.shard, weights, all_reduce)


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
        links.onward = links.outbox.name if links.outbox else "mpi, through the hosts' memory"
    stack.push(links.leave)
    return links


def make_all_reduce(site: Site, links: Links) -> AllReduce | None:
    """Give what sums over the stage's tensor ranks, if there are several."""
    channel, ranks = site.channel, site.pipeline.stage_ranks(site.placement.stage)
    if len(ranks) == 1:
        return None
    return links.sums or (lambda tensor: channel.all_reduce(tensor, ranks))


def hold_swapped(site: Site, stage: Stage, stack: ExitStack) -> Holdings:
    """Take the host memory of a place that swaps, and what says how much of it is valid; `stack` gives both back."""
    assert site.vault
    layout = rank_cache(site.setup, site.placement).layout
    memory, has_kv = take_pool(site.vault, site.device, site.placement, layout, Location.HOST)
    stack.enter_context(memory)
    flushed = stack.enter_context(take_flushed(site.vault, site.device, site.placement, site.pipeline.shape))
    if not has_kv:
        flushed.clear()
    kept_bytes = memory.nbytes if has_kv else 0
    return Holdings(stage, make_empty_pool(site), memory, CpuMeter(), has_kv, kept_bytes, flushed)


@dataclass(frozen=True, slots=True)
class SwappedMemory:
    """Hold a rank's swapped KV memory: the device's part [block, layer, k/v, token, kv_head, head_dim], and all of it.

    Synthetic stages have none.
    """

    mover: SwapMover
    tensor: Tensor
    host: KVPool | None


def make_swap(site: Site, holdings: Holdings, stack: ExitStack) -> SwappedMemory:
    """Take the device's part of swapped KV memory, and what swaps it; `stack` gives both back."""
    setup, shape, cache, device = site.setup, site.pipeline.shape, site.cache, site.device
    books = Residency(shape.num_microbatches, shape.microbatch_size, cache.blocks_per_row, setup.config.resident)
    whole = rank_cache(setup, site.placement)
    if setup.config.synthetic_link:
        simulated = SimulatedLink(whole.layout.bytes_per_token, setup.config.synthetic_link)
        mover = SwapMover(device, books, simulated, device.compute_stream)
        return SwappedMemory(stack.enter_context(closing(mover)), make_empty_pool(site), None)
    assert holdings.memory
    layout = replace(whole.layout, num_blocks=cache.device_blocks)
    memory = stack.enter_context(device.allocate_exportable(layout.total_bytes))
    device.fill(memory, 0, stream=device.compute_stream)
    host = KVPool(device, whole, make_rows(site), dtype_of(setup), memory=holdings.memory)
    device.synchronize()
    link = PoolLink(device, layout, memory, host.memory)
    mover = SwapMover(device, books, link, device.compute_stream, holdings.flushed)
    tensor = memory.view(0, layout.total_bytes).tensor(dtype_of(setup), layout.shape)
    return SwappedMemory(stack.enter_context(closing(mover)), tensor, host)


def make_mover(
    site: Site, comm: Any, holdings: Holdings, swap: SwappedMemory | None, ties: ExitStack
) -> tuple[Mover, RestoredPool]:
    """Make what moves KV in or out of this rank's pool, after giving back what its replica has; `ties` ends it."""
    setup, device = site.setup, site.device
    movers: list[Mover] = [Listener(holdings.count_as_known), *([swap.mover] if swap else [])]
    if not site.vault:
        if setup.config.is_disaggregated:
            movers.append(SyntheticMover(site.channel))
        return Movers(movers), RestoredPool()
    if swap:
        # A prompt lands in host memory, behind the flushes for whoever had its blocks before; copies leave from there.
        assert swap.host
        pool, stream = swap.host, swap.mover.lanes.flush_stream
    else:
        cache = rank_cache(setup, site.placement)
        pool = KVPool(device, cache, make_rows(site), dtype_of(setup), memory=holdings.memory)
        stream = device.compute_stream
    if setup.moves_kv:
        movers.append(make_handover(site, comm, pool, stream, ties))
    carrier = open_replica_carrier(site.channel, setup, device, comm, ties)
    source, layout_of = ReplicaSource(device, pool.memory, stream), partial(pool_layout, setup)
    assert site.shelf
    replicating = Replicating(site.channel, setup, site.shelf, source, holdings.is_new, layout_of, carrier)
    replicators, restored = replicating.start(ties)
    on_disk = keep_on_disk(
        setup, site.placement, source, layout_of(site.placement), site.channel.membership.epoch, ties
    )
    if on_disk and holdings.is_new and not restored.rows:
        restored = restore_from_disk(on_disk)
    if holdings.flushed is not None:
        for place, row in restored.rows.items():
            holdings.flushed.admit(FlushedRow(place, row.serial, row.length))
    return Movers([*movers, *replicators, *([on_disk] if on_disk else [])]), restored


def make_handover(site: Site, comm: Any, pool: KVPool, stream: Stream, ties: ExitStack) -> Mover:
    """Move prompts' KV between the pipelines, in or out of this rank's pool, behind the work of `stream`."""
    from dejavu.transport.registry import open_carrier

    setup, device = site.setup, site.device
    level = Level(setup.config.stream_level)
    carrier = ties.enter_context(open_carrier(setup.config.transport, device, comm, gathering=level.gathering))
    sides = [
        CacheSide(tuple(rank_cache(setup, p) for p in setup.topology.workers_of(pipeline)), {})
        for pipeline in setup.topology.pipelines
    ]
    kind = PromptMover if site.pipeline.role is Role.PROMPT else TokenMover
    return kind(site.channel, carrier, pool, Resharding(*sides), level, stream)


def make_worker(
    site: Site, holdings: Holdings, swap: SwappedMemory | None, mover: Mover, links: Links, clock: RunClock
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
        cut_at=site.setup.cut_at,
        looks_ahead=site.sees_all_draws,
    )
    unseen = UnseenTokens()
    place = pipeline.first_stage + stage_index, tp_rank
    flights = Flights(site.channel.rank, place, clock.now_s, links.check, site.recorder)
    flights.tell = partial(tell_progress, site, mover, clock)
    if swap:
        flights.stall_ms = swap.mover.take_stall_ms
    source: Source = Upstream(site.channel, mover, flights)
    if leads_first:
        source = Scheduled(site.channel, mover, flights, scheduler, clock.now_s)
    return Worker(
        site.channel,
        holdings.stage,
        swap.tensor if swap else holdings.pool,
        swap.mover.books if swap else GivenBlocks(),
        make_inlet(site, holdings.stage, links),
        source,
        make_sink(site, holdings.stage, links, scheduler, flights, unseen),
        mover,
        flights,
        make_timeline(site, clock),
        unseen,
        followers=[*peers, *next_rank],
        peers=peers,
    )


def tell_progress(site: Site, mover: Mover, clock: RunClock, compute_s: float) -> None:
    """Tell the controller what this rank did lately, and let its records outlive it."""
    moves = mover.take_transfers(site.channel.rank, clock.at_s)
    site.tell_busy(compute_s, moves)
    site.recorder.add_transfers(moves)
    site.recorder.flush()


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


def make_sink(
    site: Site, stage: Stage, links: Links, scheduler: Scheduler, flights: Flights, unseen: UnseenTokens
) -> Sink:
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
    return Sampling(
        site.setup.spec, logits, flights.now_s, make_news(site, scheduler, flights), unseen, stage.likeliest
    )


def make_news(site: Site, scheduler: Scheduler, flights: Flights) -> Callable[[Sampled], None]:
    """Tell new tokens to the first stage and to the controller; a GPU's next pass is queued first, if it is here."""
    channel, head = site.channel, site.pipeline.head
    if head != channel.rank:
        return lambda sampled: channel.send_to_all((head, CONTROLLER), sampled)

    def tell(sampled: Sampled) -> None:
        scheduler.sampled(sampled)
        if site.setup.on_cuda:
            flights.later.append(lambda: channel.send(CONTROLLER, sampled))
        else:
            channel.send(CONTROLLER, sampled)

    return tell


def make_logits(site: Site, links: Links) -> Logits:
    """Bring the last stage's parts of the logits together: by MPI, or between GPUs by a sum."""
    spec, workers = site.setup.spec, site.setup.topology.workers_of(site.pipeline)
    shards = [(p.rank, p.shard) for p in workers if p.stage == site.placement.stage and p.shard]
    if site.shard.tp_size == 1:
        return OneRank()
    if links.sums is not None:
        return LogitSum(spec.vocab_size, site.shard, links.sums)
    return MpiLogits(site.channel, spec.vocab_size, shards)
