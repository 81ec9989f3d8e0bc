"""Clocks and CPU time."""

import subprocess
import sys
import time

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dejavu.measure.clock import RunClock, estimate_offset
from dejavu.measure.cpu import CpuMeter, CpuUsage

DELAYS = st.floats(1e-6, 0.2)


@given(st.floats(-1e4, 1e4), st.lists(st.tuples(st.floats(0, 1e4), DELAYS, DELAYS), min_size=1))
def test_the_true_offset_lies_within_the_uncertainty(ahead_s, trips):
    samples = [(sent, sent + there + ahead_s, sent + there + back) for sent, there, back in trips]
    estimate = estimate_offset(samples)
    assert abs(estimate.offset_s - ahead_s) <= estimate.uncertainty_s + 1e-9
    assert estimate.uncertainty_s == pytest.approx(min(there + back for _, there, back in trips) / 2, abs=1e-9)


def test_the_quickest_of_the_samples_counts():
    estimate = estimate_offset([(0.0, 109.0, 10.0), (20.0, 120.5, 21.0), (30.0, 131.0, 34.0)])
    assert (estimate.offset_s, estimate.uncertainty_s) == (100.0, 0.5)


def test_a_rank_of_another_host_tells_the_controllers_time():
    """The peer's clock is 100 s behind the controller's, which started the run at 1000."""
    peer = RunClock.join(1000.0, estimate_offset([(900.0, 1000.25, 900.5)]))
    assert peer.at_s(905.0) == 5.0


def test_processes_of_a_host_share_the_time_line():
    clock = RunClock.start()
    code = f"from dejavu.measure.clock import RunClock; print(RunClock.join({clock.origin_s!r}).now_s())"
    before = clock.now_s()
    there = float(subprocess.run([sys.executable, "-c", code], capture_output=True, check=True, timeout=20).stdout)
    assert before < there < clock.now_s()


def test_sleeping_takes_no_cpu_and_spinning_does():
    meter = CpuMeter()
    time.sleep(0.1)
    asleep = meter.read()
    meter.reset()
    end = time.process_time() + 0.1
    while time.process_time() < end:
        pass
    busy = meter.read()
    assert asleep.window_s >= 0.1
    assert asleep.core_share < 0.5
    assert 0.1 <= busy.cpu_s <= busy.window_s * 1.5 + 0.05
    assert busy.core_share == pytest.approx(busy.cpu_s / busy.window_s)
    assert CpuUsage(0.0, 0.0).core_share == 0.0
