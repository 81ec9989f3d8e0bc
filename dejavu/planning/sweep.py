"""Repeat the paper's Appendix B: makespan and cost of one workload on 1 … n machines, layout against layout."""

from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, replace
from multiprocessing import get_context

from dejavu.errors import UsageError
from dejavu.planning.machine_code import is_worth_it
from dejavu.planning.planner import Layout, LayoutKind, Task, TimeSource, make_setup, misfit
from dejavu.planning.simulator import simulate
from dejavu.planning.times import StageTimes, Tabled, TimeTable, constant

NEAR = 1.15  # of the most even split's busier side: the next one may be better by so much in a simulation
KINDS: tuple[LayoutKind, ...] = ("colocated", "data-parallel", "disaggregated")


@dataclass(frozen=True, slots=True)
class AverageSteps:
    """Let every token step take as long as one of full rows with an average context, as the paper's simulator does."""

    times: StageTimes
    step_s: float

    @property
    def context_step(self) -> int:
        """Give 0: a token step always takes the same."""
        return 0

    @property
    def steps_alike(self) -> bool:
        """Tell that every token step takes the same time."""
        return True

    def prompt_s(self, num_tokens: int, num_rows: int, share: float = 1.0) -> float:
        """Give the time of a prompt pass."""
        return self.times.prompt_s(num_tokens, num_rows, share)

    def token_s(self, num_rows: int, context: float) -> float:
        """Give the time of a token step."""
        return self.step_s

    def table(self) -> TimeTable:
        """Take the source's prompts, if it has a table."""
        if not isinstance(self.times, Tabled):
            raise UsageError(f"{type(self.times).__name__} has no table of times to average: measure a profile")
        return replace(self.times.table(), token=constant(self.step_s), span=0)


@dataclass(frozen=True, slots=True)
class AverageSource:
    """Average the token steps of another source's times."""

    source: TimeSource
    batch: int
    context: float

    @property
    def tensor_degrees(self) -> Sequence[int]:
        """Give the source's."""
        return self.source.tensor_degrees

    def stage(self, stages: int, tp: int, stream_slowdown: float = 1.0) -> StageTimes:
        """Give the times of the fullest stage."""
        times = self.source.stage(stages, tp, stream_slowdown)
        return AverageSteps(times, times.token_s(self.batch, self.context))


@dataclass(frozen=True, slots=True)
class SweepRow:
    """Hold one point: `speedup` is over the colocated pipeline with the same machines and batch; NaN without one."""

    machines: int
    layout: LayoutKind
    prompt_stages: int
    token_stages: int
    replicas: int
    batch: int
    makespan_s: float
    requests_per_s: float
    latency_per_token_s_median: float
    cost: float
    speedup: float


def sweep(
    task: Task, machines: Sequence[int], cost_per_hour: float = 0.0, tp: int = 1, processes: int = 1
) -> list[SweepRow]:
    """Simulate each kind of layout on each number of machines at each batch that fits; a machine is a stage.

    `task.machine.devices` is not used. `cost` is the makespan of all machines, each at
    `cost_per_hour`.
    """
    code = is_worth_it(len(machines) * len(task.batches) * len(task.requests))
    points = [(task, count, batch, tp, cost_per_hour, code) for count in machines for batch in task.batches]
    if processes == 1:
        groups = [compare_kinds(*point) for point in points]
    else:
        with ProcessPoolExecutor(processes, mp_context=get_context("spawn")) as pool:
            columns = zip(*reversed(points), strict=True)  # the largest first, so that no process ends long after all
            groups = list(pool.map(compare_kinds, *columns))[::-1]
    return [row for group in groups for row in group]


def compare_kinds(
    task: Task, machines: int, batch: int, tp: int, cost_per_hour: float, machine_code: bool
) -> list[SweepRow]:
    """Give one point of each kind of layout, with its speed-up."""
    context = sum(r.prompt_tokens + r.output_tokens / 2 for r in task.requests) / len(task.requests)
    task = replace(task, times=AverageSource(task.times, batch, context))
    group = [row for kind in KINDS for row in point(task, machines, batch, kind, tp, cost_per_hour, machine_code)]
    base = next((row.makespan_s for row in group if row.layout == "colocated"), float("nan"))
    return [replace(row, speedup=base / row.makespan_s) for row in group]


def point(
    task: Task, machines: int, batch: int, kind: LayoutKind, tp: int, cost_per_hour: float, machine_code: bool
) -> Iterator[SweepRow]:
    """Give the best layout of one kind, if any fits."""
    rows = []
    for layout in candidates(task, machines, batch, kind, tp):
        result = simulate(make_setup(task, layout), task.requests, machine_code=machine_code)
        rows.append(
            SweepRow(
                machines=machines,
                layout=kind,
                prompt_stages=layout.prompt_stages,
                token_stages=layout.stages,
                replicas=layout.replicas,
                batch=batch,
                makespan_s=result.makespan_s,
                requests_per_s=result.requests_per_s,
                latency_per_token_s_median=float(sorted(result.latency_per_token_s)[len(result.requests) // 2]),
                cost=result.makespan_s / 3600 * machines * cost_per_hour,
                speedup=1.0,
            )
        )
    if rows:
        yield min(rows, key=lambda row: row.makespan_s)


def candidates(task: Task, machines: int, batch: int, kind: LayoutKind, tp: int) -> list[Layout]:
    """Give the layouts of a kind worth simulating: the shallowest replicas that fit, the most even splits."""
    depth = min(machines, task.shape.num_layers)
    if kind == "colocated":
        options = [Layout(depth, tp, batch=batch)]
    elif kind == "data-parallel":
        depths = [d for d in range(1, machines // 2 + 1) if machines % d == 0 and d <= depth]
        options = [Layout(d, tp, replicas=machines // d, batch=batch) for d in depths]
        return [layout for layout in options if not misfit(task, layout)][:1]
    else:
        splits = [Layout(machines - p, tp, prompt_stages=p, batch=batch) for p in range(1, machines)]
        options = [s for s in splits if max(s.stages, s.prompt_stages) <= task.shape.num_layers]
    fitting = [layout for layout in options if not misfit(task, layout)]
    fitting.sort(key=lambda layout: bottleneck_s(task, layout))
    return [layout for layout in fitting[:2] if bottleneck_s(task, layout) <= NEAR * bottleneck_s(task, fitting[0])]


def bottleneck_s(task: Task, layout: Layout) -> float:
    """Estimate the makespan: the busier of both sides, with average requests in full microbatches."""
    count = len(task.requests)
    prompt = sum(r.prompt_tokens for r in task.requests) / count
    output = sum(r.output_tokens for r in task.requests) / count
    passes = count / layout.batch
    token = passes * output * task.times.stage(layout.stages, layout.tp).token_s(layout.batch, prompt + output / 2)
    if not layout.prompt_stages:
        return token
    times = task.times.stage(layout.prompt_stages, layout.tp, task.stream_slowdown)
    return max(token, passes * times.prompt_s(int(prompt * layout.batch), layout.batch))
