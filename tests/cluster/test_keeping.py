"""What a worker leaves with the keeper, and what its successor finds."""

import os
import secrets
import subprocess
import sys

import pytest
import torch

from dejavu.cluster.keeping import RESTART_S, StoreShelf, choose_guardian, outlives_worker, take_memory, take_weights
from dejavu.cluster.segments import directory_of
from dejavu.device import Location, open_device
from dejavu.device.keeper_line import Guardian, end_keeper
from dejavu.device.vault import Vault
from dejavu.kv.layout import PoolLayout
from dejavu.kv.replica import StoreShape
from dejavu.model.spec import Shard
from dejavu.model.weight_arena import WeightArena
from dejavu.model.weights import dummy_stage
from dejavu.topology import Placement, Role
from tests.test_topology import SPEC

SHARD = Shard(2, 4, 6)
PLACE = Placement(2, Role.BOTH, 0, 1, SHARD)
FIRST_WORKER = """
import os, signal, sys, torch
import mpi4py; mpi4py.rc.initialize = False  # it is no rank
from dejavu.cluster.keeping import take_memory, take_weights
from dejavu.device import open_device
from dejavu.model.weights import dummy_stage
from tests.cluster.test_keeping import PLACE, SHARD, SPEC, Guardian, Vault, WeightArena
device, vault = open_device("cpu"), Vault(sys.argv[1], Guardian(int(sys.argv[2])))
arena = WeightArena(SPEC, SHARD, torch.float32)
take_weights(vault, device, PLACE, arena, lambda allocate: dummy_stage(SPEC, SHARD, torch.float32, "cpu", allocate))
memory, was_kept = take_memory(vault, device, "0.1.0/pool", 4096)
assert not was_kept and not memory.tensor().any()
memory.tensor()[:] = 9
os.kill(os.getpid(), signal.SIGKILL)
"""


FILES = str(directory_of("x"))


@pytest.mark.parametrize(
    ("environment", "may_restart", "expected"),
    [
        ({}, True, Guardian(7)),
        ({"DEJAVU_JOB": "x", "DEJAVU_SUPERVISOR": "5@here"}, True, Guardian(5, files=FILES)),
        ({"DEJAVU_JOB": "x", "DEJAVU_SUPERVISOR": "5@there"}, True, Guardian(7, RESTART_S, FILES)),
        ({"DEJAVU_JOB": "x", "DEJAVU_SUPERVISOR": "5@there"}, False, Guardian(7, files=FILES)),
        ({"DEJAVU_SUPERVISOR": "5@here"}, True, Guardian(7)),
    ],
)
def test_the_keeper_watches_whoever_ends_the_job(environment, may_restart, expected):
    assert choose_guardian(environment, "here", 7, may_restart=may_restart) == expected


def test_a_successor_finds_weights_and_pool():
    job = secrets.token_hex(16)
    try:
        done = subprocess.run([sys.executable, "-c", FIRST_WORKER, job, str(os.getpid())], timeout=60, check=False)
        assert done.returncode == -9
        with open_device("cpu") as device:
            vault, arena = Vault(job, Guardian(os.getpid())), WeightArena(SPEC, SHARD, torch.float32)
            weights, memory = take_weights(vault, device, PLACE, arena, lambda allocate: pytest.fail("loaded again"))
            expected = dummy_stage(SPEC, SHARD, torch.float32)
            assert list(weights) == list(expected)
            for name, tensor in expected.items():
                assert torch.equal(weights[name], tensor), name
            memory.close()
            assert torch.equal(
                weights["layers.2.norm1.weight"], expected["layers.2.norm1.weight"]
            )  # it holds the memory
            pool, was_kept = take_memory(vault, device, "0.1.0/pool", 4096)
            assert was_kept
            assert (pool.tensor() == 9).all()
            pool.close()
            other, was_kept = take_memory(vault, device, "0.1.0/pool", 8192)  # of another size: not what is asked for
            assert not was_kept
            assert not other.tensor().any()
            other.close()
            host, _ = take_memory(vault, device, "0.1.0/host", 4096, Location.HOST)
            assert host.location is Location.HOST
            host.close()
    finally:
        end_keeper(job)


def test_replicas_stay_mapped_as_long_as_they_are_kept():
    job, described = secrets.token_hex(16), (PoolLayout(4, 0, 2, 4, 0, 2, 8, 4), StoreShape(1, 2, 2))
    try:
        with open_device("cpu") as device:
            vault = Vault(job, Guardian(os.getpid()))
            with StoreShelf(vault, device) as shelf:
                stays, goes = shelf.take("stays", *described), shelf.take("goes", *described)
                vault.drop("goes")
                shelf.drop_stale()
                assert shelf.stores.keys() == {"stays"}
                assert shelf.take("stays", *described) is stays
                assert shelf.take("goes", *described) is not goes
            vault.close()
    finally:
        end_keeper(job)


def test_a_cpu_keeps_weights_that_are_small_beside_its_memory():
    with open_device("cpu") as device:
        assert outlives_worker(device, WeightArena(SPEC, SHARD, torch.float32))
        large = WeightArena(SPEC, SHARD, torch.float32)
        object.__setattr__(large, "nbytes", device.properties.total_bytes // 5)
        assert not outlives_worker(device, large)
