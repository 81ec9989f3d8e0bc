"""Check which tokens of a pool are valid against a model that keeps, for each token and layer, what it holds."""

import os
import subprocess
import sys

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dejavu.device import open_device
from dejavu.device.base import Location
from dejavu.errors import CapacityError
from dejavu.kv import KVPool, PoolLayout, RankCache, RowMap, Selection

FIRST_LAYER, NUM_LAYERS, BLOCK_SIZE, NUM_TOKENS = 3, 3, 4, 12


@pytest.fixture(scope="module")
def device():
    with open_device("cpu") as device:
        yield device


def make_pool(device, **options):
    layout = PoolLayout(8, FIRST_LAYER, NUM_LAYERS, BLOCK_SIZE, 0, 2, 5, 4)
    return KVPool(device, RankCache(0, layout), RowMap(2, 2, 3, BLOCK_SIZE), torch.float32, **options)


@pytest.fixture
def pool(device):
    with make_pool(device) as pool:
        pool.admit("a", 0, 1, [4, 0, 7])
        pool.admit("b", 1, 0, [2])
        yield pool


@pytest.mark.parametrize("location", list(Location))
def test_the_tensor_is_the_buffer(device, location):
    with make_pool(device, location=location) as pool:
        assert pool.tensor.shape == (8, NUM_LAYERS, 2, BLOCK_SIZE, 2, 5)
        assert pool.memory.location is location
        pool.tensor.zero_()
        pool.tensor[6, 1, 1, 2, 1, 4] = 7.0
        offset = pool.layout.offset(6, FIRST_LAYER + 1, 1, 2, 1) + 4 * 4
        assert pool.memory.view(offset, 4).tensor(torch.float32).tolist() == [7.0]
        assert pool.block(6).tensor(torch.float32).sum() == 7.0
        assert pool.block(5).tensor(torch.float32).sum() == 0.0


def test_a_pool_is_made_over_memory_that_another_one_exported(device):
    with make_pool(device) as first:
        first.tensor[3] = 2.5
        descriptor = first.memory.export_fd()
        memory = device.import_fd(descriptor, first.layout.total_bytes)
        os.close(descriptor)
        with make_pool(device, memory=memory) as second:
            assert (second.tensor[3] == 2.5).all()


def test_a_pool_that_is_too_large_is_refused(device):
    layout = PoolLayout(1 << 30, 0, 100, 16, 0, 64, 128, 4)
    with pytest.raises(CapacityError, match="do not fit"):
        KVPool(device, RankCache(0, layout), RowMap(1, 1, 1, 16), torch.float32)


def test_rows_are_found_by_their_keys(pool):
    assert dict(pool.blocks)["a"].tolist() == [4, 0, 7]
    assert pool.spans(Selection.of({"b": (1, 3), "a": (0, 0)})) == [(1, 0, 1, 3)]
    region = pool.region(Selection.of({"b": (1, 3)}, FIRST_LAYER + 2))
    assert region.pieces.source.tolist() == [pool.layout.offset(2, FIRST_LAYER + 2, plane, 1, 0) for plane in (0, 1)]
    assert pool.release("a") == [4, 0, 7]
    pool.admit("c", 0, 1, [0, 7])
    assert pool.length("c") == 0


def test_tokens_are_valid_once_every_layer_has_arrived(pool):
    landing = pool.begin([(0, 1, 0, 6)])
    landing.arrive(FIRST_LAYER + 1, FIRST_LAYER + 3)
    assert pool.length("a") == 0
    landing.arrive(FIRST_LAYER, FIRST_LAYER + 1)
    assert pool.length("a") == 6
    landing.close()
    assert pool.length("a") == 6


def test_chunks_may_arrive_in_any_order(pool):
    first, second = pool.begin([(0, 1, 0, 5)]), pool.begin([(0, 1, 5, 9)])
    second.commit()
    assert pool.length("a") == 0
    first.commit()
    assert pool.length("a") == 9


def test_an_aborted_landing_leaves_its_tokens_void(pool):
    pool.begin([(0, 1, 0, 3), (1, 0, 0, 2)]).commit()
    landing = pool.begin([(0, 1, 3, 8), (1, 0, 2, 4)])
    landing.arrive(FIRST_LAYER, FIRST_LAYER + 2)
    landing.abort()
    assert (pool.length("a"), pool.length("b")) == (3, 2)
    again = pool.begin([(0, 1, 3, 8)])
    again.arrive(FIRST_LAYER + 2, FIRST_LAYER + 3)
    again.close()  # two layers of the first attempt do not count
    assert pool.length("a") == 3


def test_valid_tokens_are_void_while_they_are_written_again(pool):
    pool.rows.mark_valid(0, 1, 10)  # what the rank has computed itself
    landing = pool.begin([(0, 1, 4, 6)], FIRST_LAYER, FIRST_LAYER + 1)
    assert pool.length("a") == 4
    landing.commit()
    assert pool.length("a") == 10
    pool.begin([(0, 1, 4, 6)]).abort()
    assert pool.length("a") == 4


def test_a_row_is_not_released_under_a_transfer(pool):
    landing = pool.begin([(0, 1, 0, 2)])
    with pytest.raises(AssertionError, match="cancel it"):
        pool.release("a")
    with pytest.raises(AssertionError, match="two transfers"):
        pool.begin([(0, 1, 1, 4)])
    landing.abort()
    pool.release("a")


def test_tokens_need_blocks(pool):
    with pytest.raises(AssertionError):
        pool.begin([(1, 0, 0, 5)])


@st.composite
def events(draw):
    """Draw landings, and in which order they begin, bring layers, and end."""
    result = []
    for i in range(draw(st.integers(1, 5))):
        start = draw(st.integers(0, NUM_TOKENS - 1))
        stop = draw(st.integers(start + 1, NUM_TOKENS))
        first = draw(st.integers(0, NUM_LAYERS - 1))
        last = draw(st.integers(first + 1, NUM_LAYERS))
        layers = draw(st.permutations(range(first, last)))
        steps = [("begin", i, (start, stop, first, last))]
        steps += [("arrive", i, layer) for layer in layers[: draw(st.integers(0, len(layers)))]]
        steps.append((draw(st.sampled_from(("close", "abort"))), i, None))
        result.append(steps)
    order = draw(st.permutations([i for i, steps in enumerate(result) for _ in steps]))
    queues = [iter(steps) for steps in result]
    return [next(queues[i]) for i in order], draw(st.integers(0, NUM_TOKENS))


@settings(max_examples=300, deadline=None, database=None)
@given(case=events())
def test_any_order_of_landings(device, case):
    steps, computed = case
    with make_pool(device) as pool:
        pool.admit("a", 0, 1, [4, 0, 7])
        pool.rows.mark_valid(0, 1, computed)
        good = np.zeros((NUM_TOKENS, NUM_LAYERS), dtype=bool)
        good[:computed] = True
        owner = np.full((NUM_TOKENS, NUM_LAYERS), -1)
        landings = {}
        for what, i, detail in steps:
            if what == "begin":
                start, stop, first, last = detail
                place = slice(start, stop), slice(first, last)
                if (owner[place] >= 0).any():
                    continue  # a caller's bug, which the pool asserts
                owner[place], good[place] = i, False
                landings[i] = pool.begin([(0, 1, start, stop)], FIRST_LAYER + first, FIRST_LAYER + last), place
            elif i in landings:
                landing, (tokens, layers) = landings[i]
                if what == "arrive":
                    landing.arrive(FIRST_LAYER + detail, FIRST_LAYER + detail + 1)
                    good[tokens, detail] = True
                else:
                    getattr(landing, what)()
                    owner[tokens, layers] = -1
                    good[tokens, layers] &= what == "close"
            assert pool.length("a") == int(np.logical_and.accumulate(good.all(axis=1)).sum())


def test_planning_needs_no_heavy_import():
    program = (
        "import sys, dejavu.kv; dejavu.kv.Resharding, dejavu.kv.stream_out;"
        "print([name for name in ('torch', 'mpi4py', 'cuda') if name in sys.modules])"
    )
    result = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=60, check=True)
    assert result.stdout.strip() == "[]"
    with pytest.raises(ImportError):
        exec("from dejavu.kv import nothing")
