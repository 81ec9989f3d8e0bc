"""What outlives a worker: its KV pool, its weights and its replica, held by the keeper of its host."""

import os
import socket
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from typing import TYPE_CHECKING, Any

from dejavu.cluster.launcher import JOB, SUPERVISOR
from dejavu.device.base import Buffer, Device, Location
from dejavu.device.keeper_line import Guardian
from dejavu.device.vault import Vault
from dejavu.engine.replication import DirectReplicator, PassFollower, ReplicaHolder, ReplicaSource, SendingReplicator
from dejavu.engine.ring import pool_name, replica_holder, replica_name, replica_owner, weights_name
from dejavu.engine.setup import EngineSetup
from dejavu.kv.layout import PoolLayout
from dejavu.kv.replica import ReplicaStore
from dejavu.model.weight_arena import WeightArena
from dejavu.topology import Placement
from dejavu.transport.carrier import Carrier
from dejavu.transport.mpi import Channel

if TYPE_CHECKING:
    from dejavu.model.weights import Allocate, Weights

KEPT_SHARE = 10  # a CPU worker keeps its plain weights where they take at most one in so many bytes of the host
RESTART_S = 120.0  # how long memory is kept on a host whose supervisor is elsewhere, when its ranks have gone


def choose_guardian(environment: Mapping[str, str], host: str, parent: int) -> Guardian:
    """Give the process whose end is the job's: the supervisor on its host; elsewhere the mpirun or its daemon.

    Where a supervisor on another host may start the job again, memory is kept for a while after the daemon's end.
    """
    process, _, place = environment.get(SUPERVISOR, "").partition("@")
    if JOB not in environment or not process:
        return Guardian(parent)
    return Guardian(int(process)) if place == host else Guardian(parent, RESTART_S)


def open_vault(setup: EngineSetup) -> Vault:
    """Join this host's keeper, or start it."""
    return Vault(setup.job, choose_guardian(os.environ, socket.gethostname(), os.getppid()))


def take_memory(
    vault: Vault, device: Device, name: str, nbytes: int, location: Location = Location.DEVICE
) -> tuple[Buffer, bool]:
    """Give memory that outlives this process, and whether it did: with the contents that a process left there.

    New memory is zeroed. The caller closes it; the keeper holds it on.
    """
    kept = vault.get(name, device)
    if kept is not None:
        memory, _ = kept
        if memory.nbytes == nbytes:
            return memory, True
        memory.close()
    on_device = location is Location.DEVICE
    memory = (device.allocate_exportable if on_device else device.allocate_host_exportable)(nbytes)
    if on_device and device.properties.kind != "cpu":  # a host's is zeros, page by page as it is used
        device.fill(memory, 0, stream=device.compute_stream)
    vault.put(name, memory)
    return memory, False


def take_store(vault: Vault, device: Device, name: str, layout: PoolLayout, rows: tuple[int, int]) -> ReplicaStore:
    """Give the replica of this name, with what it holds, or a new one. `rows` are microbatches, and rows of each."""
    kept = vault.get(name, device)
    if kept is not None:
        return ReplicaStore(kept[0], layout, *rows)
    store = ReplicaStore.allocate(device, layout, *rows)
    vault.put(name, store.memory)
    return store


def take_pool(
    vault: Vault, device: Device, placement: Placement, layout: PoolLayout, location: Location = Location.DEVICE
) -> tuple[Buffer, bool]:
    """Give the memory of a place's KV pool, and whether its KV is still there."""
    return take_memory(vault, device, pool_name(placement), layout.total_bytes, location)


def take_weights(
    vault: Vault, device: Device, placement: Placement, arena: WeightArena, load: "Callable[[Allocate], Weights]"
) -> "tuple[Weights, Buffer]":
    """Give a place's weights, in memory that outlives this process: what is there already, or what `load` reads.

    The caller closes the memory: on a CPU at once, where the tensors hold it, on a GPU when they are gone.
    """
    name = weights_name(placement)
    kept = vault.get(name, device)
    if kept is not None:
        return arena.views(kept[0]), kept[0]
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


def rows_of(setup: EngineSetup, placement: Placement) -> tuple[int, int]:
    """Give the microbatches of a rank's pipeline, and the rows of each."""
    shape = setup.topology.pipelines[placement.pipeline].shape
    return shape.num_microbatches, shape.microbatch_size


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


def make_replicators(
    channel: Channel,
    setup: EngineSetup,
    vault: Vault,
    source: ReplicaSource,
    layout_of: Callable[[Placement], PoolLayout],
    carrier: Carrier | None,
    stack: ExitStack,
) -> list[PassFollower]:
    """Replicate this rank's KV, and hold another rank's replica, beside the passes; `stack` gives all back.

    `layout_of` gives the layout of each place's pool.
    """
    place = setup.topology.placements[channel.rank]
    if place not in setup.replicated:
        return []
    every, owner = setup.config.replicate_every, replica_owner(setup.topology, channel.hosts, channel.rank)
    holder = replica_holder(setup.topology, channel.hosts, channel.rank)

    def open_store(holding: int, owning: int) -> ReplicaStore:
        owned = setup.topology.placements[owning]
        name = replica_name(setup.topology.placements[holding], owned)
        return stack.enter_context(take_store(vault, source.device, name, layout_of(owned), rows_of(setup, owned)))

    movers: list[PassFollower] = []
    if not crosses_hosts(channel, setup, channel.rank):
        store = open_store(holder, channel.rank)
        movers.append(DirectReplicator(channel, source, store, every, holder))
    else:
        assert carrier
        movers.append(SendingReplicator(carrier, source, layout_of(place), every, channel.rank - 1, holder - 1))
    if crosses_hosts(channel, setup, owner):
        assert carrier
        store = open_store(channel.rank, owner)
        movers.append(ReplicaHolder(channel, carrier, store, every, owner, carrier_offset=1))
    for mover in movers:
        stack.callback(mover.close)
    return movers
