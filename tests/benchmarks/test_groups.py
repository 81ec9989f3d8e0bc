"""The benchmark of sums and hand-overs on CPU ranks, and that it finds what is wrong."""

import json

import pytest
import torch

from dejavu.benchmarks.groups import count_wrong
from dejavu.device import num_cuda_devices
from tests.benchmarks.test_microbench import run_bench
from tests.documentation import unexplained


def test_rows_of_sums_and_hops(tmp_path):
    sizes = ("--sum-kib", "10", "--hop-kib", "10", "--repeats", "1", "--device", "cpu")
    done, text = run_bench("groups", *sizes, "--out", str(tmp_path / "run"), timeout=110)
    assert done.returncode == 0, text
    rows = json.loads(done.stdout.splitlines()[-1])["rows"]
    assert unexplained("benchmarks.md", "bench groups", rows[0]) == []
    assert [(row["what"], row["way"], row["kib"]) for row in rows] == [
        ("sum", "mpi", 10.0),
        ("hop", "mailbox", 10.0),
        ("hop", "mpi", 10.0),
    ]
    for row in rows:
        assert row["wrong"] == 0
        assert row["us"] > 0
        assert abs(row["of_copy_percent"] - 100 * row["copy_us"] / row["us"]) < 1e-6


@pytest.mark.gpu
@pytest.mark.skipif(num_cuda_devices() == 0, reason="no CUDA device, or no cuda-python")
def test_rows_of_gpus(tmp_path):
    sizes = ("--sum-kib", "10,2560", "--hop-kib", "10", "--repeats", "1", "--device", "cuda", "--grids", "256x8")
    done, text = run_bench("groups", *sizes, "--out", str(tmp_path / "run"), timeout=110)
    assert done.returncode == 0, text
    rows = json.loads(done.stdout.splitlines()[-1])["rows"]
    ways = {(row["what"], row["way"], row["kib"]) for row in rows}
    assert {("sum", "one-shot", 10.0), ("sum", "two-shot", 2560.0), ("sum", "chosen", 2560.0)} < ways
    assert ("hop", "mailbox", 10.0) in ways
    assert sum(row["wrong"] for row in rows) == 0


def test_sums_in_another_order_or_of_other_numbers_are_wrong():
    parts = [torch.randn(100, dtype=torch.float16) for _ in range(2)]
    right = (parts[0].float() + parts[1].float()).half()
    assert count_wrong(right, parts) == 0
    right[7] *= 1.01
    assert count_wrong(right, parts) == 1
    three = [*parts, torch.randn(100, dtype=torch.float16)]
    assert count_wrong(sum(three[::-1]), three) == 0  # of more than two, another order is another rounding
    assert count_wrong(parts[0], three) > 50
