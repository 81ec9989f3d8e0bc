"""Who holds whose replica, for every shape of pipeline and every way to spread it over hosts."""

from itertools import product

import pytest

from dejavu.config import ServeConfig
from dejavu.engine.ring import place_name, pool_name, replica_holder, replica_name, replica_owner
from dejavu.topology import build_topology, required_ranks
from tests.test_topology import SPEC


def make(**values):
    config = ServeConfig(**values)
    return build_topology(config, SPEC, required_ranks(config))


@pytest.mark.parametrize("shape", [{"pp": 3, "tp": 2}, {"pp": 2, "dp": 2}, {"prompt_pp": 1, "token_pp": 3}])
def test_on_one_host_the_next_stage_holds(shape):
    topology = make(**shape)
    hosts = ["a"] * len(topology.placements)
    for pipeline in topology.pipelines:
        for stage, tensor_rank in product(range(pipeline.pp), range(pipeline.tp)):
            rank = pipeline.rank_of(stage, tensor_rank)
            holder = replica_holder(topology, hosts, rank)
            assert holder == pipeline.rank_of((stage + 1) % pipeline.pp, tensor_rank)
            assert replica_owner(topology, hosts, holder) == rank


@pytest.mark.parametrize(
    ("hosts", "distance"),
    [("aabb", 2), ("abab", 1), ("aaab", 1), ("abcd", 1), ("abbb", 1), ("aabbcc", 2), ("abcabc", 1), ("aaabbb", 3)],
)
def test_another_host_holds_where_there_is_one(hosts, distance):
    pp = len(hosts)
    topology = make(pp=pp)
    everywhere = ["a", *hosts]  # the controller's comes first
    holders = [replica_holder(topology, everywhere, rank) for rank in range(1, pp + 1)]
    assert holders == [1 + (stage + distance) % pp for stage in range(pp)]
    assert sorted(holders) == list(range(1, pp + 1))
    assert [replica_owner(topology, everywhere, holder) for holder in holders] == list(range(1, pp + 1))


def test_tensor_ranks_keep_to_themselves():
    topology = make(pp=2, tp=2)
    assert [replica_holder(topology, "caabb", rank) for rank in range(1, 5)] == [3, 4, 1, 2]


def test_one_stage_keeps_its_own():
    topology = make(pp=1)
    assert replica_holder(topology, ["a", "b"], 1) == replica_owner(topology, ["a", "b"], 1) == 1


def test_names_belong_to_places():
    topology = make(prompt_pp=1, token_pp=2, token_tp=2)
    names = [place_name(placement) for placement in topology.workers]
    assert names == ["0.0.0", "1.0.0", "1.0.1", "1.1.0", "1.1.1"]
    holder, owner = topology.placements[4], topology.placements[2]
    assert pool_name(owner) == "1.0.0/pool"
    assert pool_name(owner, swapped=True) == "swapped/1.0.0/pool"
    assert replica_name(holder, owner) == "1.1.0/replica/1.0.0"
    with pytest.raises(AssertionError):
        place_name(topology.placements[0])
