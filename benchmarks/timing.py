"""How long a transfer takes: posted ahead behind a gate on its stream, and timed from the gate's opening to arrival.

A serving worker posts a transfer while its stream still computes what is to be sent. So the clock of a transfer starts
when its stream gets to it; what posting costs the host is a column of its own. Plain copies, the ceilings, are timed
in the same way. Only what a driver cannot hold behind a wait (hundreds of copies) starts with its first post.
"""

import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

from dejavu.device import FLAG_BYTES, Device, Stream
from dejavu.device.flags import Flag

GATE_DEADLINE_S = 60.0
WAIT_S = 60.0
MOST_GATED_COPIES = 700  # the driver blocks who posts about 1000 operations behind a wait
SECONDS = 0.15  # after which no further repeat begins
FEWEST, WINDOWS = 3, 5  # repeats in any case; timed windows


class Waitable(Protocol):
    """Follow what was started."""

    @property
    def done(self) -> bool:
        """Tell whether it has ended."""

    def wait(self, deadline_s: float | None = WAIT_S) -> None:
        """Block until it has ended; raises its error."""


class Load(Protocol):
    """Be this rank's part of what is timed; `index` tells several apart that are under way together."""

    nbytes: int
    num_pieces: int
    num_copies: int  # that one start queues on a stream
    window: int  # how many are under way together
    can_gate: bool
    is_driven: bool  # by a thread of this process, whose interpreter a spinning waiter would hold
    arrival: int  # the rank that sees the bytes arrive
    stream: Stream

    def prepare(self, index: int) -> list[Waitable]:
        """Post what the other side does beforehand."""

    def start(self, index: int) -> list[Waitable]:
        """Post the transfer that is timed."""


class Gate:
    """Hold a stream's later work back until the host lets it go."""

    def __init__(self, device: Device) -> None:
        self._device = device
        self._word = device.allocate_host_exportable(FLAG_BYTES)
        self._flag = Flag(self._word.address)
        self._value = 0

    def shut(self, stream: Stream) -> None:
        """Queue the wait."""
        self._value += 1
        self._device.wait_flag(self._word, self._value, stream=stream, deadline_s=GATE_DEADLINE_S)

    def open(self) -> None:
        """Let the stream go."""
        self._flag.write(self._value)

    def close(self) -> None:
        """Free the flag."""
        self._word.close()


class World(Protocol):
    """Be what ranks that measure together share."""

    device: Device
    rank: int
    gate: Gate

    def share(self, *values: float) -> list[list[float]]:
        """Give every rank's values to every rank; also a barrier."""


@dataclass(frozen=True, slots=True)
class Timing:
    """Hold the times of one load, in seconds: single transfers, windows of `window` (each divided by it), posts."""

    singles: list[float]
    windows: list[float]
    posts: list[float]

    @property
    def each_s(self) -> float:
        """Give the median time of one, among as many as the load has under way."""
        return statistics.median(self.windows or self.singles)

    @property
    def median_post_s(self) -> float:
        """Give the median time that posting one takes the host."""
        return statistics.median(self.posts)

    def percentile(self, percent: float) -> float:
        """Give the time that so many single transfers in a hundred did not exceed."""
        ordered = sorted(self.singles)
        return ordered[min(len(ordered) - 1, int(len(ordered) * percent / 100))]


def run_round(world: World, load: Load, count: int) -> tuple[float, float]:
    """Move `count` messages at once; give the seconds until all had arrived, and those of posting one."""
    early = [item for index in range(count) for item in load.prepare(index)]
    is_gated = load.can_gate and load.num_copies * count <= MOST_GATED_COPIES and world.rank == 0
    world.share()
    if is_gated:
        world.gate.shut(load.stream)
    begin_s = time.perf_counter()
    posted = [item for index in range(count) for item in load.start(index)]
    posted_s = time.perf_counter()
    if is_gated:
        world.gate.open()
    for item in (*early, *posted):
        await_end(world.device, item, spins=not load.is_driven)
    end_s = time.perf_counter()
    ranks = world.share(posted_s if is_gated else begin_s, end_s, (posted_s - begin_s) / count)
    return ranks[load.arrival][1] - ranks[0][0], ranks[0][2]


def await_end(device: Device, item: Waitable, *, spins: bool) -> None:
    """Wait as closely as the device allows: a CPU needs its cores for the copies, so there the waiter sleeps."""
    if spins and device.properties.kind == "cuda":
        end_s = time.perf_counter() + WAIT_S
        while not item.done and time.perf_counter() < end_s:
            time.sleep(0)  # lets other threads run, which may have to carry the transfer on
    item.wait(WAIT_S)


def measure(
    world: World, loads: Sequence[Load], repeats: int, refresh: Callable[[], None] = lambda: None
) -> list[Timing]:
    """Warm up and time loads of one window in turns, so that a noisy machine slows all of them alike.

    `refresh` makes new contents before the last round, so that what has arrived at the end came with that one.
    """
    timings = [Timing([], [], []) for _ in loads]
    for load in loads:
        run_round(world, load, 1)
    elapsed_s = sum(run_round(world, load, 1)[0] for load in loads)
    for _ in range(_agree(world, elapsed_s, repeats)):
        for load, timing in zip(loads, timings, strict=True):
            single_s, post_s = run_round(world, load, 1)
            timing.singles.append(single_s)
            timing.posts.append(post_s)
    _measure_windows(world, loads, timings)
    refresh()
    for load in loads:
        run_round(world, load, load.window)
    return timings


def _measure_windows(world: World, loads: Sequence[Load], timings: list[Timing]) -> None:
    """Time windows, where they hold more than one transfer; the first round of each is a warm-up."""
    for turn in range(WINDOWS + 1):
        for load, timing in zip(loads, timings, strict=True):
            if load.window > 1:
                elapsed_s, _ = run_round(world, load, load.window)
                timing.windows.extend([elapsed_s / load.window] if turn else [])


def _agree(world: World, elapsed_s: float, repeats: int) -> int:
    """Choose how often to repeat, the same on every rank."""
    affordable = int(SECONDS / max(elapsed_s, 1e-6))
    return int(world.share(float(max(FEWEST, min(repeats, affordable))))[0][0])
