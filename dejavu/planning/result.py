"""Hold what a simulation gave, and what follows from it."""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from dejavu.measure.records import RequestRecord, StepRecord
from dejavu.planning.lengths import Lengths
from dejavu.planning.microbatch import INFINITY
from dejavu.request import FinishReason

NAN = float("nan")
Floats = NDArray[np.float64]


@dataclass(frozen=True, slots=True)
class Result:
    """Hold what a simulation gave; arrays are [num_requests], times in seconds after the start."""

    requests: tuple[Lengths, ...]
    admitted_s: Floats
    first_token_s: Floats
    kv_arrived_s: Floats  # when the token pipeline had the prompt's KV; NaN where nothing is handed over
    token_start_s: Floats  # when the pass for the second token began; NaN where there is none
    finish_s: Floats
    stage_busy_s: tuple[tuple[float, ...], ...]  # by pipeline and stage
    stall_s: float  # spent waiting for swapped KV, over all stages
    num_passes: int
    steps: tuple[StepRecord, ...] = ()  # one per pass and stage, if they were recorded

    @property
    def arrival_s(self) -> Floats:
        """Give when each request arrived."""
        return np.array([request.arrival_s for request in self.requests])

    @property
    def output_tokens(self) -> NDArray[np.int64]:
        """Give the tokens of each request."""
        return np.array([request.output_tokens for request in self.requests])

    @property
    def makespan_s(self) -> float:
        """Give the time from the first arrival to the last token."""
        return float(self.finish_s.max() - self.arrival_s.min())

    @property
    def requests_per_s(self) -> float:
        """Give requests over makespan."""
        return len(self.requests) / self.makespan_s if self.makespan_s else INFINITY

    @property
    def tokens_per_s(self) -> float:
        """Give output tokens over makespan."""
        return float(self.output_tokens.sum()) / self.makespan_s if self.makespan_s else INFINITY

    @property
    def ttft_s(self) -> Floats:
        """Give each request's time to its first token."""
        return self.first_token_s - self.arrival_s

    @property
    def tpot_s(self) -> Floats:
        """Give each request's mean time per token after the first; NaN where there is only one."""
        later = np.where(self.output_tokens > 1, self.output_tokens - 1.0, NAN)
        return (self.finish_s - self.first_token_s) / later

    @property
    def latency_per_token_s(self) -> Floats:
        """Give each request's time from arrival to end over its tokens."""
        return (self.finish_s - self.arrival_s) / self.output_tokens

    @property
    def idle_fractions(self) -> tuple[tuple[float, ...], ...]:
        """Give the part of the makespan that each stage of each pipeline does nothing."""
        span = self.makespan_s or 1.0
        return tuple(tuple(1 - busy / span for busy in stages) for stages in self.stage_busy_s)

    def goodput(self, ttft_s: float = INFINITY, tpot_s: float = INFINITY) -> float:
        """Give the requests per second that meet both limits."""
        good = (self.ttft_s <= ttft_s) & ~(self.tpot_s > tpot_s)
        return float(good.sum()) / self.makespan_s if self.makespan_s else INFINITY

    def request_records(self) -> list[RequestRecord]:
        """Give the rows of requests.csv."""
        names = ("admitted_s", "first_token_s", "kv_arrived_s", "token_start_s", "finish_s", "ttft_s", "tpot_s")
        columns = {name: getattr(self, name).tolist() for name in names}
        columns |= {
            "normalized_latency_s": self.latency_per_token_s.tolist(),
            "handover_s": (self.kv_arrived_s - self.first_token_s).tolist(),
            "row_wait_s": (self.token_start_s - self.kv_arrived_s).tolist(),
        }
        return [
            RequestRecord(
                request_id=str(index),
                **request._asdict(),
                **{name: column[index] for name, column in columns.items()},
                finish_reason=FinishReason.LENGTH,
            )
            for index, request in enumerate(self.requests)
        ]
