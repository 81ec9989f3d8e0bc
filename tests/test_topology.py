"""The rank table: who holds what, and what cannot be divided."""

import re

import pytest

from dejavu.config import ServeConfig
from dejavu.errors import TopologyError
from dejavu.model.spec import ModelSpec
from dejavu.topology import Role, build_topology, split_layers

SPEC = ModelSpec(
    "llama", 6, 48, 6, 2, 8, 96, 199, 64, positions="rope", norm="rmsnorm", activation="silu", gated_ffn=True
)


def test_places_controller_then_workers_stage_major():
    topology = build_topology(ServeConfig(pp=3, tp=2), SPEC, 7)
    assert [p.role for p in topology.placements] == [Role.CONTROLLER] + [Role.BOTH] * 6
    table = [(p.rank, p.stage, p.shard.tp_rank, p.shard.first_layer, p.shard.last_layer) for p in topology.workers]
    assert table == [
        (1, 0, 0, 0, 2),
        (2, 0, 1, 0, 2),
        (3, 1, 0, 2, 4),
        (4, 1, 1, 2, 4),
        (5, 2, 0, 4, 6),
        (6, 2, 1, 4, 6),
    ]
    assert topology.pipelines[0].stage_ranks(1) == [3, 4]
    assert [topology.pipelines[0].rank_of(p.stage, p.shard.tp_rank) for p in topology.workers] == [1, 2, 3, 4, 5, 6]


@pytest.mark.parametrize("num_layers", range(1, 12))
def test_even_split_covers_all_layers(num_layers):
    for pp in range(1, num_layers + 1):
        ranges = split_layers(num_layers, pp)
        assert [layer for first, last in ranges for layer in range(first, last)] == list(range(num_layers))
        sizes = [last - first for first, last in ranges]
        assert max(sizes) - min(sizes) <= 1


def test_asked_split_is_taken():
    assert split_layers(6, 3, (1, 3, 2)) == [(0, 1), (1, 4), (4, 6)]


@pytest.mark.parametrize(
    ("config", "world_size", "message"),
    [
        (ServeConfig(pp=2), 2, "2 ranks were started and pp 2 x tp 1 needs 3"),
        (ServeConfig(tp=3), 4, "tensor degree 3 does not divide the model's 2 KV heads: use one of 1, 2"),
        (ServeConfig(pp=7), 8, "pp 7 is more than the model's 6 layers: use at most 6"),
        (ServeConfig(pp=2, layers_per_stage="3,2"), 3, "layers_per_stage 3,2 adds up to 5: the model has 6 layers"),
    ],
)
def test_refuses_what_does_not_divide(config, world_size, message):
    with pytest.raises(TopologyError, match=re.escape(message)):
        build_topology(config, SPEC, world_size)


def test_vocabulary_parts_cover_the_vocabulary_once():
    for tp in (1, 2, 3, 7):
        parts = [p.shard.vocab_range(10) for p in build_topology_of(tp)]
        assert [token for start, stop in parts for token in range(start, stop)] == list(range(10))


def build_topology_of(tp):
    spec = ModelSpec("gpt2", 1, 42, 42, 42, 1, 42, 10, 8, positions="learned", norm="layernorm", activation="gelu")
    return build_topology(ServeConfig(tp=tp), spec, 1 + tp).workers
