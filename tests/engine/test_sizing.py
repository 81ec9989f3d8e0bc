"""What fits on GPUs: shares of one that several ranks use, and what is said when rows do not fit."""

from __future__ import annotations

from dataclasses import replace

import pytest

from dejavu.config import ServeConfig
from dejavu.engine.sizing import (
    CacheSize,
    Room,
    activation_bytes,
    check_rooms,
    choose_cut,
    describe_rooms,
    rows_that_fit,
    size_caches,
)
from dejavu.errors import CapacityError
from dejavu.model.spec import Shard
from dejavu.model.table import MODELS
from dejavu.topology import build_topology, required_ranks

GB = 10**9
CACHE = CacheSize(row_len=1500, block_size=32, num_blocks=470, block_bytes=10_000_000)  # 10 rows of 47 blocks
ROOM = Room("host GPU 0 (00:01)", "H200", 140 * GB, 100 * GB, 25 * GB, 2 * GB, 47 * GB)


def test_all_rows_fit_and_the_line_says_how_many_more_would():
    check_rooms({1: ROOM}, {1: CACHE})
    assert rows_that_fit({1: ROOM}, 1, CACHE) == 20  # 98 GB of 4.7 GB a row
    (line,) = describe_rooms({1: ROOM}, {1: CACHE})
    for part in ("rank 1", "H200", "140.0 GB", "weights 25.0 GB", "47.0 GB = 10 rows of 1500 tokens", "20 rows"):
        assert part in line


def test_ranks_that_share_a_gpu_share_its_room():
    rooms = {1: ROOM, 2: replace(ROOM, pool_bytes=94 * GB), 3: replace(ROOM, gpu="host GPU 1 (00:02)")}
    caches = dict.fromkeys(rooms, CACHE)
    assert rows_that_fit(rooms, 3, CACHE) == 20
    assert rows_that_fit(rooms, 1, CACHE) == rows_that_fit(rooms, 2, CACHE) == 6  # 96 GB of 141
    with pytest.raises(CapacityError, match="6 rows would fit") as caught:
        check_rooms(rooms, caches)
    assert "10 rows of 1500 tokens" in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_gpu_that_holds_nothing_beside_the_weights_has_room_for_no_row():
    rooms = {1: replace(ROOM, free_bytes=GB)}
    assert rows_that_fit(rooms, 1, CACHE) == 0
    with pytest.raises(CapacityError, match="0 rows would fit"):
        check_rooms(rooms, {1: CACHE})


def test_activations_grow_with_tokens_and_shrink_with_tensor_ranks():
    spec = MODELS["opt-13b"]
    whole, half = Shard(0, 40, 40), Shard(0, 39, 40, 0, 2)
    one, two = (activation_bytes(spec, whole, n, 8, "float16") for n in (4096, 8192))
    logits = 3 * 4 * 8 * spec.vocab_size
    assert two - logits == 2 * (one - logits)
    assert one - logits == 4096 * 2 * (4 * 5120 + 2 * 3 * 5120 + 2 * 20480)
    assert activation_bytes(spec, half, 4096, 8, "float16") == 4096 * 2 * (4 * 5120 + 3 * 5120 + 20480)


def cut_of(gpu_gb, **options):
    fixed = {"model": "opt-13b", "load_format": "dummy", "microbatch_size": 8, "row_len": 2048}
    config = ServeConfig(**{**fixed, **options})
    spec = MODELS["opt-13b"]
    topology = build_topology(config, spec, required_ranks(config))
    caches = size_caches(config, spec, topology, 2048, "float16", "cuda")
    return choose_cut(config, spec, topology, caches, "float16", [each * GB for each in gpu_gb])


def test_prompts_are_cut_where_a_gpu_has_no_memory_for_the_largest_pass():
    """Weights 25.7 GB, 8 rows of 1.68 GB, 1.1 GB for graphs: a pass of 8192 tokens takes 1.5 GB more."""
    assert cut_of([80]) == 0
    assert cut_of([44]) == 0
    tight = cut_of([42])
    assert 256 <= tight < 8192
    assert tight % 256 == 0
    assert cut_of([42, 42], pp=2) == 0  # half of it on each
    assert cut_of([42], pp=2, num_microbatches=2) == 256  # both stages, with twice the rows, on one
    assert cut_of([42], prompt_chunk=512) == 0
    assert cut_of([10], prompt_pp=1, token_pp=1) == 0
    assert cut_of([]) == 0
