"""Search for the layout that serves a workload best: every one that fits in memory, scored by the simulator."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal, Protocol

from dejavu.errors import CapacityError, ConfigError, UsageError
from dejavu.planning.lengths import Lengths
from dejavu.planning.profile import Profile, ProfileTimes
from dejavu.planning.result import Result
from dejavu.planning.setup import PipelineRole, PipelineSetup, Setup, Swap
from dejavu.planning.shape import ModelShape
from dejavu.planning.simulator import simulate
from dejavu.planning.times import Line, StageTimes, TimeTable, check_times, constant

INFINITY = float("inf")
GB = 1e9
ADMISSION_S = 0.5e-3  # from the controller to stage 0, as measured between ranks of one host
RESIDENT = 2  # microbatches on the device, with swapping
BATCHES = (1, 2, 4, 8, 16, 32, 64)

LayoutKind = Literal["colocated", "data-parallel", "disaggregated"]


@dataclass(frozen=True, slots=True)
class Machine:
    """Describe the hardware: devices of `memory_bytes`, and the host link that swapping uses (bytes/s)."""

    devices: int
    memory_bytes: float
    host_bandwidth: float = 0.0

    def __post_init__(self) -> None:
        if self.devices < 1 or not self.memory_bytes > 0:
            raise ConfigError(
                f"{self.devices} devices of {self.memory_bytes / GB:g} GB serve nothing: give both above 0"
            )


class TimeSource(Protocol):
    """Give the times of a stage, for every way to cut the model."""

    @property
    def tensor_degrees(self) -> Sequence[int]:
        """Give the tensor degrees whose times are known."""

    def stage(self, stages: int, tp: int, stream_slowdown: float = 1.0) -> StageTimes:
        """Give the times of the fullest of `stages` stages of `tp` devices each."""


@dataclass(frozen=True, slots=True)
class ProfiledTimes:
    """Take times from a profile, for a model of `num_layers` layers."""

    profile: Profile
    num_layers: int

    @property
    def tensor_degrees(self) -> Sequence[int]:
        """Give the measured ones."""
        return self.profile.tensor_degrees

    def stage(self, stages: int, tp: int, stream_slowdown: float = 1.0) -> StageTimes:
        """Give the times of the fullest stage."""
        return ProfileTimes(self.profile, self.num_layers, stages, tp, stream_slowdown)


@dataclass(frozen=True, slots=True)
class ScaledTimes:
    """Scale two given times of a whole pass: prompts with their tokens, token steps not at all."""

    prompt_s_per_token: float
    token_s_per_step: float
    parts: int = 1

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
        return self.prompt_s_per_token * num_tokens / self.parts

    def token_s(self, num_rows: int, context: float) -> float:
        """Give the time of a token step."""
        return self.token_s_per_step / self.parts

    def table(self) -> TimeTable:
        """Give the product of rows and their tokens, which four points say."""
        one = self.prompt_s_per_token / self.parts
        lines = tuple(Line(b, ((1.0, b * one), (2.0, 2 * b * one))) for b in (1.0, 2.0))
        return TimeTable(lines, constant(self.token_s_per_step / self.parts))


@dataclass(frozen=True, slots=True)
class GivenTimes:
    """Take Y and t as given for `batch` prompts of `prompt_len`: both are divided by the stages, and tp stays 1."""

    prompt_ms: float
    token_ms: float
    prompt_len: int
    batch: int

    def __post_init__(self) -> None:
        check_times(prompt_ms=self.prompt_ms, token_ms=self.token_ms)

    @property
    def tensor_degrees(self) -> Sequence[int]:
        """Give 1: nothing is known of others."""
        return (1,)

    def stage(self, stages: int, tp: int, stream_slowdown: float = 1.0) -> StageTimes:
        """Give the times of one of `stages` stages."""
        per_token = stream_slowdown * self.prompt_ms / (self.prompt_len * self.batch)
        return ScaledTimes(per_token / 1e3, self.token_ms / 1e3, stages)


@dataclass(frozen=True, slots=True)
class Layout:
    """Say how devices are used: stages of `tp` devices each, `batch` rows per microbatch, one microbatch per stage.

    `stages` are those of a colocated pipeline or of the token pipeline; `prompt_stages` 0 is colocated.
    """

    stages: int
    tp: int = 1
    prompt_stages: int = 0
    replicas: int = 1
    batch: int = 1
    swap: bool = False

    @property
    def kind(self) -> LayoutKind:
        """Name the kind of layout."""
        if self.prompt_stages:
            return "disaggregated"
        return "data-parallel" if self.replicas > 1 else "colocated"

    @property
    def handover_rows(self) -> int:
        """Count the requests beyond its rows that the token side has memory for: as many as fill the prompt side."""
        return self.prompt_stages * self.batch

    @property
    def num_devices(self) -> int:
        """Count the devices in use."""
        return self.replicas * (self.stages + self.prompt_stages) * self.tp

    @property
    def prompt_devices(self) -> int:
        """Count the devices that do prompts alone."""
        return self.prompt_stages * self.tp

    @property
    def token_devices(self) -> int:
        """Count the devices that do tokens."""
        return self.num_devices - self.prompt_devices


@dataclass(frozen=True, slots=True)
class Goal:
    """Score by requests per second; with limits, by those of requests that meet both."""

    ttft_s: float = INFINITY
    tpot_s: float = INFINITY

    def __post_init__(self) -> None:
        for name in ("ttft_s", "tpot_s"):
            if not getattr(self, name) > 0:
                raise ConfigError(f"no request keeps a limit {name} of {getattr(self, name):g}: give more than 0")

    @property
    def name(self) -> str:
        """Name the score."""
        return "throughput" if self.ttft_s == self.tpot_s == INFINITY else "goodput"

    def score(self, result: Result) -> float:
        """Give requests per second."""
        return result.goodput(self.ttft_s, self.tpot_s)


@dataclass(frozen=True, slots=True)
class Scored:
    """Hold a layout, what the simulator gave for it, and why it is not the best (empty for the best)."""

    layout: Layout
    score: float
    result: Result | None
    reason: str = ""


@dataclass(frozen=True, slots=True)
class Plan:
    """Hold all layouts, best first, those that do not fit last; and what can be said of the choice in words."""

    ranked: tuple[Scored, ...]
    goal: Goal
    verdicts: tuple[str, ...]

    @property
    def best(self) -> Scored:
        """Give the layout to use."""
        return self.ranked[0]


@dataclass(frozen=True, slots=True)
class Task:
    """Hold what a search is for."""

    shape: ModelShape
    machine: Machine
    times: TimeSource
    requests: tuple[Lengths, ...]
    dtype_bytes: int = 2
    stream_slowdown: float = 1.0
    batches: tuple[int, ...] = BATCHES

    def __post_init__(self) -> None:
        if not self.requests:
            raise UsageError("there are no requests to plan for: give at least one")
        if not self.stream_slowdown > 0:
            raise ConfigError(
                f"prompts cannot take {self.stream_slowdown:g} times as long: give more than 0, such as 1"
            )

    @property
    def row_len(self) -> int:
        """Give the tokens that a row has to hold."""
        return max(request.prompt_tokens + request.output_tokens for request in self.requests)


def plan(task: Task, goal: Goal | None = None) -> Plan:
    """Score every layout; raise CapacityError where none fits."""
    goal = goal or Goal()
    scored, misfits = [], []
    for layout in layouts(task):
        if reason := misfit(task, layout):
            misfits.append(Scored(layout, 0.0, None, reason))
        else:
            result = simulate(make_setup(task, layout), task.requests)
            scored.append(Scored(layout, goal.score(result), result))
    if not scored:
        least = min(misfits, key=lambda each: needed_bytes(task, each.layout)).reason
        raise CapacityError(f"no layout fits: even the leanest {least}; give more devices or memory")
    scored.sort(key=lambda each: (-each.score, each.layout.num_devices, each.layout.batch))
    ranked = [replace(each, reason=why_worse(each, scored[0], goal)) for each in scored]
    return Plan((*ranked, *misfits), goal, tuple(verdicts(task, scored, misfits)))


def layouts(task: Task) -> Iterator[Layout]:
    """Give every layout of the devices; swapping is tried where the same layout does not fit without."""
    for plain in plain_layouts(task):
        for batch in task.batches:
            layout = replace(plain, batch=batch)
            yield layout
            swapped = replace(layout, swap=True)
            if task.machine.host_bandwidth and layout.stages > RESIDENT and misfit(task, layout):
                yield swapped


def plain_layouts(task: Task) -> Iterator[Layout]:
    """Give every split of the devices, at every known tensor degree that divides the model."""
    for tp in task.times.tensor_degrees:
        stages = task.machine.devices // tp
        if stages < 1 or task.shape.kv_heads % tp:
            continue
        for replicas in range(1, stages + 1):
            if stages % replicas == 0 and stages // replicas <= task.shape.num_layers:
                yield Layout(stages // replicas, tp, replicas=replicas)
        for prompt_stages in range(1, stages):
            if max(prompt_stages, stages - prompt_stages) <= task.shape.num_layers:
                yield Layout(stages - prompt_stages, tp, prompt_stages=prompt_stages)


def needed_bytes(task: Task, layout: Layout) -> float:
    """Give the memory that the fullest device needs: weights, and the KV of every microbatch, or of the resident ones.

    Token stages also keep the KV of requests whose prompts are under way, or done before there is a row for them:
    in host memory where they swap.
    """
    sides = [(layout.stages, RESIDENT if layout.swap else layout.stages + layout.prompt_stages)]
    if layout.prompt_stages:
        sides.append((layout.prompt_stages, layout.prompt_stages))
    needs = []
    for stages, microbatches in sides:
        kv = task.shape.kv_bytes_per_token(stages, layout.tp, task.dtype_bytes)
        weights = task.shape.weight_bytes(stages, layout.tp, task.dtype_bytes)
        needs.append(weights + kv * task.row_len * layout.batch * microbatches)
    return max(needs)


def misfit(task: Task, layout: Layout) -> str:
    """Say why a layout cannot be used, or nothing."""
    needed, there = needed_bytes(task, layout), task.machine.memory_bytes
    if needed > there:
        return f"needs {needed / GB:.3g} GB and a device has {there / GB:.3g} GB"
    return ""


def make_setup(task: Task, layout: Layout) -> Setup:
    """Describe a layout to the simulator."""
    swap = None
    if layout.swap:
        kv = task.shape.kv_bytes_per_token(layout.stages, layout.tp, task.dtype_bytes)
        swap = Swap(kv, task.machine.host_bandwidth, RESIDENT)
    if not layout.prompt_stages:
        times = task.times.stage(layout.stages, layout.tp)
        pipeline = PipelineSetup(layout.stages, times, rows=layout.batch, swap=swap)
        return Setup((pipeline,) * layout.replicas, admission_s=ADMISSION_S)
    prompt = task.times.stage(layout.prompt_stages, layout.tp, task.stream_slowdown)
    token = task.times.stage(layout.stages, layout.tp)
    prompts = side(layout.prompt_stages, prompt, "prompt", layout)
    pipelines = prompts, side(layout.stages, token, "token", layout, swap)
    return Setup(pipelines, admission_s=ADMISSION_S, prompt_ahead=layout.handover_rows)


def side(stages: int, times: StageTimes, role: PipelineRole, layout: Layout, swap: Swap | None = None) -> PipelineSetup:
    """Describe one pipeline of a disaggregated layout."""
    return PipelineSetup(stages, times, role, rows=layout.batch, swap=swap)


def why_worse(scored: Scored, best: Scored, goal: Goal) -> str:
    """Say why a layout loses."""
    assert scored.result is not None
    if scored is best:
        return ""
    if goal.name == "goodput":
        late = float((scored.result.ttft_s > goal.ttft_s).mean())
        slow = float((scored.result.tpot_s > goal.tpot_s).mean())
        if late or slow:
            return f"{100 * late:.0f} % of requests miss the TTFT limit, {100 * slow:.0f} % the TPOT limit"
    if scored.score < best.score:
        return f"{100 * (1 - scored.score / best.score):.1f} % less {goal.name}"
    return "equal, with more devices or rows"


def verdicts(task: Task, scored: Sequence[Scored], misfits: Sequence[Scored]) -> Iterator[str]:
    """Say in words whether disaggregation and swapping pay."""
    split = next((each for each in scored if each.layout.kind == "disaggregated"), None)
    whole = next((each for each in scored if each.layout.kind != "disaggregated"), None)
    yield from compare("disaggregation", split, whole, any(each.layout.prompt_stages for each in misfits))
    swapped = next((each for each in scored if each.layout.swap), None)
    resident = next((each for each in scored if not each.layout.swap), None)
    if not task.machine.host_bandwidth:
        yield "swapping was not tried: the bandwidth of the host link is not known"
    else:
        yield from compare("swapping", swapped, resident, any(each.layout.swap for each in misfits))


def compare(name: str, with_it: Scored | None, without: Scored | None, misfits: bool) -> Iterator[str]:
    """Say whether one thing pays."""
    if with_it is None:
        yield f"{name} does not pay: no such layout fits" if misfits else f"{name} was not needed by any layout"
    elif without is None:
        yield f"{name} pays: nothing fits without it"
    elif with_it.score > without.score:
        yield f"{name} pays: {with_it.score / max(without.score, 1e-300):.2f} times the best layout without it"
    else:
        yield f"{name} does not pay: {with_it.score / max(without.score, 1e-300):.2f} times the best layout without it"


def serve_profile(layout: Layout, model: str | None = None) -> dict[str, Any]:
    """Give the keys of the profile YAML with which `dejavu serve` uses a layout."""
    keys: dict[str, Any] = {} if model is None else {"model": model}
    keys |= {"tp": layout.tp, "microbatch_size": layout.batch} | ({"swap": True} if layout.swap else {})
    if layout.prompt_stages:
        return keys | {"prompt_pp": layout.prompt_stages, "token_pp": layout.stages}
    return keys | {"pp": layout.stages} | ({"dp": layout.replicas} if layout.replicas > 1 else {})
