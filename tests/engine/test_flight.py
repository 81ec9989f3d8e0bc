"""Passes under way: finished in order when their marks are reached, recorded, looked at neither too often nor late."""

from __future__ import annotations

from dataclasses import dataclass, field

import pytest

from dejavu.device import open_device
from dejavu.engine.flight import LONGEST_LOOK_S, SHORTEST_LOOK_S, Flight, Flights
from dejavu.engine.messages import RowWork, Work
from dejavu.engine.timeline import DeviceTimeline, HostMark


@dataclass
class Clock:
    """Be a clock that goes when it is told."""

    time_s: float = 0.0

    def __call__(self) -> float:
        return self.time_s


@dataclass
class Promise:
    """Be a mark that is reached at a time of the clock."""

    clock: Clock
    due_s: float
    settled: list[float] = field(default_factory=list)

    @property
    def reached(self) -> bool:
        return self.clock.time_s >= self.due_s

    def settle(self) -> float:
        assert self.reached
        self.settled.append(self.due_s)
        return self.due_s


def make_work(step: int, num_new: int = 1) -> Work:
    rows = (RowWork(7, 0, num_new, 3, num_new > 1, True, 3), RowWork(8, 1, 1, 5, False, True, 4))
    return Work(step, 2, rows, (), (1,) * (num_new + 1))


def test_a_pass_that_is_done_at_once_is_finished_and_recorded_at_once():
    clock, finished = Clock(1.0), []
    flights = Flights(4, (2, 1), clock)
    flights.add(Flight(make_work(0), HostMark(0.25), HostMark(0.5), HostMark(0.75), lambda: finished.append(0)))
    assert finished == [0]
    (step,) = flights.recorder.steps
    assert (step.rank, step.stage, step.tp_rank, step.microbatch, step.step, step.kind) == (4, 2, 1, 2, 0, "token")
    assert (step.num_rows, step.num_tokens) == (2, 2)
    assert (step.start_s, step.compute_end_s, step.end_s) == (0.25, 0.5, 1.0)
    assert flights.look() == float("inf")


def test_passes_finish_in_order_and_never_early():
    clock, finished = Clock(), []
    flights = Flights(1, (0, 0), clock)
    for step, due_s in enumerate([3.0, 2.0, 5.0]):
        marks = [Promise(clock, part * due_s) for part in (0.5, 0.75, 1.0)]
        flights.add(Flight(make_work(step), *marks, lambda step=step: finished.append(step)))
    for clock.time_s, expected in [(2.5, []), (3.0, [0, 1]), (4.9, [0, 1]), (5.0, [0, 1, 2])]:
        flights.look()
        assert finished == expected
    assert [(s.start_s, s.compute_end_s) for s in flights.recorder.steps] == [(1.5, 2.25), (1.0, 1.5), (2.5, 3.75)]


def test_what_may_wait_is_done_at_the_next_look():
    clock, told = Clock(), []
    flights = Flights(1, (0, 0), clock)
    marks = [Promise(clock, 1.0) for _ in range(3)]
    flights.add(Flight(make_work(0), *marks, lambda: flights.later.append(lambda: told.append(0)), 2e-4))
    clock.time_s = 1.0
    assert flights.look() == 0.0  # so that the next look comes at once, or behind the next pass
    assert told == []
    assert flights.look() == float("inf")
    assert told == [0]
    assert flights.host_us_per_step == pytest.approx(200.0)


def test_looks_come_closer_towards_the_usual_time_and_thin_out_behind_it():
    clock = Clock()
    flights = Flights(1, (0, 0), clock)
    flights.add(Flight(make_work(0), Promise(clock, 0), Promise(clock, 0), Promise(clock, 1e-3), None))
    clock.time_s = 1e-3
    assert flights.look() == float("inf")  # a token step takes 1 ms
    flights.add(Flight(make_work(1), Promise(clock, 0), Promise(clock, 0), Promise(clock, 1.0), None))
    pauses, looks = [], 0
    while flights.under_way and looks < 10_000:
        pauses.append(flights.look())
        clock.time_s += min(pauses[-1], 1.0)
        looks += 1
    assert pauses[0] == 0.5e-3
    near = [pause for pause in pauses if pause == SHORTEST_LOOK_S]
    assert 5 < len(near) < 40
    assert max(pauses[:-1]) == LONGEST_LOOK_S
    assert looks < 1300


def test_device_marks_lie_on_the_runs_clock():
    """On a device of any kind the events' times come back in order, between the clock's before and after."""
    from time import monotonic

    with open_device("cpu") as device:
        timeline = DeviceTimeline(device, monotonic)
        before_s = monotonic()
        marks = [timeline.mark() for _ in range(3)]
        assert all(mark.reached for mark in marks)
        times = [mark.settle() for mark in marks]
        assert times == sorted(times)
        assert before_s - 1e-3 <= times[0] <= times[-1] <= monotonic()
        assert len(timeline.idle) == 3


def test_a_late_event_becomes_the_next_base(monkeypatch):
    from time import monotonic

    import dejavu.engine.timeline as module

    monkeypatch.setattr(module, "NEW_BASE_S", -1.0)
    with open_device("cpu") as device:
        timeline = DeviceTimeline(device, monotonic)
        first = timeline.base
        mark = timeline.mark()
        time_s = mark.settle()
        assert timeline.base is mark.event
        assert timeline.base_s == time_s
        assert timeline.idle == [first]
