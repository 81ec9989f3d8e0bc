"""Sum a run up in one row: throughput, latency percentiles, how long each stage stood idle."""

import math
from array import array
from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from dejavu.measure.records import RequestRecord, StepRecord
from dejavu.request import FinishReason

NAN = float("nan")
LATENCIES = ("ttft_s", "tpot_s", "normalized_latency_s")
HANDOVERS = ("handover_s", "row_wait_s")
MEASURED = (*LATENCIES, *HANDOVERS)


class Percentiles(NamedTuple):
    """Hold three percentiles of a latency, in seconds; NaN where nothing was measured."""

    p50: float
    p95: float
    p99: float


@dataclass(frozen=True, slots=True)
class Limits:
    """Say what a request has to keep to count as goodput, in seconds."""

    ttft_s: float = math.inf
    tpot_s: float = math.inf

    @classmethod
    def of_ms(cls, ttft_ms: float | None, tpot_ms: float | None) -> "Limits":
        """Take limits in ms, where there are any."""
        return cls(*(math.inf if limit is None else limit / 1e3 for limit in (ttft_ms, tpot_ms)))

    def count(self, requests: Iterable[RequestRecord]) -> int:
        """Count the requests that keep both limits; one of a single token has no time per later one to keep."""
        return sum(r.ttft_s <= self.ttft_s and not r.tpot_s > self.tpot_s for r in requests)


@dataclass(frozen=True, slots=True)
class Summary:
    """Sum up a run.

    The makespan reaches from the first scheduled arrival to the last token. Requests and latencies are those of
    requests that ran to their end (stop or length); the tokens are all that were made, cancelled requests' too, and
    the prompt tokens those of requests that got a first token. Good requests ran to their end within the limits.
    """

    requests: int
    good_requests: int
    cancelled_requests: int
    prompt_tokens: int
    output_tokens: int
    makespan_s: float
    latencies: dict[str, Percentiles]  # one for each of LATENCIES and HANDOVERS
    stage_idle_fractions: tuple[float, ...]
    peak_kv_bytes: int
    swap_stall_ms: float = 0.0  # what a pass waited for swapped KV, in the mean

    @property
    def requests_per_s(self) -> float:
        """Give the rate of requests that ran to their end; NaN for an empty run."""
        return self.requests / self.makespan_s if self.makespan_s > 0 else NAN

    @property
    def goodput_requests_per_s(self) -> float:
        """Give the rate of requests that kept the limits; NaN for an empty run."""
        return self.good_requests / self.makespan_s if self.makespan_s > 0 else NAN

    @property
    def tokens_per_s(self) -> float:
        """Give the rate of output tokens; NaN for an empty run."""
        return self.output_tokens / self.makespan_s if self.makespan_s > 0 else NAN

    def row(self) -> dict[str, int | float]:
        """Give the columns of summary.csv, in order."""
        counts = ("requests", "cancelled_requests", "prompt_tokens", "output_tokens")
        rates = ("makespan_s", "requests_per_s", "goodput_requests_per_s", "tokens_per_s")
        return {
            **{name: getattr(self, name) for name in (*counts, *rates)},
            **{f"{p}_{name}": value for name, at in self.latencies.items() for p, value in at._asdict().items()},
            **{f"stage{stage}_idle_fraction": idle for stage, idle in enumerate(self.stage_idle_fractions)},
            "peak_kv_bytes": self.peak_kv_bytes,
            "swap_stall_ms": self.swap_stall_ms,
        }


def summarize(
    requests: Sequence[RequestRecord],
    steps: Sequence[StepRecord],
    num_stages: int,
    peak_kv_bytes: int,
    limits: Limits | None = None,
) -> Summary:
    """Sum a run up; an empty run has zero counts and NaN for what has no meaning. Without limits all are good."""
    totals = Totals(limits or Limits(), num_stages)
    for request in requests:
        totals.take_request(request)
    for step in sorted(steps, key=lambda step: step.start_s):
        totals.take_step(step)
    return totals.summary(peak_kv_bytes)


@dataclass(slots=True)
class Totals:
    """Sum a run up record by record, without holding them; of requests the latencies stay, for the percentiles."""

    limits: Limits
    num_stages: int
    ended: int = 0
    good: int = 0
    cancelled: int = 0
    prompt_tokens: int = 0
    output_tokens: int = 0
    first_arrival_s: float = math.inf
    last_finish_s: float = -math.inf
    latencies: dict[str, "array[float]"] = field(default_factory=lambda: {n: array("d") for n in MEASURED})
    busy: dict[int, dict[int, "BusyTime"]] = field(default_factory=dict)  # by stage and rank
    first_start_s: float = math.inf
    last_end_s: float = -math.inf
    steps: int = 0
    stall_ms: float = 0.0

    def take_request(self, request: RequestRecord) -> None:
        """Add a request, ended or not."""
        self.prompt_tokens += request.prompt_tokens if request.output_tokens else 0
        self.output_tokens += request.output_tokens
        self.cancelled += request.finish_reason is FinishReason.CANCELLED
        self.first_arrival_s = min(self.first_arrival_s, request.arrival_s)
        if not math.isnan(request.finish_s):
            self.last_finish_s = max(self.last_finish_s, request.finish_s)
        if request.finish_reason in (None, FinishReason.CANCELLED):
            return
        self.ended += 1
        self.good += self.limits.count([request])
        for name, values in self.latencies.items():
            values.append(getattr(request, name))

    def take_step(self, step: StepRecord) -> None:
        """Add a pass; they come in the order in which they began, on each rank at least."""
        self.busy.setdefault(step.stage, defaultdict(BusyTime))[step.rank].take(step.start_s, step.compute_end_s)
        self.first_start_s = min(self.first_start_s, step.start_s)
        self.last_end_s = max(self.last_end_s, step.end_s)
        self.steps += 1
        self.stall_ms += step.swap_stall_ms

    def idle_fractions(self) -> Iterator[float]:
        """Give, per stage, the part of the time from the first to the last pass in which it did not compute."""
        window_s = self.last_end_s - self.first_start_s
        for stage in range(self.num_stages):
            ranks = self.busy.get(stage, {}).values()
            yield 1 - mean(rank.busy_s for rank in ranks) / window_s if window_s > 0 else NAN

    def summary(self, peak_kv_bytes: int) -> Summary:
        """Give the sums."""
        return Summary(
            requests=self.ended,
            good_requests=self.good,
            cancelled_requests=self.cancelled,
            prompt_tokens=self.prompt_tokens,
            output_tokens=self.output_tokens,
            makespan_s=self.last_finish_s - self.first_arrival_s if math.isfinite(self.last_finish_s) else NAN,
            latencies={name: percentiles(values) for name, values in self.latencies.items()},
            stage_idle_fractions=tuple(self.idle_fractions()),
            peak_kv_bytes=peak_kv_bytes,
            swap_stall_ms=self.stall_ms / self.steps if self.steps else 0.0,
        )


@dataclass(slots=True)
class BusyTime:
    """Measure the union of [start, end) intervals that come in the order of their starts."""

    busy_s: float = 0.0
    until_s: float = -math.inf

    def take(self, start_s: float, end_s: float) -> None:
        """Add an interval; what overlaps counts once."""
        self.busy_s += max(0.0, end_s - max(start_s, self.until_s))
        self.until_s = max(self.until_s, end_s)


def makespan(requests: Sequence[RequestRecord]) -> float:
    """Give the seconds from the first scheduled arrival to the last request's end; NaN if none has ended."""
    finishes = [r.finish_s for r in requests if r.finish_s == r.finish_s]
    return max(finishes) - min(r.arrival_s for r in requests) if finishes else NAN


def percentiles(values: Iterable[float]) -> Percentiles:
    """Give percentiles with linear interpolation between neighbours, over the values that are numbers."""
    measured = np.fromiter(values, np.float64)
    measured = measured[~np.isnan(measured)]
    return Percentiles(*np.percentile(measured, (50, 95, 99)).tolist()) if measured.size else Percentiles(NAN, NAN, NAN)


def idle_fractions(steps: Sequence[StepRecord], num_stages: int) -> list[float]:
    """Give, per stage, the part of the run in which it did not compute: the mean over its tensor ranks.

    The run reaches from the first step's start to the last step's end, on any stage; a stage without steps has 1.
    """
    totals = Totals(Limits(), num_stages)
    for step in sorted(steps, key=lambda step: step.start_s):
        totals.take_step(step)
    return list(totals.idle_fractions())


def mean(values: Iterable[float]) -> float:
    """Give the mean; 0 of nothing."""
    numbers = list(values)
    return sum(numbers) / len(numbers) if numbers else 0.0


def covered(spans: NDArray[np.float64]) -> float:
    """Measure the union of [start, end) intervals, given as an array [n, 2]; overlaps count once."""
    spans = spans[np.argsort(spans[:, 0])]
    reached = np.maximum.accumulate(spans[:, 1])
    begins = np.maximum(spans[1:, 0], reached[:-1])
    gains = np.maximum(spans[1:, 1] - begins, 0)
    return float(spans[0, 1] - spans[0, 0] + gains.sum())
