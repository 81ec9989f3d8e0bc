import math

import pytest

from dejavu.measure.report.compare import Estimate, comparison_rows, group_runs
from dejavu.measure.report.runs import read_runs

from .make_runs import make_run


def test_interval_is_students():
    # Five numbers, mean 3, deviation sqrt(2.5): 2.776 * sqrt(2.5 / 5), from a textbook's table.
    estimate = Estimate.of([1, 2, 3, 4, 5, math.nan])
    assert (estimate.mean, estimate.count) == (3, 5)
    assert estimate.half_width == pytest.approx(1.963, abs=1e-3)


def test_ratio_adds_relative_errors_in_squares():
    ratio = Estimate(20.0, 3.0, 4).over(Estimate(10.0, 2.0, 4))
    assert ratio.mean == 2
    assert ratio.half_width == pytest.approx(2 * math.hypot(0.15, 0.2))


@pytest.mark.parametrize("values", [[], [math.nan]])
def test_nothing_measured_has_no_estimate(values):
    assert math.isnan(Estimate.of(values).mean)
    assert math.isnan(Estimate(1, 0, 2).over(Estimate.of(values)).mean)


def test_single_measurement_has_no_interval():
    assert math.isnan(Estimate.of([2.0]).half_width)


def test_runs_that_differ_in_the_seed_are_repeats(tmp_path):
    speeds = {"a": (1.0, 1, 4), "b": (1.1, 2, 4), "c": (2.0, 1, 8)}
    paths = [
        make_run(tmp_path / name, speed=speed, options={"seed": seed, "microbatch_size": rows})
        for name, (speed, seed, rows) in speeds.items()
    ]
    groups = group_runs(read_runs(paths))
    assert [(group.label, len(group.runs)) for group in groups] == [("microbatch-size 4", 2), ("microbatch-size 8", 1)]
    first, second = comparison_rows(groups)
    # 12 tokens in 5 s, in 5/1.1 s and in 5/2 s
    assert first["tokens_per_s"] == pytest.approx((12 / 5 + 12 * 1.1 / 5) / 2)
    assert second["tokens_per_s_ratio"] == pytest.approx(2 / 1.05)
    assert first["tokens_per_s_ratio"] == 1
