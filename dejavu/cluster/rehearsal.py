"""Prepare, while a spare waits, what the worker of any place holds: so that taking over is to join the others."""

import time
from collections.abc import Mapping
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from functools import partial

from torch import Tensor

from dejavu.cluster.accelerator import most_tokens, reserve_bytes
from dejavu.cluster.engine import build_stage, hold_swapped, make_all_reduce
from dejavu.cluster.keeping import StoreShelf, copy_here, crosses_hosts, describe_store, lies_elsewhere
from dejavu.cluster.links import Links
from dejavu.cluster.site import Holdings, Site, dtype_of, make_empty_pool, pool_layout, rank_cache
from dejavu.device.base import Buffer, Device
from dejavu.device.host_memory import available_bytes
from dejavu.device.vault import Deposit, Vault
from dejavu.engine.ring import pool_name, replica_holder, weights_name
from dejavu.engine.setup import EngineSetup
from dejavu.engine.worker import Stage
from dejavu.measure.cpu import CpuMeter
from dejavu.model.weight_arena import WeightArena
from dejavu.topology import Placement, Role
from dejavu.transport.mpi import Channel

ROOM = 4  # a CPU spare prepares a place where its weights take at most one in so many bytes that are free

Contents = Mapping[str, Deposit]


class GoneError(Exception):
    """Say that the keeper has let go of what it had a moment before."""


@dataclass(slots=True)
class Rehearsed:
    """Hold a stage that can compute, and its pool; `ties` gives back the memory of both.

    It maps what the keeper has of the place, whose marks are `marks`; or, with its own copy of `weights`, nothing.
    """

    stage: Stage
    pool: Tensor
    memory: Buffer | None  # of the pool; None where the pool is made anew with each change
    weights: Buffer | None
    marks: tuple[str, ...]
    ties: ExitStack

    @property
    def is_own(self) -> bool:
        """Tell whether it needs nothing of what the keeper has."""
        return self.weights is not None


class Rehearsal:
    """Be ready to take any place whose memory this host's keeper has, or that a copy of fits on this process's GPU."""

    def __init__(self, channel: Channel, setup: EngineSetup, device: Device, vault: Vault, shelf: StoreShelf) -> None:
        self.shelf = shelf
        self.channel = channel
        self.setup = setup
        self.device = device
        self.vault = vault
        self.places: dict[int, Rehearsed] = {}  # by rank

    def prepare(self) -> float:
        """Prepare each place that is not ready as its memory is now; give the seconds that it took."""
        started, kept = time.monotonic(), self.vault.contents()
        for placement in self.setup.topology.workers:
            if self.is_ready(placement, kept):
                continue
            self.discard(placement.rank)
            site = Site(self.channel, self.setup, placement, self.device, self.vault)
            if self.can_prepare(site, kept):
                with suppress(GoneError):  # with a device that was lost meanwhile: all prepare again then
                    self.places[placement.rank] = self.rehearse(site, kept)
        self.map_replicas()
        self.device.synchronize()
        return time.monotonic() - started

    def map_replicas(self) -> None:
        """Map the replicas on this host of all places: to restore from, and to write to."""
        for placement in self.setup.replicated:
            if not crosses_hosts(self.channel, self.setup, placement.rank):
                holder = replica_holder(self.setup.topology, self.channel.hosts, placement.rank)
                layout_of = partial(pool_layout, self.setup)
                self.shelf.prepare(*describe_store(self.setup, holder, placement.rank, layout_of))

    def is_ready(self, placement: Placement, kept: Contents) -> bool:
        """Tell whether a place is prepared, and all that it maps is what the keeper still has."""
        rehearsed = self.places.get(placement.rank)
        if rehearsed is None:
            return False
        return rehearsed.is_own or rehearsed.marks == self.marks(placement, kept)

    def marks(self, placement: Placement, kept: Contents) -> tuple[str, ...]:
        """Give the marks of the memory that a place has at the keeper."""
        names = weights_name(placement), *(() if self.is_swapped(placement) else (pool_name(placement),))
        return tuple(kept[name].about["mark"] for name in names if name in kept)

    def is_swapped(self, placement: Placement) -> bool:
        """Tell whether a place's pool is made anew with each change."""
        return self.setup.caches[placement.pipeline].is_swapped

    def can_prepare(self, site: Site, kept: Contents) -> bool:
        """Tell whether a place's memory is there and leaves room; tensor ranks on GPUs sum over links of their own."""
        weights, placement = kept.get(weights_name(site.placement)), site.placement
        if weights is None or (self.setup.on_cuda and site.shard.tp_size > 1):
            return False
        if len(self.marks(placement, kept)) < (1 if site.cache.is_swapped else 2):
            return False
        if not self.setup.on_cuda:
            return weights.nbytes * ROOM <= available_bytes()
        need = 2 * reserve_bytes(self.setup, placement, site.shard)
        if lies_elsewhere(weights.about, self.device):
            need += weights.nbytes + rank_cache(self.setup, placement).layout.total_bytes
        return need <= self.device.free_bytes()

    def rehearse(self, site: Site, kept: Contents) -> Rehearsed:
        """Prepare one place."""
        placement, name = site.placement, weights_name(site.placement)
        with ExitStack() as ties:
            is_far = lies_elsewhere(kept[name].about, self.device)
            weights = self.map_kept(name)
            if is_far:
                weights = copy_here(self.device, weights)
            arena = WeightArena(self.setup.spec, site.shard, dtype_of(self.setup))
            if self.setup.on_cuda:
                ties.enter_context(weights)
            stage = build_stage(site, arena.views(weights), make_all_reduce(site, Links()))
            if not self.setup.on_cuda:
                weights.close()  # tensors that are used where they lie hold it
            pool, memory = self.find_pool(site, is_far, ties)
            prepare_passes(site, stage, pool)
            marks = self.marks(placement, kept)
            return Rehearsed(stage, pool, memory, weights if is_far else None, marks, ties.pop_all())
        raise AssertionError("an exit stack hides no error")

    def map_kept(self, name: str) -> Buffer:
        """Map what the keeper has; raise GoneError where it has it no more."""
        found = self.vault.get(name, self.device)
        if not found:
            raise GoneError(name)
        return found[0]

    def find_pool(self, site: Site, is_far: bool, ties: ExitStack) -> tuple[Tensor, Buffer | None]:
        """Map a place's pool, or make one on this device."""
        if site.cache.is_swapped:
            return make_empty_pool(site), None
        layout = rank_cache(self.setup, site.placement).layout
        if is_far:
            memory = ties.enter_context(self.device.allocate_exportable(layout.total_bytes))
            self.device.fill(memory, 0, stream=self.device.compute_stream)
        else:
            memory = ties.enter_context(self.map_kept(pool_name(site.placement)))
        return memory.view(0, layout.total_bytes).tensor(dtype_of(self.setup), layout.shape), memory

    def take(self, placement: Placement, stack: ExitStack) -> Holdings | None:
        """Give what was prepared for a place, which `stack` gives back; None where it is not, or not any more."""
        if not self.is_ready(placement, self.vault.contents()):
            return None
        rehearsed = self.places.pop(placement.rank)
        has_kv = self.move_here(placement, rehearsed) if rehearsed.is_own else True
        stack.enter_context(rehearsed.ties)
        if self.is_swapped(placement):
            site = Site(self.channel, self.setup, placement, self.device, self.vault)
            return hold_swapped(site, rehearsed.stage, stack)
        memory = rehearsed.memory
        kept_bytes = memory.nbytes if memory and has_kv else 0
        return Holdings(rehearsed.stage, rehearsed.pool, memory, CpuMeter(), has_kv, kept_bytes)

    def move_here(self, placement: Placement, rehearsed: Rehearsed) -> bool:
        """Let the keeper have what this process made in place of what lies elsewhere; tell whether the KV is here."""
        assert rehearsed.weights
        self.vault.put(weights_name(placement), rehearsed.weights)
        if rehearsed.memory is None:
            return False
        found = self.vault.get(pool_name(placement), self.device)
        if found:
            with found[0] as kept:
                self.device.copy(rehearsed.memory, kept, stream=self.device.compute_stream)
                self.device.synchronize()
        self.vault.put(pool_name(placement), rehearsed.memory)
        return found is not None

    def discard(self, rank: int) -> None:
        """Give back what was prepared for a place, if anything."""
        if rehearsed := self.places.pop(rank, None):
            ties = rehearsed.ties
            del rehearsed  # graphs and tensors go before their memory does
            ties.close()

    def close(self) -> None:
        """Give back all."""
        for rank in list(self.places):
            self.discard(rank)


def prepare_passes(site: Site, stage: Stage, pool: Tensor) -> None:
    """Prepare token steps of every number of rows, so that no request waits for it; tensor ranks do so together.

    Prompts too, unless requests wait for this rank to take another's place: their KV is there. An empty pool stands for
    one that is made with each change; steps are captured for the pool that they use, so they are then, too.
    """
    if pool.numel() == 0:
        return
    role, num_rows = site.pipeline.role, site.pipeline.shape.microbatch_size
    has_prompts = role is not Role.TOKEN and site.channel.membership.epoch == 0
    row_counts = range(1, num_rows + 1) if role is not Role.PROMPT else ()
    stage.warm_up(pool, row_counts, most_tokens(site.setup, site.placement) if has_prompts else 0)
