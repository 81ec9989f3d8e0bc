"""How much memory KV gets, with and without swapping: by hand for gpt2 on two stages, of 6 layers of 768 numbers."""

import pytest

from dejavu.config import make_config
from dejavu.engine.sizing import check_host_memory, describe_capacity, size_caches
from dejavu.errors import CapacityError, ConfigError
from dejavu.model.table import MODELS
from dejavu.topology import build_topology, required_ranks

ROW_BYTES = 100 * 6 * 2 * 768 * 4  # a row of 100 tokens on one stage, in float32


def sized(**options):
    config = make_config({"pp": 2, "num_microbatches": 4, "microbatch_size": 3, "row_len": 100, **options})
    topology = build_topology(config, MODELS["gpt2"], required_ranks(config))
    return config, topology, size_caches(config, MODELS["gpt2"], topology, 100, "float32", "cpu")


def test_device_holds_the_resident_rows_and_the_host_all():
    _, _, (cache,) = sized(swap=True, block_size=30)  # 4 blocks hold a row
    assert (cache.device_blocks, cache.num_blocks, cache.blocks_per_row) == (2 * 3 * 4, 4 * 3 * 4, 4)
    _, _, (cache,) = sized(swap=True, resident=3, kv_memory=9 * ROW_BYTES, host_kv_memory=10 * ROW_BYTES + 5)
    assert (cache.device_blocks, cache.num_blocks) == (9, 10)
    assert cache.host_bytes == 10 * ROW_BYTES


@pytest.mark.parametrize("options", [{}, {"swap": True, "resident": 4}, {"swap": True, "resident": 7}])
def test_nothing_is_swapped_where_all_is_resident(options):
    _, _, (cache,) = sized(**options)
    assert not cache.is_swapped
    assert (cache.num_blocks, cache.host_bytes) == (12, 0)


def test_prompt_pipelines_are_not_swapped():
    options = {"prompt_pp": 3, "token_pp": 3, "num_microbatches": 3, "handover_rows": 2}
    config = make_config({"swap": True, "microbatch_size": 3, "row_len": 100, **options})
    topology = build_topology(config, MODELS["gpt2"], required_ranks(config))
    prompt, token = size_caches(config, MODELS["gpt2"], topology, 100, "float32", "cpu")
    assert not prompt.is_swapped
    assert (token.device_blocks, token.num_blocks) == (6, 11)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"kv_memory": 6 * ROW_BYTES - 1},
            f"holds 5 rows of 100 tokens and 2 resident microbatches have 6: give {6 * ROW_BYTES}",
        ),
        ({"host_kv_memory": ROW_BYTES - 1}, f"give at least {ROW_BYTES} bytes"),
    ],
)
def test_too_little_memory_is_refused(options, message):
    with pytest.raises(CapacityError) as caught:
        sized(swap=True, **options)
    assert message in str(caught.value)


def test_host_memory_of_all_ranks_here_has_to_be_there():
    _, topology, caches = sized(swap=True)
    check_host_memory(topology, caches, {0, 1, 2}, 24 * ROW_BYTES)
    check_host_memory(topology, caches, {0, 1}, 12 * ROW_BYTES)
    with pytest.raises(CapacityError, match="swapping needs"):
        check_host_memory(topology, caches, {0, 1, 2}, 24 * ROW_BYTES - 1)


def test_rows_that_fit_are_told():
    config, topology, (cache,) = sized(swap=True, kv_memory=9 * ROW_BYTES)
    text = describe_capacity(config, topology.pipelines[0], cache)
    assert "hold 8 rows of 100 tokens without swapping and 16 with it (2 of 4 microbatches resident)" in text
    assert "12 rows are swapped through 42.2 MiB of host memory a worker" in text


@pytest.mark.parametrize(
    "options",
    [
        {"resident": 3},
        {"host_kv_memory": 100},
        {"synthetic": "1,1", "synthetic_link": "1G"},
        {"synthetic": "1,1", "swap": True},
        {"swap": True, "synthetic_link": "1G"},
        {"swap": True, "resident": 0},
    ],
)
def test_options_that_mean_nothing_are_refused(options):
    with pytest.raises(ConfigError):
        make_config(options)
