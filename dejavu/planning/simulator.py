"""Simulate serving: when each request gets its tokens, and how long each stage stands idle.

The model is the engine's: see `pipeline`. This module shares requests out among pipelines and gathers what happened.
"""

import heapq
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import numpy as np

from dejavu.errors import UsageError
from dejavu.measure.records import StepRecord
from dejavu.planning.flow import SAME_S
from dejavu.planning.lengths import Lengths
from dejavu.planning.machine_code import is_worth_it, simulate_as_machine_code
from dejavu.planning.microbatch import INFINITY, Job, Microbatch
from dejavu.planning.pipeline import Pipeline
from dejavu.planning.result import Result
from dejavu.planning.setup import Failure, PipelineSetup, Setup

NAN = float("nan")


def simulate(
    setup: Setup, requests: Sequence[Lengths], *, record: bool = False, machine_code: bool | None = None
) -> Result:
    """Serve `requests` on the pipelines of `setup`; `record` keeps every pass, which takes longer.

    `machine_code` says whether to run as such where that can be done; None does so where it is worth loading.
    Raise UsageError for no requests, or one with an impossible length or arrival.
    """
    checked = check_requests(requests)
    if not record and (is_worth_it(len(checked)) if machine_code is None else machine_code):
        result = simulate_as_machine_code(setup, checked)
        if result is not None:
            return result
    return Simulation(setup, checked, record=record or bool(setup.failures)).run(record)


def check_requests(requests: Sequence[Lengths]) -> tuple[Lengths, ...]:
    """Let each request have at least one prompt and one output token; raise UsageError for what cannot be."""
    if not requests:
        raise UsageError("there are no requests to simulate: give a trace with at least one")
    for index, request in enumerate(requests):
        if request.prompt_tokens < 0 or request.output_tokens < 0 or not 0 <= request.arrival_s < INFINITY:
            raise UsageError(
                f"request {index} has {request.prompt_tokens} prompt tokens, {request.output_tokens} output tokens "
                f"and arrives at {request.arrival_s:g} s: none of them can be negative"
            )
    return tuple(Lengths(max(1, p), max(1, o), float(a)) for p, o, a in requests)


@dataclass(slots=True)
class Pool:
    """Let pipelines of one role share a queue, first come first served."""

    pipelines: list[Pipeline]
    waiting: list[tuple[float, int, Job]] = field(default_factory=list)  # a heap of (time, order, job)
    num_free: int = 0
    num_rows: int = 0

    def __post_init__(self) -> None:
        self.num_rows = self.num_free = sum(m.num_rows for p in self.pipelines for m in p.microbatches)

    @property
    def next_s(self) -> float:
        """Give when the next request can take a row, as far as rows are concerned."""
        return self.waiting[0][0] if self.num_free and self.waiting else INFINITY

    def add(self, time_s: float, job: Job) -> None:
        """Let a request wait from `time_s` on."""
        heapq.heappush(self.waiting, (time_s, job.order, job))

    def emptiest(self) -> tuple[Pipeline, Microbatch]:
        """Give the pipeline with the fewest requests that has a free row, and its microbatch with the fewest."""
        pipeline = self.pipelines[0]
        if len(self.pipelines) > 1:
            pipeline = min([p for p in self.pipelines if p.num_seated < p.num_rows], key=lambda p: p.num_seated)
        return pipeline, max(pipeline.microbatches, key=Microbatch.count_free)


class Simulation:
    """Hold the pipelines and queues of one run, and drive them in the order of time."""

    def __init__(self, setup: Setup, requests: tuple[Lengths, ...], *, record: bool) -> None:
        self.setup = setup
        self.requests = requests
        self.pipelines = [Pipeline(pipeline, record=record) for pipeline in setup.pipelines]
        first = [p for p in self.pipelines if p.setup.role != "token"]
        self.entry = Pool(first)  # where requests arrive
        self.tokens = Pool([p for p in self.pipelines if p.setup.role == "token"])
        self.pool_of = {id(p): self.tokens if p.setup.role == "token" else self.entry for p in self.pipelines}
        self.failures = sorted(setup.failures, key=lambda failure: failure.time_s)
        self.now_s = 0.0
        self.admitted_s = [NAN] * len(requests)
        self.first_token_s = [NAN] * len(requests)
        self.kv_arrived_s = [NAN] * len(requests)
        self.token_start_s = [NAN] * len(requests)
        self.finish_s = [NAN] * len(requests)
        self.num_reserved = 0  # requests that hold memory of the token side
        for order, index in enumerate(sorted(range(len(requests)), key=lambda i: requests[i].arrival_s)):
            prompt, output, arrival = requests[index]
            self.entry.add(arrival, Job(index, prompt, output, prompt, order))

    def run(self, record: bool) -> Result:
        """Drive everything to its end."""
        times = [pipeline.next_s for pipeline in self.pipelines]
        while True:
            first_s = min(times)
            pool, admission_s = self.next_admission()
            failure_s = self.failures[0].time_s if self.failures else INFINITY
            if failure_s <= min(first_s, admission_s) < INFINITY:
                changed = self.fail(self.failures.pop(0))
            elif admission_s <= first_s and admission_s < INFINITY and not self.is_return_due(times, admission_s):
                changed = self.admit(pool, admission_s)
            elif first_s < INFINITY:
                changed = times.index(first_s)
                others_s = min(times[:changed] + times[changed + 1 :], default=INFINITY)
                self.drive(self.pipelines[changed], min(others_s, admission_s, failure_s), failure_s)
            else:
                return self.result(record)
            times[changed] = self.pipelines[changed].next_s

    def is_return_due(self, times: list[float], admission_s: float) -> bool:
        """Tell whether a pass of the pipeline that is next ends just now, which may free a better row."""
        first_s = min(times)
        if len(times) == 1 or first_s > max(admission_s, self.now_s) + SAME_S:
            return False
        return self.pipelines[times.index(first_s)].next_is_return

    def next_admission(self) -> tuple[Pool, float]:
        """Give the pool that next seats a request, and when."""
        entry_s = self.entry.next_s if self.may_prompt() else INFINITY
        tokens_s = self.tokens.next_s
        return (self.tokens, tokens_s) if tokens_s <= entry_s else (self.entry, entry_s)

    def may_prompt(self) -> bool:
        """Tell whether the token side has memory for the next prompt; one that ends with its first token needs none."""
        ahead = self.setup.prompt_ahead
        if ahead is None or not self.setup.is_disaggregated or not self.entry.waiting:
            return True
        return self.entry.waiting[0][2].tokens_left == 1 or self.num_reserved < self.tokens.num_rows + ahead

    def admit(self, pool: Pool, time_s: float) -> int:
        """Seat the first waiting request; give the index of its pipeline."""
        self.now_s = max(self.now_s, time_s)
        _, _, job = heapq.heappop(pool.waiting)
        pipeline, microbatch = pool.emptiest()
        pipeline.seat(microbatch, job, self.now_s + self.setup.admission_s)
        pool.num_free -= 1
        if pool is self.entry:
            job.reserves = job.tokens_left > 1
            self.num_reserved += job.reserves
        if self.admitted_s[job.request] != self.admitted_s[job.request]:
            self.admitted_s[job.request] = self.now_s
        return self.pipelines.index(pipeline)

    def drive(self, pipeline: Pipeline, until_s: float, failure_s: float) -> None:
        """Let a pipeline do its next events, and take what comes out."""
        pipeline.run(until_s, min(failure_s, self.horizon_s(pipeline)))
        for time_s, job in pipeline.begun:
            if self.token_start_s[job.request] != self.token_start_s[job.request]:
                self.token_start_s[job.request] = time_s
        pipeline.begun.clear()
        for time_s, job in pipeline.done:
            self.now_s = max(self.now_s, time_s)
            if self.first_token_s[job.request] != self.first_token_s[job.request]:
                self.first_token_s[job.request] = time_s - pipeline.return_s
            if not job.tokens_left:
                self.finish_s[job.request] = time_s - pipeline.return_s
                self.num_reserved -= job.reserves
            elif pipeline.setup.role == "prompt":
                self.hand_over(time_s + self.setup.cache_s, job)
            else:
                continue
            pipeline.num_seated -= 1
            self.pool_of[id(pipeline)].num_free += 1
        pipeline.done.clear()

    def hand_over(self, time_s: float, job: Job) -> None:
        """Let a request wait for a token row from `time_s` on, when its KV has arrived."""
        self.tokens.add(time_s, job)
        if self.kv_arrived_s[job.request] != self.kv_arrived_s[job.request]:
            self.kv_arrived_s[job.request] = time_s

    def horizon_s(self, pipeline: Pipeline) -> float:
        """Give the time before which no request can come into a pipeline."""
        pool = self.pool_of[id(pipeline)]
        if not pool.num_free:
            return INFINITY
        first_s = pool.waiting[0][0] if pool.waiting else INFINITY
        if pool is self.entry:
            return first_s
        return min([first_s, self.entry.next_s, *[other.next_s for other in self.entry.pipelines]])

    def fail(self, failure: Failure) -> int:
        """Let a pipeline fail; give its index."""
        pipeline = self.pipelines[failure.pipeline]
        for job in pipeline.fail(failure):
            pipeline.num_seated -= 1
            self.tokens.num_free += 1
            self.num_reserved -= job.reserves
            self.entry.add(failure.resume_s, job)
        self.now_s = max(self.now_s, failure.time_s)
        return failure.pipeline

    def result(self, record: bool) -> Result:
        """Gather what happened."""
        return Result(
            requests=self.requests,
            admitted_s=np.array(self.admitted_s),
            first_token_s=np.array(self.first_token_s),
            kv_arrived_s=np.array(self.kv_arrived_s),
            token_start_s=np.array(self.token_start_s),
            finish_s=np.array(self.finish_s),
            stage_busy_s=tuple(busy_s(pipeline) for pipeline in self.pipelines),
            stall_s=sum(pipeline.stall_s for pipeline in self.pipelines),
            num_passes=sum(pipeline.num_passes for pipeline in self.pipelines),
            steps=tuple(self.step_records()) if record else (),
        )

    def step_records(self) -> Iterator[StepRecord]:
        """Give every pass as a run would record it; ranks count the stages of all pipelines from 1."""
        rank = 1
        for pipeline in self.pipelines:
            for done in sorted(pipeline.passes, key=lambda done: done.start_s):
                stage, microbatch, step, kind, num_rows, num_tokens, start_s, end_s = done
                place = rank + stage, stage, 0, microbatch, step, kind, num_rows, num_tokens
                yield StepRecord(*place, start_s, end_s, end_s)
            rank += pipeline.setup.stages


def busy_s(pipeline: Pipeline) -> tuple[float, ...]:
    """Add up what each stage of a pipeline worked; a pass that a failure cut short counts up to there."""
    stages = range(pipeline.setup.stages)
    if not pipeline.record:
        return tuple(pipeline.work_s for _ in stages)
    busy = [0.0 for _ in stages]
    for done in pipeline.passes:
        busy[done.stage] += done.end_s - done.start_s
    return tuple(busy)


def colocated(pipeline: PipelineSetup, replicas: int = 1, failures: tuple[Failure, ...] = ()) -> Setup:
    """Describe `replicas` colocated pipelines behind one queue."""
    if replicas < 1:
        raise UsageError(f"{replicas} replicas cannot serve: give at least 1")
    return Setup((pipeline,) * replicas, failures=failures)
