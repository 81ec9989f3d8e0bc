"""Which GPU a worker computes on, and whether everything fits there: agreed on before a request is taken."""

from collections.abc import Sequence
from contextlib import ExitStack

import torch

from dejavu.cluster.process import sleep_precisely
from dejavu.device import Device, num_cuda_devices, open_device
from dejavu.engine.setup import EngineSetup
from dejavu.engine.sizing import (
    GRAPH_BYTES,
    Room,
    activation_bytes,
    check_rooms,
    describe_rooms,
    kv_bytes_per_token,
    pass_tokens,
)
from dejavu.model.spec import Shard
from dejavu.topology import CONTROLLER, Placement
from dejavu.transport.mpi import Channel


def accelerator_index(channel: Channel) -> int:
    """Give this process's GPU, which stays the same whatever rank the process comes to play."""
    return accelerator_indices(channel.process_hosts, num_cuda_devices())[channel.process]


def accelerator_indices(hosts: Sequence[str], num_devices: int) -> list[int]:
    """Give each process's GPU: its number among those of its host that may work, modulo the number of GPUs there."""
    return [hosts[CONTROLLER + 1 : process].count(host) % max(1, num_devices) for process, host in enumerate(hosts)]


def enter_device(channel: Channel, setup: EngineSetup, stack: ExitStack) -> Device:
    """Open the device that this worker computes on; on a GPU also make a stream of its own torch's current one."""
    if not setup.on_cuda:
        return stack.enter_context(open_device("cpu"))
    sleep_precisely()
    index = accelerator_index(channel)
    device = stack.enter_context(open_device("cuda", index))
    torch.cuda.set_device(index)
    stack.enter_context(torch.cuda.stream(torch.cuda.Stream(index)))  # type: ignore[no-untyped-call]
    return device


def claim_memory(channel: Channel, setup: EngineSetup, placement: Placement, device: Device, weight_bytes: int) -> None:
    """Tell the controller what this worker's GPU has left, and wait until it has found that all rows fit.

    The free bytes are read when every worker has loaded, since several may share a GPU.
    """
    if not setup.on_cuda:
        return
    torch.cuda.synchronize()
    torch.cuda.empty_cache()
    channel.send(CONTROLLER, None)
    channel.receive(CONTROLLER)
    found, shard, cache = device.properties, placement.shard, setup.caches[placement.pipeline]
    assert shard is not None
    room = Room(
        gpu=f"{channel.hosts[channel.rank]} GPU {found.index} ({found.bus_id})",
        name=found.name,
        total_bytes=found.total_bytes,
        free_bytes=device.free_bytes(),
        weight_bytes=weight_bytes,
        reserve_bytes=reserve_bytes(setup, placement, shard),
        pool_bytes=cache.pool_blocks * cache.block_size * kv_bytes_per_token(setup.spec, shard, setup.dtype),
    )
    channel.send(CONTROLLER, room)
    channel.receive(CONTROLLER)


def reserve_bytes(setup: EngineSetup, placement: Placement, shard: Shard) -> int:
    """Count what the largest pass of a worker needs beside weights and KV."""
    num_rows = setup.topology.pipelines[placement.pipeline].shape.microbatch_size
    return GRAPH_BYTES + activation_bytes(setup.spec, shard, most_tokens(setup, placement), num_rows, setup.dtype)


def most_tokens(setup: EngineSetup, placement: Placement) -> int:
    """Count the tokens of a worker's largest pass."""
    num_rows = setup.topology.pipelines[placement.pipeline].shape.microbatch_size
    return pass_tokens(setup.config, setup.caches[placement.pipeline].row_len, num_rows, setup.cut_at)


def share_memory(channel: Channel, setup: EngineSetup, workers: Sequence[int], deadline_s: float) -> list[str]:
    """Be the controller's side of `claim_memory`; raise CapacityError saying how many rows would fit.

    Gives a line for each worker that says how its GPU's memory is shared out.
    """
    if not setup.on_cuda:
        return []
    for rank in workers:
        channel.receive(rank, deadline_s)
    for rank in workers:
        channel.send(rank, None)
    rooms = {rank: channel.receive(rank, channel.deadline_s)[1] for rank in workers}
    pipelines = {placement.rank: placement.pipeline for placement in setup.topology.workers}
    check_rooms(rooms, {rank: setup.caches[pipelines[rank]] for rank in workers})
    for rank in workers:
        channel.send(rank, None)
    lines = describe_rooms(rooms, {rank: setup.caches[pipelines[rank]] for rank in workers})
    if setup.cut_at:
        lines.append(f"prompts go in passes of at most {setup.cut_at} tokens: there is no memory for larger ones")
    return lines
