"""Be one process of a run, whatever rank it comes to play: what it holds stays, what leads to others is made anew."""

import os
import time
from collections.abc import Iterator
from contextlib import ExitStack, closing, contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from dejavu.cluster.accelerator import claim_memory, enter_device
from dejavu.cluster.company import join_clock, workers_comm
from dejavu.cluster.engine import (
    hold_swapped,
    make_all_reduce,
    make_mover,
    make_stage,
    make_swap,
    make_worker,
    open_links,
)
from dejavu.cluster.injection import IncidentLog, Injector, Tripwire, faults_for, from_environment
from dejavu.cluster.keeping import StoreShelf, open_vault, take_pool
from dejavu.cluster.launcher import RUN_DIR
from dejavu.cluster.links import Links
from dejavu.cluster.rehearsal import Rehearsal, prepare_passes
from dejavu.cluster.site import Holdings, Site, dtype_of, make_empty_pool, rank_cache
from dejavu.cluster.stores import remove_store
from dejavu.device.base import Device
from dejavu.device.vault import Vault
from dejavu.engine.ceilings import measure_ceilings
from dejavu.engine.messages import Ready, RecordChunk, Report
from dejavu.engine.ring import memory_prefixes
from dejavu.engine.setup import EngineSetup
from dejavu.engine.worker import Worker
from dejavu.errors import CapacityError, PeerLostError, TransferError
from dejavu.measure.clock import RunClock
from dejavu.measure.cpu import CpuMeter
from dejavu.measure.recorder import MemoryRecorder, Recorder
from dejavu.topology import CONTROLLER, Placement
from dejavu.transport.mpi import Channel
from dejavu.transport.nccl_group import missing


def hold(site: Site, links: Links, stack: ExitStack) -> Holdings:
    """Load this rank's part of the model, and take its KV memory when every GPU has room; `stack` gives it back."""
    stage, weight_bytes = make_stage(site, make_all_reduce(site, links), stack)
    if site.channel.membership.epoch == 0:
        claim_memory(site.channel, site.setup, site.placement, site.device, weight_bytes)
    if not site.vault:
        return Holdings(stage, make_empty_pool(site), None, CpuMeter())
    if site.cache.is_swapped:
        return hold_swapped(site, stage, stack)
    layout = rank_cache(site.setup, site.placement).layout
    memory, has_kv = take_pool(site.vault, site.device, site.placement, layout)
    pool = stack.enter_context(memory).view(0, layout.total_bytes).tensor(dtype_of(site.setup), layout.shape)
    return Holdings(stage, pool, memory, CpuMeter(), has_kv, memory.nbytes if has_kv else 0)


def run_worker(channel: Channel, setup: EngineSetup, recorder: Recorder | None = None) -> None:
    """Take this rank's place in its pipeline until the run ends; its records go into its report, or a `recorder`."""
    with ExitStack() as stack:
        Participant(channel, setup, stack, recorder).take_part()


class Participant:
    """Be one process through all changes of its rank: what it holds stays, and all that leads to others is made anew.

    `stack` gives back at the end what is held: the device, weights, and KV memory.
    """

    def __init__(
        self, channel: Channel, setup: EngineSetup, stack: ExitStack, recorder: Recorder | None = None
    ) -> None:
        """Note passes and transfers with the `recorder`, which is closed by `stack`; without one, in memory."""
        self.channel = channel
        self.recorder = stack.enter_context(closing(recorder or MemoryRecorder()))
        self.setup = setup
        self.stack = stack
        self.device: Device | None = None
        self.vault: Vault | None = None
        self.holdings: Holdings | None = None
        self.rehearsal: Rehearsal | None = None  # of a spare
        self.shelf: StoreShelf | None = None

    def take_part(self) -> None:
        """Do this rank's work until the run ends; a spare only joins in what all ranks do together."""
        placement = self.setup.topology.placements[self.channel.rank]
        comm = workers_comm(self.channel, self.setup)
        if placement.shard is not None:
            self.work(placement, comm)

    def work(self, placement: Placement, comm: Any) -> None:
        """Be a worker until the run ends."""
        started, channel = time.monotonic(), self.channel
        self.set_threads()
        with ExitStack() as ties, named_memory_errors(channel), suspecting(self.setup):
            device = self.enter_device()
            recorder = self.recorder
            site = Site(channel, self.setup, placement, device, self.join_keeper(), self.open_shelf(), recorder)
            links = open_links(site, ties)
            holdings = self.holdings = self.hold(site, links)
            swap = make_swap(site, holdings, ties) if site.cache.is_swapped else None
            if swap and holdings.flushed is None:  # simulated: it is lost with each change
                holdings.has_kv, holdings.untold = False, None
            mover, restored = make_mover(site, comm, holdings, swap, ties)
            restored = holdings.tell(restored)
            prepare_passes(site, holdings.stage, swap.tensor if swap else holdings.pool)
            tokens = holdings.flushed.lengths() if holdings.flushed is not None else restored.tokens
            found = tuple(links.describe()), holdings.has_kv, tokens, restored.nbytes, restored.seconds
            kept_bytes, has_new_replica = holdings.kept_bytes, restored.has_new_store
            channel.send(CONTROLLER, Ready(time.monotonic() - started, *found, kept_bytes, has_new_replica))
            self.end_rehearsal()
            holdings.kept_bytes = 0
            clock = join_clock(channel)
            worker = make_worker(site, holdings, swap, mover, links, clock)
            ties.callback(lambda: recorder.add_transfers(mover.take_transfers(channel.rank, clock.at_s)))
            self.lay_tripwire(worker, clock)
            worker.run()
            report = Report(recorder.steps, holdings.meter.read(), worker.flights.host_us_per_step)
            recorder.add_transfers(mover.report(report, channel.rank, clock.at_s).transfers)
            ceilings = measure_ceilings(device, recorder.sizes, channel.rank)
            self.hand_in()
            if site.vault:  # the run is over: the job's next engine must not take this one's memory for its own
                for prefix in memory_prefixes(placement):
                    site.vault.drop(prefix)
                remove_store(self.setup, placement)
            channel.send(CONTROLLER, replace(report, transfers=recorder.transfers, ceilings=ceilings))

    def hand_in(self) -> None:
        """Bring all records to where they stay; those that only this host sees go to the controller."""
        self.recorder.flush()
        for chunk in self.recorder.chunks():
            self.channel.send(CONTROLLER, RecordChunk(*chunk))

    def set_threads(self) -> None:
        """Take this process's share of the host's cores."""
        torch.set_num_threads(self.setup.config.threads or threads_per_worker(self.channel, self.setup))

    def rehearse(self) -> float:
        """Prepare what any worker holds, as a spare; give the seconds that it took."""
        device, vault = self.enter_device(), self.join_keeper()
        if not vault:
            return 0.0
        self.set_threads()
        missing(device)  # imports NCCL, which neighbours ask for when they meet
        shelf = self.open_shelf()
        assert shelf
        self.rehearsal = self.rehearsal or Rehearsal(self.channel, self.setup, device, vault, shelf)
        return self.rehearsal.prepare()

    def end_rehearsal(self) -> None:
        """Give back what was prepared for other places than the one taken, and replicas that are no more."""
        if self.rehearsal:
            self.rehearsal.close()
            self.rehearsal = None
        if self.shelf:
            self.shelf.drop_stale()

    def enter_device(self) -> Device:
        """Give the device that this process computes on, whatever its rank."""
        self.device = self.device or enter_device(self.channel, self.setup, self.stack)
        return self.device

    def open_shelf(self) -> StoreShelf | None:
        """Give what holds this process's replicas; synthetic stages have none."""
        vault = self.join_keeper()
        if not self.shelf and vault:
            self.shelf = self.stack.enter_context(StoreShelf(vault, self.enter_device()))
        return self.shelf

    def join_keeper(self) -> Vault | None:
        """Give what leads to this host's keeper; synthetic stages have no memory to keep."""
        if not self.vault and not self.setup.config.synthetic:
            self.vault = open_vault(self.setup)
            self.stack.push(self.leave_keeper)
        return self.vault

    def leave_keeper(self, kind: type[BaseException] | None, error: BaseException | None, at: object) -> None:
        """Leave, unless the run is lost and is started again: the keeper ends with the last who leaves."""
        assert self.vault
        if not (isinstance(error, PeerLostError) and self.setup.config.on_failure != "abort"):
            self.vault.close()

    def lay_tripwire(self, worker: Worker, clock: RunClock) -> None:
        """Let this worker fail where it was asked to."""
        topology = self.setup.topology
        mine = faults_for(from_environment(os.environ), self.channel.rank, topology)
        if mine:
            drop = self.vault.drop if self.vault else lambda prefix: None
            injector = Injector(mine, IncidentLog(Path(os.environ[RUN_DIR])), drop, topology)
            worker.source = Tripwire(worker.source, injector, self.channel.process, clock.now_s)

    def hold(self, site: Site, links: Links) -> Holdings:
        """Give what this worker holds; a stage whose graphs sum over links that are no more is loaded again."""
        if self.holdings is None:
            rehearsed = self.rehearsal.take(site.placement, self.stack) if self.rehearsal else None
            return rehearsed or hold(site, links, self.stack)
        if links.sums is not None:
            self.holdings.stage, _ = make_stage(site, make_all_reduce(site, links), self.stack)
        return self.holdings


@contextmanager
def suspecting(setup: EngineSetup) -> Iterator[None]:
    """Take a transfer that failed for the loss of a rank, where such a loss can be made good."""
    try:
        yield
    except TransferError as error:
        if not setup.is_recoverable:
            raise
        raise PeerLostError(str(error)) from error


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


def threads_per_worker(channel: Channel, setup: EngineSetup) -> int:
    """Share this host's cores between the workers on it."""
    workers_here = len((channel.near | {channel.rank}) & {placement.rank for placement in setup.topology.workers})
    return max(1, len(os.sched_getaffinity(0)) // workers_here)
