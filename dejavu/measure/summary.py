"""Sum a run up in one row: throughput, latency percentiles, how long each stage stood idle."""

import math
from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from dejavu.measure.records import RequestRecord, StepRecord
from dejavu.request import FinishReason

NAN = float("nan")
LATENCIES = ("ttft_s", "tpot_s", "normalized_latency_s")
HANDOVERS = ("handover_s", "row_wait_s")


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
    ended = [r for r in requests if r.finish_reason not in (None, FinishReason.CANCELLED)]
    return Summary(
        requests=len(ended),
        good_requests=(limits or Limits()).count(ended),
        cancelled_requests=sum(r.finish_reason is FinishReason.CANCELLED for r in requests),
        prompt_tokens=sum(r.prompt_tokens for r in requests if r.output_tokens),
        output_tokens=sum(r.output_tokens for r in requests),
        makespan_s=makespan(requests),
        latencies={name: percentiles([getattr(r, name) for r in ended]) for name in (*LATENCIES, *HANDOVERS)},
        stage_idle_fractions=tuple(idle_fractions(steps, num_stages)),
        peak_kv_bytes=peak_kv_bytes,
        swap_stall_ms=mean(step.swap_stall_ms for step in steps),
    )


def makespan(requests: Sequence[RequestRecord]) -> float:
    """Give the seconds from the first scheduled arrival to the last request's end; NaN if none has ended."""
    finishes = [r.finish_s for r in requests if r.finish_s == r.finish_s]
    return max(finishes) - min(r.arrival_s for r in requests) if finishes else NAN


def percentiles(values: Iterable[float]) -> Percentiles:
    """Give percentiles with linear interpolation between neighbours, over the values that are numbers."""
    measured = np.array(list(values), dtype=np.float64)
    measured = measured[~np.isnan(measured)]
    return Percentiles(*np.percentile(measured, (50, 95, 99)).tolist()) if measured.size else Percentiles(NAN, NAN, NAN)


def idle_fractions(steps: Sequence[StepRecord], num_stages: int) -> list[float]:
    """Give, per stage, the part of the run in which it did not compute: the mean over its tensor ranks.

    The run reaches from the first step's start to the last step's end, on any stage; a stage without steps has 1.
    """
    spans: dict[int, dict[int, list[tuple[float, float]]]] = {stage: defaultdict(list) for stage in range(num_stages)}
    for step in steps:
        spans[step.stage][step.rank].append((step.start_s, step.compute_end_s))
    window = max(s.end_s for s in steps) - min(s.start_s for s in steps) if steps else 0.0
    if window <= 0:
        return [NAN] * num_stages
    return [1 - mean(covered(np.array(rank)) for rank in ranks.values()) / window for ranks in spans.values()]


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
