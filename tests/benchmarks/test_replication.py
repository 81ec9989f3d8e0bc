"""What `dejavu bench replication` makes of passes and transfers, and what it asks the engine for."""

import pytest

from dejavu.benchmarks.replication import WITH, WITHOUT, Meter, Round, configure, count_differing, make_row, share
from dejavu.engine.messages import Report
from dejavu.measure.cpu import CpuUsage
from dejavu.measure.records import StepRecord, TransferRecord
from tests.documentation import unexplained

GIVEN = {"model": "demo", "load_format": "dummy", "device": "cpu", "dtype": "bfloat16", "pp": 2, "batch": 2}
GIVEN |= {"block_size": 0, "prompt_len": 8, "output_len": 4, "threads": 1, "transport": "tcp"}


def step(microbatch, number, start_s, kind="token", num_rows=2):
    return StepRecord(1, 0, 0, microbatch, number, kind, num_rows, num_rows, start_s, start_s + 0.01, start_s + 0.01)


def test_a_request_fills_each_row():
    config = configure(GIVEN)
    assert (config.replicate, config.replica_transport) == ("ring", "tcp")
    assert (config.num_requests, config.microbatch_size, config.row_len) == (4, 2, 12)


def test_rounds_are_compared_in_pairs():
    rounds, steps = [], []
    for number, (way, period_s) in enumerate([(WITH, 0.055), (WITHOUT, 0.05), (WITHOUT, 0.1), (WITH, 0.12)]):
        start_s = 10.0 * number
        rounds.append(Round(way, start_s, start_s + 5, ((1, 2), (3, 4 + number // 3))))
        steps.append(step(0, 0, start_s, kind="prompt"))
        steps += [step(m, n, start_s + 1 + n * period_s + m / 7) for m in range(2) for n in range(5)]
        steps.append(step(0, 9, start_s + 4, num_rows=1))  # when rows begin to end
    copies = [(800, 5e-4), (20, 1e-4), (20, 3e-4), (20, 2e-4)]
    transfers = [TransferRecord(1, "replica", "local", 1, 2, nbytes, 1.0, 1.0 + took_s) for nbytes, took_s in copies]
    row = make_row(configure(GIVEN), rounds, [Report(steps, CpuUsage(0.1, 1.0), 0.1, transfers)], 10)
    assert unexplained("benchmarks.md", "bench replication", row) == []
    assert row["period_without_ms"] == pytest.approx(75)
    assert row["cost_percent"] == pytest.approx(15)
    assert row["copy_us"] == pytest.approx(200)
    assert (row["bytes_step"], row["expected_bytes_step"], row["wrong"]) == (20, 20, 1)
    assert count_differing(rounds[0], rounds[1]) == 0


def test_shares_add_up_over_ranks():
    row = share([Meter(10, 0.1, 0.001), Meter(30, 0.3, 0.007, 0.004)])
    assert unexplained("benchmarks.md", "bench replication", row) == []
    expected = {"pass_cpu_us": 10_000, "replication_cpu_us": 200, "cpu_percent": 2.0, "threads_cpu_us": 100}
    assert row == pytest.approx(expected)
