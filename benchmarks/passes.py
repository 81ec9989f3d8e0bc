"""How long passes took, and what lay between them, out of a run's step records: what the simulator is told."""

import statistics
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise

from dejavu.measure.records import StepRecord

TYPICAL = 3.0  # times the median


@dataclass(frozen=True, slots=True)
class PassTimes:
    """Give what a pass occupies one stage for, and the time to the next stage (or back to the first), seconds."""

    prompt_s: float
    token_s: float
    hop_s: float = 0.0


@dataclass(frozen=True, slots=True)
class Gap:
    """Hold what lay before a pass: when its input left the stage before, and when its own stage was free."""

    step: StepRecord
    input: StepRecord
    free_s: float

    @property
    def was_idle(self) -> bool:
        """Tell whether the stage waited for the input, so that the gap is the input's way here."""
        return self.free_s <= self.input.end_s

    @property
    def begins_request(self) -> bool:
        """Tell whether the pass brings a prompt to where tokens were made before: through the controller."""
        return self.step.kind == "prompt" and self.input.kind == "token" and self.is_back

    @property
    def is_back(self) -> bool:
        """Tell whether the input came from the last stage to the first."""
        return self.step.stage <= self.input.stage

    @property
    def way_s(self) -> float:
        """Give the time from the input's end to the pass."""
        return self.step.start_s - self.input.end_s


def gaps(steps: Sequence[StepRecord], first_stage: int, depth: int) -> Iterator[Gap]:
    """Give what lay before each pass of one pipeline (tensor rank 0)."""
    stages = range(first_stage, first_stage + depth)
    own = [step for step in steps if step.stage in stages and step.tp_rank == 0]
    passes = {(step.stage, step.microbatch, step.step): step for step in own}
    for stage in stages:
        inside = sorted((step for step in own if step.stage == stage), key=lambda step: step.start_s)
        back = stage == first_stage
        for before, step in pairwise(inside):
            key = (stages[-1] if back else stage - 1, step.microbatch, step.step - back)
            if key in passes:
                yield Gap(step, passes[key], before.end_s)


def typical(values: Sequence[float], otherwise: float = 0.0) -> float:
    """Give the mean without what is far above the median: waits for a request."""
    if not values:
        return otherwise
    limit = TYPICAL * max(0.0, statistics.median(values))
    return statistics.fmean([value for value in values if value <= limit] or [otherwise])


def mean(values: Sequence[float]) -> float:
    """Give the mean; 0 of nothing."""
    return statistics.fmean(values or [0.0])


def mean_busy(steps: Sequence[StepRecord], *kinds: str) -> float:
    """Give the mean time that passes of these kinds occupied a stage; 0 where there were none."""
    return mean([step.end_s - step.start_s for step in steps if step.kind in kinds])


def fit_passes(steps: Sequence[StepRecord], first_stage: int, depth: int, *, prompts_only: bool = False) -> PassTimes:
    """Give one pipeline's times: what passes took, with what a busy stage needs between two, and the way on.

    A single stage has no way on to simulate, so what lies between its passes counts as theirs. Where a pipeline has
    `prompts_only`, the way back to its first stage is always a request's, which is not counted here.
    """
    found = [gap for gap in gaps(steps, first_stage, depth) if not gap.begins_request]
    if prompts_only:
        found = [gap for gap in found if not gap.is_back]
    way_s = mean_way([gap for gap in found if gap.was_idle], depth)
    waiting = [gap for gap in found if not gap.is_back and gap.input.end_s + way_s < gap.free_s]
    between_s = mean([gap.step.start_s - gap.free_s for gap in waiting]) if depth > 1 else way_s
    own = [step for step in steps if first_stage <= step.stage < first_stage + depth]
    hop_s = max(0.0, way_s - between_s) if depth > 1 else 0.0
    times = {kind: busy_s + between_s if busy_s else 0.0 for kind, busy_s in busy_by_kind(own).items()}
    return PassTimes(times["prompt"], times["token"], hop_s)


def busy_by_kind(steps: Sequence[StepRecord]) -> dict[str, float]:
    """Give what passes with a prompt in them, and token steps, occupied a stage for."""
    return {"prompt": mean_busy(steps, "prompt", "mixed"), "token": mean_busy(steps, "token")}


def mean_way(idle: Sequence[Gap], depth: int) -> float:
    """Give the mean way to an idle stage; on the way back to the first, waits for a request are left out."""
    back = [gap for gap in idle if gap.is_back]
    on = [gap.way_s for gap in idle if not gap.is_back]
    back_s = typical([gap.way_s for gap in back], mean(on))
    return (back_s + (depth - 1) * (mean(on) if on else back_s)) / depth


def fit_admission(
    steps: Sequence[StepRecord], first_stages: Sequence[int], admitted_s: Sequence[float], otherwise: float
) -> float:
    """Give the time from a request's admission to its prompt, where a first stage was idle meanwhile."""
    found = []
    for stage in first_stages:
        own = [step for step in steps if step.stage == stage and step.tp_rank == 0]
        for before, step in pairwise(sorted(own, key=lambda step: step.start_s)):
            since = [moment for moment in admitted_s if before.end_s <= moment <= step.start_s]
            if step.kind == "prompt" and since:
                found.append(step.start_s - since[0])
    return typical(found, otherwise)
