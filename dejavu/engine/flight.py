"""The passes that a stage has taken up and not yet handed on: on a GPU they are only queued, several at a time."""

import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field
from statistics import median

from dejavu.engine.messages import Work
from dejavu.engine.timeline import Mark
from dejavu.measure.recorder import MemoryRecorder, Recorder
from dejavu.measure.records import StepKind, StepRecord

SHORTEST_LOOK_S, LONGEST_LOOK_S = 20e-6, 1e-3
TELL_EVERY_S = 0.5
TIMED_PASSES = 4096  # the newest ones of each kind, of whose host times the median is told

Finish = Callable[[], None]


@dataclass(slots=True)
class Flight:
    """Hold a pass that is under way: when `landed` is reached, `finish` does what is left to do for it."""

    work: Work
    start: Mark
    computed: Mark
    landed: Mark
    finish: Finish | None
    host_s: float = 0.0  # that queueing it took
    kind: StepKind = field(init=False)

    def __post_init__(self) -> None:
        self.kind = self.work.kind


@dataclass(slots=True)
class Flights:
    """Finish and record passes in the order in which they were queued, when the device is done with each.

    `place` is (stage, tensor rank), for the records. Nobody is told when a stream reaches a point, so somebody has to
    look: seldom at first, and often when a pass has taken about as long as the last one of its kind.
    """

    rank: int
    place: tuple[int, int]
    now_s: Callable[[], float]
    check: Callable[[], None] = lambda: None  # raises what made a pass void
    recorder: Recorder = field(default_factory=MemoryRecorder)
    host_s: dict[str, deque[float]] = field(default_factory=dict)  # by kind, what passes took of this thread
    under_way: deque[Flight] = field(default_factory=deque)
    later: deque[Finish] = field(default_factory=deque)  # what may wait until the next pass is queued
    late_s: float = 0.0  # that this took since the last pass landed
    began_s: float = 0.0  # when the first of them was at its turn
    usual_s: dict[str, float] = field(default_factory=dict)  # what the last pass of each kind took
    tell: Callable[[float], None] = lambda compute_s: None  # who watches the run, how long this rank computed
    told_s: float = 0.0  # when `tell` was called last
    untold_s: float = 0.0  # computed since then
    stall_ms: Callable[[Work], float] = lambda work: 0.0  # what a pass that has landed waited for swapped KV

    def add(self, flight: Flight) -> None:
        """Take a pass that was queued, and finish it if it is done already."""
        if not self.under_way:
            self.began_s = self.now_s()
        self.under_way.append(flight)
        self.look()

    def look(self) -> float:
        """Finish what is done; give the seconds after which to look again, or infinity."""
        if self.later:
            self.catch_up()
        while self.under_way and self.under_way[0].landed.reached:
            self.land(self.under_way.popleft())
        if self.later:
            return 0.0
        return self.until_next_s() if self.under_way else self.until_told_s()

    def catch_up(self) -> None:
        """Do what could wait; the time that it takes counts for the next pass that lands."""
        begun_s = time.monotonic()
        while self.later:
            self.later.popleft()()
        self.late_s += time.monotonic() - begun_s

    def drain(self) -> None:
        """Wait until everything is done."""
        while self.under_way or self.later:
            time.sleep(min(LONGEST_LOOK_S, self.look()))

    @property
    def host_us_per_step(self) -> float:
        """Give the median of what a token step took of this thread, in microseconds; of any pass where it had none."""
        seconds = list(self.host_s.get("token") or (each for kind in self.host_s.values() for each in kind))
        return 1e6 * median(seconds) if seconds else float("nan")

    def until_next_s(self) -> float:
        """Give half of the time that the next pass has left, or a part of that by which it is late."""
        left_s = self.began_s + self.usual_s.get(self.under_way[0].kind, 0.0) - self.now_s()
        return min(LONGEST_LOOK_S, max(SHORTEST_LOOK_S, left_s / 2 if left_s > 0 else -left_s / 16))

    def until_told_s(self) -> float:
        """Tell what is untold, when it is time; give the seconds until then, or infinity where nothing is."""
        if not self.untold_s:
            return float("inf")
        now_s = self.now_s()
        left_s = self.told_s + TELL_EVERY_S - now_s
        if left_s > 0:
            return left_s
        self.tell_now(now_s)
        return float("inf")

    def tell_now(self, now_s: float) -> None:
        """Tell how long this rank has computed since it told last."""
        self.tell(self.untold_s)
        self.told_s, self.untold_s = now_s, 0.0

    def land(self, flight: Flight) -> None:
        """Finish a pass and note when it was here."""
        landed_s = self.now_s()
        self.usual_s[flight.kind] = landed_s - self.began_s
        self.began_s = landed_s
        self.check()
        if flight.finish:
            flight.finish()
        self.record(flight)
        host_s = flight.host_s + self.late_s + self.now_s() - landed_s
        self.host_s.setdefault(flight.kind, deque(maxlen=TIMED_PASSES)).append(host_s)
        self.late_s = 0.0

    def record(self, flight: Flight) -> None:
        """Note when a pass was here."""
        work = flight.work
        flight.landed.settle()
        start_s, computed_s, end_s = flight.start.settle(), flight.computed.settle(), self.now_s()
        self.recorder.add_step(
            StepRecord(
                self.rank,
                *self.place,
                work.microbatch,
                work.step,
                flight.kind,
                len(work.rows),
                sum(row.num_new for row in work.rows),
                start_s,
                computed_s,
                end_s,
                self.stall_ms(work),
            )
        )
        self.untold_s += computed_s - start_s
        if end_s - self.told_s >= TELL_EVERY_S:
            self.tell_now(end_s)
