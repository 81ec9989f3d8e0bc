"""Find how many turns of a pipeline's microbatches can be done at once: those that only move its state later."""

from collections import deque
from typing import TYPE_CHECKING

from dejavu.planning.flow import SAME_S, Flow
from dejavu.planning.microbatch import INFINITY, Microbatch

if TYPE_CHECKING:
    from dejavu.planning.pipeline import Pipeline


def steady_turn_s(pipeline: "Pipeline", microbatch: Microbatch, start_s: float) -> float | None:
    """Give the time of a turn where all steps take equally long and nothing but steps is under way.

    Either stage 0 never waits (each microbatch is back before it is free), or no pass ever waits for another.
    """
    assert isinstance(pipeline.flow, Flow)
    setup, flow, line = pipeline.setup, pipeline.flow, pipeline.line
    step_s = pipeline.step_s(microbatch)
    if len(flow.lines) > 1 or (flow.lines and flow.lines[0][1] != step_s + setup.hop_s):
        return None
    whole_s = through_s(pipeline, microbatch)
    full_turn_s = (1 + len(line) + len(pipeline.under_way)) * step_s
    if full_turn_s > whole_s - SAME_S:
        return full_turn_s if is_back_in_time(pipeline, microbatch, start_s, step_s) else None
    due_s = start_s - SAME_S
    for other in (*line, *pipeline.under_way):
        due_s += step_s
        if other.ready_s < due_s:
            return None
        due_s = other.ready_s
    return whole_s if start_s + whole_s > due_s + step_s - SAME_S else None


def through_s(pipeline: "Pipeline", microbatch: Microbatch) -> float:
    """Give the time of a token step through all stages that waits nowhere."""
    setup = pipeline.setup
    return setup.stages * pipeline.step_s(microbatch) + (setup.stages - 1) * setup.hop_s + setup.return_s


def space_out(pipeline: "Pipeline", microbatch: Microbatch, start_s: float) -> None:
    """Set when microbatches are back from a turn that began at `start_s`, in which stage 0 never waited.

    Those that were back early before it are so no longer, as they had to wait for their turn.
    """
    step_s, whole_s = pipeline.step_s(microbatch), through_s(pipeline, microbatch)
    line = sorted_line(pipeline, microbatch)
    others = (*line, *pipeline.under_way)
    if (1 + len(others)) * step_s > whole_s - SAME_S:
        for place, other in enumerate(others, 1):
            other.ready_s = start_s + place * step_s + whole_s
        pipeline.line = deque(line)


def begin_turn(pipeline: "Pipeline", microbatch: Microbatch, start_s: float) -> None:
    """Note when requests take their first token step, in a steady turn that begins at `start_s`."""
    step_s = pipeline.step_s(microbatch)
    if microbatch.fresh:
        pipeline.begin_fresh(microbatch, start_s)
    for other in (*sorted_line(pipeline, microbatch), *pipeline.under_way):
        start_s = max(start_s + step_s, other.ready_s)
        if other.fresh:
            pipeline.begin_fresh(other, start_s)


def sorted_line(pipeline: "Pipeline", microbatch: Microbatch) -> list[Microbatch]:
    """Give the microbatches in line in the order of round robin after `microbatch`."""
    count = len(pipeline.microbatches)
    return sorted(pipeline.line, key=lambda other: (other.index - microbatch.index) % count)


def is_back_in_time(pipeline: "Pipeline", microbatch: Microbatch, start_s: float, step_s: float) -> bool:
    """Tell whether stage 0 never waits in the next turn, and whether the turns after it have the same order."""
    count = len(pipeline.microbatches)
    line = sorted_line(pipeline, microbatch)
    due_s, crowded = start_s, False
    for other in (*line, *pipeline.under_way):
        crowded |= other.ready_s <= due_s + SAME_S  # two wait at once: round robin decides, not who is back first
        due_s += step_s
        if other.ready_s > due_s + SAME_S:
            return False
    order = [(other.index - microbatch.index) % count for other in (*line, *pipeline.under_way)]
    return not crowded or order == sorted(order)


def turns_to_skip(pipeline: "Pipeline", microbatch: Microbatch, turn_s: float, room_s: float) -> int:
    """Count the turns of the next `room_s` in which no request ends and no time of a step changes."""
    taking_part = [microbatch, *pipeline.line, *pipeline.under_way]
    turns = min([other.active[0].last_step - other.steps if other.active else 0 for other in taking_part]) - 1
    if any(other.prompting or other.pending for other in taking_part):
        return 0
    if room_s < INFINITY and turn_s > 0:
        turns = min(turns, int(room_s / turn_s) - 1)
    if turns <= 0 or pipeline.uniform:
        return turns
    return min([turns, *[steps_alike(pipeline, other) for other in taking_part]])


def steps_alike(pipeline: "Pipeline", microbatch: Microbatch) -> int:
    """Count the token steps of a microbatch that take as long as its next one, without waiting for a fetch."""
    pipeline.step_s(microbatch)
    alike: float = microbatch.same_until - microbatch.steps
    swap = pipeline.setup.swap
    if swap and swap.bytes_per_token and len(pipeline.microbatches) > swap.resident:
        shortest_s = min([pipeline.step_s(other) for other in pipeline.microbatches if other.active])
        alike = min(
            alike, (shortest_s * swap.bandwidth / swap.bytes_per_token - microbatch.context) / len(microbatch.active)
        )
    return int(alike) - 1
