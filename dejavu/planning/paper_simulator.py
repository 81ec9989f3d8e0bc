"""Simulate serving exactly as the DéjàVu paper's simulators do, so that its figures can be repeated.

The paper (Strati et al., ICML 2024, section 5 and Appendix B) takes events in first-in-first-out order, not by time.
As every pass visits all stages and a finished request is replaced at the queue's tail, the queue turns as a wheel:
in each round every slot does the same stage. So one pass of all slots is a short max-plus recurrence, and passes in
which nothing enters or leaves only shift the state: those are skipped in one step.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from dejavu.errors import UsageError
from dejavu.planning.lengths import Lengths
from dejavu.planning.times import check_times

MAX_REQUESTS = 512
MIN_TOKENS, MAX_TOKENS = 2, 1000
SEED = 42
SAME_S = 1e-10  # two shifts closer than this are one


@dataclass(frozen=True, slots=True)
class PaperResult:
    """Hold what the paper's simulators report; arrays are float64 [num_requests], in seconds (tokens: int)."""

    arrival_s: NDArray[np.float64]
    end_s: NDArray[np.float64]
    tokens: NDArray[np.int64]

    @property
    def makespan_s(self) -> float:
        """Give the time at which the last request ends."""
        return float(self.end_s.max())

    @property
    def throughput_requests_per_s(self) -> float:
        """Give requests over makespan."""
        return len(self.end_s) / self.makespan_s

    @property
    def latency_per_token_s(self) -> NDArray[np.float64]:
        """Give each request's time from arrival to end over its tokens."""
        return (self.end_s - self.arrival_s) / self.tokens


def simulate_colocated(
    lengths: Sequence[Lengths], *, stages: int, prompt_s: float, token_s: float, rate: float = 0.0
) -> PaperResult:
    """Run the paper's baseline: `stages` stages do prompts and tokens, with one request in flight for each.

    Times are of one pass through one stage; `rate` is requests per second of `stages` machines each, 0 is all at once.
    Raise UsageError for fewer requests than stages and for impossible times.
    """
    tokens = paper_tokens(lengths, stages)
    check_times(prompt_s=prompt_s, token_s=token_s, rate=rate)
    arrival = paper_arrivals(len(tokens), stages, rate)
    seeds = [slot * prompt_s for slot in range(stages)]
    wheel = Wheel(stages, prompt_s, token_s)
    end = wheel.run(seeds, [count + 1 for count in tokens], arrival)
    return make_result(arrival, end, tokens)


def simulate_disaggregated(
    lengths: Sequence[Lengths],
    *,
    prompt_stages: int,
    token_stages: int,
    prompt_s: float,
    token_s: float,
    cache_s: float = 0.0,
    rate: float = 0.0,
) -> PaperResult:
    """Run the paper's DéjàVu: prompts on their own stages, whose KV takes `cache_s` per stage to reach token stages."""
    tokens = paper_tokens(lengths, token_stages)
    check_times(prompt_s=prompt_s, token_s=token_s, cache_s=cache_s, rate=rate)
    check_stages(prompt_stages)
    arrival = paper_arrivals(len(tokens), prompt_stages + token_stages, rate)
    ready, free = [], 0.0
    for arrived in arrival:
        start = max(arrived, free)
        free = start + prompt_s
        ready.append(start + prompt_stages * (prompt_s + cache_s))
    wheel = Wheel(token_stages, token_s, token_s)
    end = wheel.run(ready[:token_stages], tokens, ready)
    return make_result(arrival, end, tokens)


def paper_tokens(lengths: Sequence[Lengths], stages: int) -> list[int]:
    """Take the output lengths of the first 512 requests, clamped to 2 … 1000."""
    check_stages(stages)
    tokens = [min(max(request.output_tokens, MIN_TOKENS), MAX_TOKENS) for request in lengths[:MAX_REQUESTS]]
    if len(tokens) < stages:
        raise UsageError(
            f"{len(tokens)} requests cannot fill {stages} stages in paper mode: "
            "give at least as many requests as stages, or leave --paper out"
        )
    return tokens


def paper_arrivals(num_requests: int, group: int, rate: float) -> list[float]:
    """Draw arrivals (seconds): groups of `group` requests with exponential gaps; what is left over comes at 0."""
    arrival = [0.0] * num_requests
    if not rate:
        return arrival
    gaps = np.random.RandomState(SEED).exponential(1 / rate, size=num_requests)
    now = 0.0
    for index in range(1, num_requests // group):
        now += float(gaps[index - 1])
        arrival[index * group : (index + 1) * group] = [now] * group
    return arrival


def check_stages(stages: int) -> None:
    """Raise UsageError for a pipeline without stages."""
    if stages < 1:
        raise UsageError(f"{stages} stages cannot serve: give at least 1")


def make_result(arrival: list[float], end: list[float], tokens: list[int]) -> PaperResult:
    """Pack lists into arrays."""
    return PaperResult(np.array(arrival), np.array(end), np.array(tokens))


class Wheel:
    """Turn slots through stages; the first pass of a request takes `first_s` in each stage, further ones `token_s`."""

    def __init__(self, stages: int, first_s: float, token_s: float) -> None:
        self.clocks = [0.0] * stages
        self.first_s = first_s
        self.token_s = token_s
        self.requests: list[int] = []  # by slot
        self.events: list[float] = []  # by slot: when its next event may start
        self.passes: list[int] = []  # by slot: passes that its request still needs
        self.durations: list[float] = []  # by slot: of its next pass, in each stage

    def run(self, seeds: Sequence[float], passes: Sequence[int], available: Sequence[float]) -> list[float]:
        """Serve all requests and give their ends; the first enter at `seeds`, later ones once `available`."""
        end = [0.0] * len(passes)
        waiting = len(seeds)
        self.requests, self.events, self.passes = list(range(waiting)), list(seeds), list(passes[:waiting])
        self.durations = [self.first_s] * waiting
        while self.requests:
            self.turn()
            for slot in [slot for slot, left in enumerate(self.passes) if not left]:
                end[self.requests[slot]] = self.events[slot]
                if waiting < len(passes):
                    self.enter(slot, waiting, passes[waiting], available[waiting])
                    waiting += 1
            if 0 in self.passes:
                self.drop_finished()
        return end

    def enter(self, slot: int, request: int, passes: int, available_s: float) -> None:
        """Put the next request into a slot whose own has ended."""
        self.requests[slot], self.passes[slot] = request, passes
        self.events[slot] = max(self.clocks[0], available_s)
        self.durations[slot] = self.first_s

    def turn(self) -> None:
        """Do passes of every slot until one has none left; skip passes that only shift the state."""
        fewest = min(self.passes)
        self.passes = [left - fewest for left in self.passes]
        self.step()
        self.durations = [self.token_s] * len(self.events)
        for done in range(2, fewest + 1):
            state = self.events + self.clocks
            self.step()
            if self.is_steady(state):
                self.shift(fewest - done)
                return

    def is_steady(self, before: list[float]) -> bool:
        """Tell whether the last pass only shifted the state, as then every further pass does."""
        shift = len(self.clocks) * self.token_s
        if abs(self.clocks[-1] - before[-1] - shift) >= SAME_S:
            return False
        return all(abs(now - was - shift) < SAME_S for now, was in zip(self.events + self.clocks, before, strict=True))

    def shift(self, passes: int) -> None:
        """Do `passes` passes at once in the steady state, where each takes a token time per stage."""
        shift = passes * len(self.clocks) * self.token_s
        self.events = [event + shift for event in self.events]
        self.clocks = [clock + shift for clock in self.clocks]

    def step(self) -> None:
        """Do one pass of every slot: T[slot, stage] = max(T[slot-1, stage], T[slot, stage-1]) + duration[slot]."""
        clocks = self.clocks
        stages = range(len(clocks))
        for slot, duration in enumerate(self.durations):
            now = self.events[slot]
            for stage in stages:
                clock = clocks[stage]
                if clock > now:
                    now = clock
                now += duration
                clocks[stage] = now
            self.events[slot] = now

    def drop_finished(self) -> None:
        """Take away the slots whose request ended when no other was waiting."""
        keep = [slot for slot, left in enumerate(self.passes) if left]
        self.requests = [self.requests[slot] for slot in keep]
        self.events = [self.events[slot] for slot in keep]
        self.passes = [self.passes[slot] for slot in keep]
        self.durations = [self.durations[slot] for slot in keep]
