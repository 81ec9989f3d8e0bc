"""The swapping benchmarks: what they serve and refuse, and a small run of each."""

import json
import subprocess
import sys

import pytest

from dejavu.benchmarks.swapping import Case, make_options
from dejavu.errors import UsageError
from tests.documentation import unexplained

GIVEN = {
    "models": "opt-13b,opt-125m",
    "stages": "4,6",
    "prompt_lens": "64",
    "output_lens": "8,16",
    "batch": 3,
    "synthetic": "20,20",
    "link_gbps": 8.0,
    "dtype": "float16",
    "device": "cpu",
    "threads": 1,
}


def run(*arguments):
    command = [sys.executable, "-m", "dejavu.cli.main", "bench", *arguments]
    done = subprocess.run(command, capture_output=True, text=True, timeout=100, check=False)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])["rows"]


def test_both_ways_have_the_same_memory():
    options = make_options(GIVEN)
    assert len(options.cases) == 2 * 2 * 2
    for case in options.cases:
        plain, swapped, roomy = (options.config(case, way) for way in ("plain", "swapped", "roomy"))
        resident = swapped.resident_of(swapped.pipeline_shapes[0])
        assert plain.pipeline_shapes[0].num_rows == resident * swapped.microbatch_size
        assert swapped.microbatch_size == roomy.microbatch_size == case.stages * 3 // 2
        assert not roomy.swap
        assert swapped.synthetic_link == 8_000_000_000
    assert Case("opt-13b", 4, 64, 8, 3).num_requests == 2 * 4 * 6


@pytest.mark.parametrize("change", [{"stages": "2"}, {"stages": "4,x"}, {"prompt_lens": "0"}])
def test_impossible_options_are_refused(change):
    with pytest.raises(UsageError, match="--"):
        make_options(GIVEN | change)


def test_a_small_run(tmp_path):
    shape = ["--stages", "3", "--prompt-lens", "8", "--output-lens", "6", "--synthetic", "4,4"]
    (row,) = run("swapping", *shape, "--out", str(tmp_path / "run"))
    assert (row["batch"], row["swapped_batch"], row["requests"], row["wrong"]) == (2, 3, 18, 0)
    assert row["kv_bytes"] == row["plain_kv_bytes"]
    tokens = 18 * (8 + 5)  # the last one's KV is never made
    token_bytes = 2 * 40 * 128 * 2 * (14 + 13 + 13)
    assert row["flushed_bytes"] == tokens * token_bytes
    assert unexplained("benchmarks.md", "bench swapping", row) == []
    assert row["fetched_bytes"] > row["flushed_bytes"]
    assert (tmp_path / "run" / "swapping.png").stat().st_size > 1000


def test_a_small_run_of_transfers(tmp_path):
    rows = run(
        "swaplink",
        "--context",
        "30",
        "--repeats",
        "1",
        "--steps",
        "8",
        "--loads",
        "25",
        "--device",
        "cpu",
        "--out",
        str(tmp_path),
    )
    assert unexplained("benchmarks.md", "bench swaplink", rows[0]) == []
    assert [row["operation"] for row in rows] == ["fetch", "flush", "both", "token", "step"]
    assert [row["wrong"] for row in rows] == [0] * 5
    sizes = {row["operation"]: row["bytes"] for row in rows}
    assert sizes["both"] == 2 * sizes["fetch"] == 2 * 30 * sizes["token"]
