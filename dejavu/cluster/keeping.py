"""What outlives a worker: its KV pool, its weights and its replica, held by the keeper of its host."""

import os
import socket
import time
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

from dejavu.cluster.launcher import JOB, SUPERVISOR
from dejavu.cluster.segments import segment_directory
from dejavu.config import PipelineShape
from dejavu.device.base import Buffer, Closing, Device, Location
from dejavu.device.keeper_line import Guardian
from dejavu.device.vault import Deposit, Vault
from dejavu.engine.replication import DirectReplicator, PassFollower, ReplicaHolder, ReplicaSource, SendingReplicator
from dejavu.engine.ring import flushed_name, pool_name, replica_holder, replica_name, replica_owner, weights_name
from dejavu.engine.setup import EngineSetup
from dejavu.kv.flushed import FlushedRows
from dejavu.kv.layout import PoolLayout
from dejavu.kv.replica import HeldRow, Place, ReplicaStore, StoreShape, block_message, filled_blocks
from dejavu.model.weight_arena import WeightArena
from dejavu.topology import Placement
from dejavu.transport.carrier import Carrier, Transfer
from dejavu.transport.mpi import Channel

if TYPE_CHECKING:
    from dejavu.model.weights import Allocate, Weights

KEPT_SHARE = 10  # a CPU worker keeps its plain weights where they take at most one in so many bytes of the host
RESTORE_KEY = 1  # of the one message that gives a pool its KV back
RESTART_S = 120.0  # how long memory is kept on a host whose supervisor is elsewhere, when its ranks have gone


def choose_guardian(environment: Mapping[str, str], host: str, parent: int, *, may_restart: bool) -> Guardian:
    """Give the process whose end is the job's: the supervisor on its host; elsewhere the mpirun or its daemon.

    Where a supervisor on another host may start the job again, memory is kept for a while after the daemon's end.
    """
    process, _, place = environment.get(SUPERVISOR, "").partition("@")
    files = str(segment_directory(environment) or "")
    if JOB not in environment or not process:
        return Guardian(parent, files=files)
    if place == host:
        return Guardian(int(process), files=files)
    return Guardian(parent, RESTART_S if may_restart else 0.0, files)


def open_vault(setup: EngineSetup) -> Vault:
    """Join this host's keeper, or start it."""
    may_restart = setup.config.on_failure != "abort"
    return Vault(setup.job, choose_guardian(os.environ, socket.gethostname(), os.getppid(), may_restart=may_restart))


def take_memory(
    vault: Vault, device: Device, name: str, nbytes: int, location: Location = Location.DEVICE
) -> tuple[Buffer, bool]:
    """Give memory that outlives this process, and whether it did: with the contents that a process left there.

    New memory is zeroed. The caller closes it; the keeper holds it on.
    """
    memory = find_kept(vault, device, name)
    if memory is not None:
        if memory.nbytes == nbytes:
            return memory, True
        memory.close()
    on_device = location is Location.DEVICE
    memory = (device.allocate_exportable if on_device else device.allocate_host_exportable)(nbytes)
    if on_device and device.properties.kind != "cpu":  # a host's is zeros, page by page as it is used
        device.fill(memory, 0, stream=device.compute_stream)
    vault.put(name, memory)
    return memory, False


def find_kept(vault: Vault, device: Device, name: str) -> Buffer | None:
    """Map what is kept under a name, if anything; what lies on another GPU is moved to this one."""
    kept = vault.get(name, device)
    if kept is None or not lies_elsewhere(kept[1], device):
        return kept[0] if kept else None
    memory = copy_here(device, kept[0])
    vault.put(name, memory)
    return memory


def lies_elsewhere(about: Mapping[str, Any], device: Device) -> bool:
    """Tell whether kept memory is another GPU's; what the keeper has `about` it says."""
    return bool(about["location"] == Location.DEVICE and about["index"] != device.properties.index)


def copy_here(device: Device, far: Buffer) -> Buffer:
    """Copy memory of another GPU to this one, and let go of the mapping of the former."""
    with far:
        memory = device.allocate_exportable(far.nbytes)
        device.copy(memory, far, stream=device.compute_stream)
        device.synchronize()
    return memory


class StoreShelf(Closing):
    """Hold the replicas that a process has mapped, through all changes of its rank: a GPU takes half a second a GiB."""

    def __init__(self, vault: Vault, device: Device) -> None:
        self.vault = vault
        self.device = device
        self.stores: dict[str, tuple[str, ReplicaStore]] = {}  # with the keeper's mark

    def take(self, name: str, layout: PoolLayout, shape: StoreShape) -> ReplicaStore:
        """Give the replica of this name, with what it holds, or a new one; the shelf closes it."""
        self.prepare(name, layout, shape)
        if name not in self.stores:
            store = ReplicaStore.allocate(self.device, layout, shape)
            self.stores[name] = self.vault.put(name, store.memory), store
        return self.stores[name][1]

    def prepare(self, name: str, layout: PoolLayout, shape: StoreShape) -> None:
        """Map the replica of this name, if there is one; let go of one that the keeper has no more."""
        if not self.has(name, self.vault.contents()):
            self.drop(name)
            if found := self.vault.get(name, self.device):
                memory, about = found
                self.stores[name] = about["mark"], ReplicaStore(memory, layout, shape)

    def has(self, name: str, kept: Mapping[str, Deposit]) -> bool:
        """Tell whether what is mapped is what the keeper has."""
        return name in self.stores and name in kept and self.stores[name][0] == kept[name].about["mark"]

    def drop(self, name: str) -> None:
        """Let go of a replica."""
        if name in self.stores:
            self.stores.pop(name)[1].close()

    def drop_stale(self) -> None:
        """Let go of those that the keeper no longer has; the others cost nothing, and a step waits while one goes."""
        kept = self.vault.contents()
        for name in [name for name in self.stores if not self.has(name, kept)]:
            self.drop(name)

    def close(self) -> None:
        """Let go of all."""
        for name in list(self.stores):
            self.drop(name)


def take_pool(
    vault: Vault, device: Device, placement: Placement, layout: PoolLayout, location: Location = Location.DEVICE
) -> tuple[Buffer, bool]:
    """Give the memory of a place's KV pool, on the host that of all that is swapped, and whether its KV is there."""
    name = pool_name(placement, swapped=location is Location.HOST)
    return take_memory(vault, device, name, layout.total_bytes, location)


def take_flushed(vault: Vault, device: Device, placement: Placement, shape: PipelineShape) -> FlushedRows:
    """Give what says how much of each request a place's host memory has, or a new one."""
    kept = vault.get(flushed_name(placement), device)
    if kept is not None:
        return FlushedRows(kept[0], shape.num_microbatches, shape.microbatch_size)
    rows = FlushedRows.allocate(device, shape.num_microbatches, shape.microbatch_size)
    vault.put(flushed_name(placement), rows.memory)
    return rows


def take_weights(
    vault: Vault, device: Device, placement: Placement, arena: WeightArena, load: "Callable[[Allocate], Weights]"
) -> "tuple[Weights, Buffer]":
    """Give a place's weights, in memory that outlives this process: what is there already, or what `load` reads.

    The caller closes the memory: on a CPU at once, where the tensors hold it, on a GPU when they are gone.
    """
    name = weights_name(placement)
    kept = find_kept(vault, device, name)
    if kept is not None:
        return arena.views(kept), kept
    memory = device.allocate_exportable(arena.nbytes)
    weights = load(lambda parameter: arena.view(memory, parameter))
    device.synchronize()
    vault.put(name, memory)
    return weights, memory


def outlives_worker(device: Device, arena: WeightArena) -> bool:
    """Tell whether a place's weights are kept: on a GPU all are, and used where they lie.

    A CPU computes with packed copies, so what is kept is held twice: it has to be small beside the host's memory.
    """
    return device.properties.kind != "cpu" or arena.nbytes * KEPT_SHARE <= device.properties.total_bytes


def store_shape(setup: EngineSetup, placement: Placement) -> StoreShape:
    """Give the rows of a place's pipeline."""
    shape, cache = setup.topology.pipelines[placement.pipeline].shape, setup.caches[placement.pipeline]
    return StoreShape(shape.num_microbatches, shape.microbatch_size, cache.blocks_per_row)


def describe_store(
    setup: EngineSetup, holder: int, owner: int, layout_of: Callable[[Placement], PoolLayout]
) -> tuple[str, PoolLayout, StoreShape]:
    """Give the name of the replica that one rank holds of another, the layout of its owner's pool, and its rows."""
    place, owned = setup.topology.placements[holder], setup.topology.placements[owner]
    return replica_name(place, owned), layout_of(owned), store_shape(setup, owned)


def crosses_hosts(channel: Channel, setup: EngineSetup, owner: int) -> bool:
    """Tell whether a rank's replica travels over a carrier: to another host, or as if it were one."""
    holder = replica_holder(setup.topology, channel.hosts, owner)
    return setup.config.replica_transport != "auto" or channel.hosts[owner] != channel.hosts[holder]


def needs_replica_carrier(channel: Channel, setup: EngineSetup) -> bool:
    """Tell whether any replica travels over a carrier; the same on every rank."""
    return any(crosses_hosts(channel, setup, placement.rank) for placement in setup.replicated)


def open_replica_carrier(
    channel: Channel, setup: EngineSetup, device: Device, comm: Any, stack: ExitStack
) -> Carrier | None:
    """Open what carries replicas between hosts, if anything does; all workers call this, whose communicator is `comm`.

    Its ranks are one less than the world's.
    """
    if not needs_replica_carrier(channel, setup):
        return None
    from dejavu.transport.registry import open_carrier

    name = setup.config.replica_transport
    return stack.enter_context(open_carrier("tcp" if name == "auto" else name, device, comm))


@dataclass(frozen=True, slots=True)
class RestoredPool:
    """Say what a new pool got back from its replica: the rows that it has tokens of, the bytes, and the time.

    With `has_new_store` the replica of the pool was lost, or there was none yet.
    """

    rows: dict[Place, HeldRow] = field(default_factory=dict)
    nbytes: int = 0
    seconds: float = 0.0
    has_new_store: bool = False

    @property
    def tokens(self) -> dict[int, int]:
        """Give how many tokens of each request came back, by its serial."""
        return {row.serial: row.length for row in self.rows.values()}


@dataclass(frozen=True, slots=True)
class Replicating:
    """Join what a rank needs to replicate its KV, and to hold another rank's; `layout_of` describes a place's pool.

    `source` is empty where `is_new`, and `carrier` there where `needs_replica_carrier`.
    """

    channel: Channel
    setup: EngineSetup
    shelf: StoreShelf
    source: ReplicaSource
    is_new: bool
    layout_of: Callable[[Placement], PoolLayout]
    carrier: Carrier | None

    def start(self, stack: ExitStack) -> tuple[list[PassFollower], RestoredPool]:
        """Give a new pool back what its replica has, and what replicates from now on, which `stack` ends.

        All ranks that have a replica call this together. What a store holds of requests that go on is not copied again.
        Of swapped KV everything is flushed to this host's memory, which the keeper has too: another copy of it there
        would be lost with it.
        """
        rank, hosts, topology = self.channel.rank, self.channel.hosts, self.setup.topology
        place = topology.placements[rank]
        if place not in self.setup.replicated:
            return [], RestoredPool()
        owner, holder = replica_owner(topology, hosts, rank), replica_holder(topology, hosts, rank)
        movers: list[PassFollower] = []
        given: Transfer | None = None
        crosses = crosses_hosts(self.channel, self.setup, rank)
        if crosses:
            self.channel.send(holder, self.is_new)
        if crosses_hosts(self.channel, self.setup, owner):
            held, given = self.hold(owner)
            movers.append(held)
        restored = RestoredPool()
        if crosses or not self.setup.caches[place.pipeline].is_swapped:
            mover, restored = self.send(place, holder) if crosses else self.copy(place, holder)
            movers.append(mover)
        if given:
            given.wait(self.channel.deadline_s)
        for each in movers:
            stack.callback(each.close)
        return movers, restored

    def hold(self, owner: int) -> tuple[PassFollower, Transfer | None]:
        """Hold the replica of a rank of another host, and begin to give it back what it has lost."""
        assert self.carrier
        given = None
        store = self.open_store(self.channel.rank, owner)
        _, has_lost = self.channel.receive(owner, self.channel.deadline_s)
        rows = store.rows()
        self.channel.send(owner, rows)
        if has_lost and rows:
            message = block_message(store.layout, filled_blocks(store.layout, rows.values()))
            stream = self.source.device.compute_stream
            given = self.carrier.send(owner - 1, RESTORE_KEY, store.pool, message, stream=stream)
        mover = ReplicaHolder(self.channel, self.carrier, store, self.every, owner, carrier_offset=1)
        mover.books.adopt(rows)
        return mover, given

    def send(self, place: Placement, holder: int) -> tuple[PassFollower, RestoredPool]:
        """Replicate to another host, and get back from there what is lost."""
        assert self.carrier
        started = time.monotonic()
        layout, restored = self.layout_of(place), RestoredPool()
        _, rows = self.channel.receive(holder, self.channel.deadline_s)
        if self.is_new and rows:
            message = block_message(layout, filled_blocks(layout, rows.values()))
            pool, stream = self.source.pool, self.source.stream
            self.carrier.receive(holder - 1, RESTORE_KEY, pool, message, stream=stream).wait(self.channel.deadline_s)
            restored = RestoredPool(rows, message.total_bytes, time.monotonic() - started)
        restored = replace(restored, has_new_store=not rows)
        mover = SendingReplicator(self.channel, self.carrier, self.source, layout, self.every, holder, carrier_offset=1)
        mover.books.adopt(rows)
        return mover, restored

    def copy(self, place: Placement, holder: int) -> tuple[PassFollower, RestoredPool]:
        """Replicate on this host, and get back from the replica there what is lost."""
        started = time.monotonic()
        has_new_store = replica_name(self.setup.topology.placements[holder], place) not in self.shelf.vault.contents()
        store, restored = self.open_store(holder, place.rank), RestoredPool()
        rows = store.rows()
        if self.is_new and rows:
            blocks = filled_blocks(store.layout, rows.values())
            nbytes = store.restore(self.source.device, self.source.pool, blocks, stream=self.source.stream)
            self.source.stream.synchronize()
            restored = RestoredPool(rows, nbytes, time.monotonic() - started)
        restored = replace(restored, has_new_store=has_new_store)
        mover = DirectReplicator(self.channel, self.source, store, self.every, holder)
        mover.books.adopt(rows)
        return mover, restored

    def open_store(self, holder: int, owner: int) -> ReplicaStore:
        """Open the replica that one rank holds of another, or make it."""
        return self.shelf.take(*describe_store(self.setup, holder, owner, self.layout_of))

    @property
    def every(self) -> int:
        """Count the steps between two copies."""
        return self.setup.config.replicate_every
