"""Follow passes through a pipeline whose stages take equally long, in a time that does not grow with its depth.

A pass of duration d that may enter at time r leaves stage s at T(s) = max(T(s-1) + hop, free(s)) + d, where free(s) is
when the pass before it left stage s. Unrolled, free(s) is the largest of a few straight lines over s: one for each
earlier pass that was slower than all after it. So the state is those lines, steepest first.
"""

from typing import NamedTuple

SAME_S = 1e-10  # moments closer than this are one


class Flow:
    """Hold when each stage is free, as lines start + slope · stage; a pipeline that nobody has used is free at 0."""

    __slots__ = ("clock_s", "depth", "hop_s", "lines")

    def __init__(self, num_stages: int, hop_s: float = 0.0) -> None:
        self.depth = num_stages - 1
        self.hop_s = hop_s
        self.lines: list[tuple[float, float]] = []  # (when stage 0 is free, later by this per stage), steepest first
        self.clock_s = 0.0  # when stage 0 is free

    def push(self, ready_s: float, duration_s: float) -> float:
        """Send a pass that may start at `ready_s` through all stages; give when it leaves the last one."""
        depth, lines = self.depth, self.lines
        clock = (ready_s if ready_s > self.clock_s else self.clock_s) + duration_s
        slope = duration_s + self.hop_s
        end = last = clock + slope * depth
        self.clock_s = clock
        self.lines = kept = []
        # Earlier, slower passes whose line still ends above this one's go on delaying what follows.
        for start, steeper in lines:
            if steeper <= slope:
                break
            late = start + duration_s + steeper * depth
            if late > end + SAME_S:
                kept.append((start + duration_s, steeper))
                if late > last:
                    last = late
        kept.append((clock, slope))
        return last

    def free_s(self, stage: int) -> float:
        """Give when a stage is free again."""
        return max((start + slope * stage for start, slope in self.lines), default=0.0)

    def delay_until(self, time_s: float) -> None:
        """Forget what was under way, and keep every stage from starting anything before `time_s`."""
        self.lines = [(time_s, 0.0)]
        self.clock_s = time_s

    def shift(self, seconds: float) -> None:
        """Move the whole state later."""
        self.lines = [(start + seconds, slope) for start, slope in self.lines]
        self.clock_s += seconds

    def state(self) -> list[float]:
        """Give the moments that the future depends on."""
        depth = self.depth
        return [moment for start, slope in self.lines for moment in (start, start + slope * depth)]


class Moves(NamedTuple):
    """Give what moves beside a pass in each stage, in seconds of its link: swapped KV in and out, and to a replica."""

    fetch_s: float = 0.0
    flush_s: float = 0.0
    copy_s: float = 0.0


NO_MOVES = Moves()


class StagedFlow:
    """Follow passes stage by stage, as `Flow` does at once, with the fetches of swapped KV and a list of what was when.

    A device holds the KV of `resident` microbatches: the fetch for a pass begins when the pass so many before it has
    ended, and its new tokens are flushed. A replica's copies follow one another; a pass waits for that of the pass
    two before it.
    """

    __slots__ = ("clocks", "copied_s", "hop_s", "left_s", "link_free_s", "spans", "stall_s")

    def __init__(self, num_stages: int, hop_s: float = 0.0, resident: int = 2) -> None:
        self.clocks = [0.0] * num_stages
        self.link_free_s = [0.0] * num_stages
        self.left_s = [[0.0] * resident for _ in range(num_stages)]  # when the slots of the last passes were free
        self.copied_s = [(0.0, 0.0)] * num_stages  # when the copies of the last but one and of the last pass are done
        self.hop_s = hop_s
        self.stall_s = 0.0  # spent waiting for fetches and copies, over all stages
        self.spans: list[tuple[float, float]] = []  # of the last pass, by stage

    @property
    def clock_s(self) -> float:
        """Give when stage 0 is free."""
        return self.clocks[0]

    def push(self, ready_s: float, duration_s: float, moves: Moves = NO_MOVES) -> float:
        """Send a pass through all stages, its KV moved in each; give when it leaves the last one."""
        now = ready_s - self.hop_s
        self.spans = []
        for stage, clock in enumerate(self.clocks):
            start = max(now + self.hop_s, clock)
            free = self.moved_s(stage, moves)
            self.stall_s += max(0.0, free - start)
            start = max(start, free)
            now = start + duration_s
            self.left_s[stage] = [*self.left_s[stage][1:], now + moves.flush_s]
            if moves.copy_s:
                copied = max(self.copied_s[stage][1], now) + moves.copy_s
                self.copied_s[stage] = self.copied_s[stage][1], copied
            self.clocks[stage] = now
            self.spans.append((start, now))
        return now

    def moved_s(self, stage: int, moves: Moves) -> float:
        """Give when a pass's KV is in a stage, and there is room for the copy of its new tokens."""
        free = self.copied_s[stage][0] if moves.copy_s else 0.0
        if not moves.fetch_s:
            return free
        self.link_free_s[stage] = max(self.link_free_s[stage], self.left_s[stage][0]) + moves.fetch_s
        return max(free, self.link_free_s[stage])

    def free_s(self, stage: int) -> float:
        """Give when a stage is free again."""
        return self.clocks[stage]

    def delay_until(self, time_s: float) -> None:
        """Forget what was under way, and keep every stage from starting anything before `time_s`."""
        self.clocks = [time_s] * len(self.clocks)
        self.link_free_s = list(self.clocks)
        self.left_s = [[time_s] * len(left) for left in self.left_s]
        self.copied_s = [(time_s, time_s)] * len(self.clocks)

    def shift(self, seconds: float) -> None:
        """Move the whole state later."""
        self.clocks = [clock + seconds for clock in self.clocks]
        self.link_free_s = [moment + seconds for moment in self.link_free_s]
        self.left_s = [[moment + seconds for moment in left] for left in self.left_s]
        self.copied_s = [(one + seconds, other + seconds) for one, other in self.copied_s]

    def state(self) -> list[float]:
        """Give the moments that the future depends on while every fetch is done before it is needed."""
        return list(self.clocks)
