"""Move microbatches through one simulated pipeline, by the rules of the engine's scheduler.

A pass is an event only at both its ends: what happens between stages follows from `Flow`. Where a whole turn of the
microbatches only moves the state later by a constant, further such turns are done at once (`skip_turns`).
"""

import heapq
from collections import deque
from dataclasses import dataclass, field
from typing import NamedTuple

from dejavu.measure.records import StepKind
from dejavu.planning.flow import SAME_S, Flow, StagedFlow
from dejavu.planning.setup import Failure, PipelineSetup

INFINITY = float("inf")


@dataclass(slots=True)
class Job:
    """Follow a request: what its prompt pass has to process, and the tokens it still has to produce."""

    request: int
    context: int
    tokens_left: int
    prompt_left: int
    order: int = 0


class Seat(NamedTuple):
    """Say after which token step of its microbatch a request ends."""

    last_step: int
    order: int
    job: Job


class Pass(NamedTuple):
    """Record one pass through one stage, in seconds."""

    stage: int
    microbatch: int
    step: int
    kind: StepKind
    num_rows: int
    num_tokens: int
    start_s: float
    end_s: float


@dataclass(slots=True)
class Microbatch:
    """Hold the rows of one microbatch; `ready_s` is when its pass under way ends, or its next one may start."""

    index: int
    num_rows: int
    ready_s: float = 0.0
    in_line: bool = False  # waits for its turn, or has a pass under way
    passes: int = 0
    steps: int = 0  # token steps done
    context: int = 0  # tokens in the cache, over the active rows
    pending: list[Job] = field(default_factory=list)  # seated, prompt not done
    prompting: list[tuple[Job, int]] = field(default_factory=list)  # in the pass under way, with so many prompt tokens
    active: list[Seat] = field(default_factory=list)  # a heap, the first to end first
    stepping: int = 0  # rows that take a token step in the pass under way
    step_s: float = 0.0  # of a token step before number `same_until`
    same_until: int = 0

    @property
    def num_free(self) -> int:
        """Give the number of free rows."""
        return self.num_rows - len(self.pending) - len(self.active)

    def move_on(self, steps: int, seconds: float) -> None:
        """Take `steps` token steps in `seconds`, in which no request ends."""
        self.ready_s += seconds
        self.steps += steps
        self.passes += steps
        self.context += steps * len(self.active)


class Mark(NamedTuple):
    """Remember a pipeline's state when a microbatch took its turn, to see what a whole turn changes."""

    changes: int
    microbatch: Microbatch | None
    num_passes: int
    state: list[float]


class Done(NamedTuple):
    """Report a token that matters: a request's first, or its last."""

    time_s: float
    job: Job


class Pipeline:
    """Run one pipeline's events in the order of time; what comes out lies in `done` until it is taken.

    With `record` every pass is kept in `passes`, stage by stage, and no turn is skipped.
    """

    def __init__(self, setup: PipelineSetup, *, record: bool = False) -> None:
        self.setup = setup
        self.microbatches = [Microbatch(index, setup.rows) for index in range(setup.num_microbatches)]
        self.staged = record or setup.swap is not None
        self.flow: Flow | StagedFlow = (StagedFlow if self.staged else Flow)(setup.stages, setup.hop_s)
        self.line: deque[Microbatch] = deque()  # waiting for stage 0
        self.under_way: deque[Microbatch] = deque()  # first to end first
        self.next_index = 0  # round robin goes on here
        self.work_s = 0.0  # of all passes, in each stage
        self.num_passes = 0
        self.done: list[Done] = []
        self.record = record
        self.passes: list[Pass] = []
        self.changes = 0  # counts what may break a steady turn
        self.settled = -1  # at these changes no further turn can be skipped
        self.mark = Mark(-1, None, 0, [])
        self.uniform = setup.times.steps_alike and not self.staged

    @property
    def next_s(self) -> float:
        """Give the time of the next event, or infinity."""
        start_s = self.start_s
        if self.under_way and self.under_way[0].ready_s <= start_s + SAME_S:
            return min(self.under_way[0].ready_s, start_s)
        return start_s

    @property
    def next_is_return(self) -> bool:
        """Tell whether the next event is the end of a pass."""
        return bool(self.under_way) and self.under_way[0].ready_s <= self.start_s + SAME_S

    @property
    def start_s(self) -> float:
        """Give when the next pass can start, or infinity while no microbatch is in line."""
        if not self.line:
            return INFINITY
        ready_s = self.line[0].ready_s
        return ready_s if ready_s > self.flow.clock_s else self.flow.clock_s

    @property
    def stall_s(self) -> float:
        """Give the time that stages waited for swapped KV."""
        return self.flow.stall_s if isinstance(self.flow, StagedFlow) else 0.0

    def run(self, until_s: float, horizon_s: float) -> None:
        """Do the next event, and those after it before `until_s`, up to one that puts something into `done`.

        Nothing from outside reaches this pipeline before `horizon_s`: so far turns may be skipped.
        """
        while True:
            if self.under_way and not self.line and not self.staged:
                before = self.num_passes
                self.run_steps(until_s)
                if self.num_passes > before and self.next_s >= until_s:
                    return
            start_s = self.start_s
            if self.under_way and self.under_way[0].ready_s <= start_s + SAME_S:
                self.finish_pass(self.under_way.popleft())
                if self.done:
                    return
            else:
                self.start_pass(self.choose(start_s), start_s, horizon_s)
            if self.next_s >= until_s:
                return

    def run_steps(self, until_s: float) -> None:
        """Do token steps, less than a turn of them, quickly: each microbatch that is back goes out again at once.

        Returns before anything else than a step is due, or a step could not start before `until_s`.
        """
        flow, under_way = self.flow, self.under_way
        assert isinstance(flow, Flow)
        for _ in range(len(under_way) - 1):
            microbatch = under_way[0]
            active, clock_s = microbatch.active, flow.clock_s
            start_s = microbatch.ready_s if microbatch.ready_s > clock_s else clock_s
            if microbatch.prompting or microbatch.pending or start_s >= until_s:
                return
            step = microbatch.steps + 1
            if active[0].last_step == step or under_way[1].ready_s <= start_s + SAME_S:
                return
            microbatch.steps = step
            microbatch.passes += 1
            microbatch.context += microbatch.stepping
            microbatch.stepping = len(active)
            step_s = microbatch.step_s if step < microbatch.same_until else self.step_s(microbatch)
            microbatch.ready_s = flow.push(start_s, step_s)
            self.work_s += step_s
            self.num_passes += 1
            self.next_index = microbatch.index + 1
            under_way.rotate(-1)

    def seat(self, microbatch: Microbatch, job: Job, now_s: float) -> None:
        """Give a request a free row."""
        assert microbatch.num_free > 0
        microbatch.pending.append(job)
        self.changes += 1
        if not microbatch.in_line:
            microbatch.ready_s = now_s
            self.enter_line(microbatch)

    def enter_line(self, microbatch: Microbatch) -> None:
        """Let a microbatch wait for its turn."""
        microbatch.in_line = True
        self.line.append(microbatch)

    def choose(self, start_s: float) -> Microbatch:
        """Take the next microbatch out of the line: round robin among those that are ready."""
        if len(self.line) == 1:
            chosen = self.line.popleft()
        else:
            count = len(self.microbatches)
            ready = (m for m in self.line if m.ready_s <= start_s + SAME_S)
            chosen = min(ready, key=lambda m: (m.index - self.next_index) % count)
            self.line.remove(chosen)
        self.next_index = chosen.index + 1
        return chosen

    def start_pass(self, microbatch: Microbatch, start_s: float, horizon_s: float) -> None:
        """Send a microbatch's next pass on its way."""
        if microbatch.pending:
            self.take_prompts(microbatch)
        elif not self.record:
            start_s += self.skip_turns(microbatch, start_s, horizon_s)
        chunked = self.setup.prompt_chunk > 0
        microbatch.stepping = len(microbatch.active) if chunked or not microbatch.prompting else 0
        fetch_s = self.fetch_s(microbatch)
        duration_s = self.duration_s(microbatch)
        if isinstance(self.flow, Flow):
            microbatch.ready_s = self.flow.push(start_s, duration_s)
        else:
            microbatch.ready_s = self.flow.push(start_s, duration_s, fetch_s)
        self.work_s += duration_s
        self.num_passes += 1
        self.under_way.append(microbatch)
        if self.record:
            self.note(microbatch)

    def take_prompts(self, microbatch: Microbatch) -> None:
        """Choose the prompts, or the parts of them, that go into the next pass; a token pipeline finds them done."""
        self.changes += 1
        if self.setup.role == "token":
            for job in microbatch.pending:
                self.activate(microbatch, job)
            microbatch.pending.clear()
            return
        budget = self.setup.prompt_chunk or self.setup.max_prompt_tokens
        for job in microbatch.pending:
            num_tokens = min(job.prompt_left, budget) if self.setup.prompt_chunk else job.prompt_left
            if microbatch.prompting and (num_tokens > budget or not num_tokens):
                break
            microbatch.prompting.append((job, num_tokens))
            budget -= num_tokens

    def activate(self, microbatch: Microbatch, job: Job) -> None:
        """Let a request whose prompt is done take part in token steps."""
        assert job.tokens_left > 0
        heapq.heappush(microbatch.active, Seat(microbatch.steps + job.tokens_left, job.order, job))
        microbatch.context += job.context
        microbatch.same_until = 0

    def duration_s(self, microbatch: Microbatch) -> float:
        """Give the time of the pass that a microbatch starts, in each stage."""
        times = self.setup.times
        seconds = 0.0
        if microbatch.prompting:
            num_tokens = sum([tokens for _, tokens in microbatch.prompting])
            seconds = times.prompt_s(num_tokens, len(microbatch.prompting))
        return max(seconds, self.step_s(microbatch)) if microbatch.stepping else seconds

    def fetch_s(self, microbatch: Microbatch) -> float:
        """Give the time to fetch what the next pass reads; nothing where all microbatches fit on the device."""
        swap = self.setup.swap
        if swap is None or not microbatch.stepping or len(self.microbatches) <= 2:
            return 0.0
        return swap.fetch_s(1, microbatch.context)

    def finish_pass(self, microbatch: Microbatch) -> None:
        """Count the tokens of a pass that has left the last stage."""
        if microbatch.stepping:
            self.count_tokens(microbatch)
        if microbatch.prompting:
            self.count_prompts(microbatch)
        microbatch.passes += 1
        if microbatch.active or microbatch.pending:
            self.line.append(microbatch)
        else:
            microbatch.in_line = False
            self.changes += 1

    def count_tokens(self, microbatch: Microbatch) -> None:
        """Give each active row its token, and free the rows of requests that end with it."""
        microbatch.steps += 1
        microbatch.context += microbatch.stepping
        active = microbatch.active
        while active and active[0].last_step == microbatch.steps:
            job = heapq.heappop(active).job
            microbatch.context -= job.context + job.tokens_left
            job.tokens_left = 0
            microbatch.same_until = 0
            self.changes += 1
            self.done.append(Done(microbatch.ready_s, job))

    def count_prompts(self, microbatch: Microbatch) -> None:
        """Take prompts, or parts of them, as done; a prompt's end gives a token."""
        for job, num_tokens in microbatch.prompting:
            job.prompt_left -= num_tokens
            if job.prompt_left:
                continue
            microbatch.pending.remove(job)
            job.tokens_left -= 1
            self.done.append(Done(microbatch.ready_s, job))
            if job.tokens_left and self.setup.role == "both":
                self.activate(microbatch, job)
        microbatch.prompting.clear()
        self.changes += 1

    def note(self, microbatch: Microbatch) -> None:
        """Record the pass that has just been sent."""
        assert isinstance(self.flow, StagedFlow)
        kind: StepKind = "prompt" if microbatch.prompting else "token"
        if microbatch.prompting and microbatch.stepping:
            kind = "mixed"
        num_rows = len(microbatch.prompting) + microbatch.stepping
        num_tokens = sum([tokens for _, tokens in microbatch.prompting]) + microbatch.stepping
        for stage, (start_s, end_s) in enumerate(self.flow.spans):
            self.passes.append(
                Pass(stage, microbatch.index, microbatch.passes, kind, num_rows, num_tokens, start_s, end_s)
            )

    def skip_turns(self, microbatch: Microbatch, start_s: float, horizon_s: float) -> float:
        """Do whole turns at once in which each microbatch takes one token step; give by how much time moved on."""
        if self.settled == self.changes:
            return 0.0
        turn_s = steady_turn_s(self, microbatch, start_s) if self.uniform else self.repeated_turn_s(microbatch)
        if turn_s is None:
            return 0.0
        turns = turns_to_skip(self, microbatch, turn_s, horizon_s)
        if horizon_s == INFINITY and not self.setup.times.context_step:
            self.settled = self.changes  # what is left is less than a turn
        if turns <= 0:
            return 0.0
        others = (*self.line, *self.under_way)
        self.work_s += turns * sum([self.step_s(other) for other in (microbatch, *others)])
        self.num_passes += turns * (1 + len(others))
        self.flow.shift(turns * turn_s)
        for other in (microbatch, *others):
            other.move_on(turns, turns * turn_s)
        self.mark = Mark(-1, None, 0, [])
        return turns * turn_s

    def repeated_turn_s(self, microbatch: Microbatch) -> float | None:
        """Give the time of a turn, if all that the last one did was to move the state later."""
        mark = self.mark
        if mark.changes == self.changes and mark.microbatch is not microbatch:
            return None
        others = (*self.line, *self.under_way)
        state = [*self.flow.state(), microbatch.ready_s, *[other.ready_s for other in others]]
        self.mark = Mark(self.changes, microbatch, self.num_passes, state)
        each_once = self.num_passes - mark.num_passes == 1 + len(others)
        if mark.changes != self.changes or len(state) != len(mark.state) or not each_once:
            return None
        turn_s = state[0] - mark.state[0]
        same = all(abs(now - was - turn_s) < SAME_S for now, was in zip(state, mark.state, strict=True))
        return turn_s if same else None

    def step_s(self, microbatch: Microbatch) -> float:
        """Give the time of a microbatch's next token step, in each stage."""
        if microbatch.steps >= microbatch.same_until:
            count = len(microbatch.active)
            context = microbatch.context / count
            microbatch.step_s = self.setup.times.token_s(count, context)
            span = self.setup.times.context_step
            microbatch.same_until = microbatch.steps + (span - int(context) % span if span else 1 << 60)
        return microbatch.step_s

    def fail(self, failure: Failure) -> list[Job]:
        """Stand still from a failure until its repair; give the requests that have to go back to a prompt pipeline.

        What was under way is done again from its start.
        """
        assert self.record
        self.passes = [cut_short(done, failure.time_s) for done in self.passes if done.start_s < failure.time_s]
        interrupted = list(self.under_way)
        for microbatch in interrupted:
            microbatch.prompting.clear()
            microbatch.stepping = 0
        lost = [job for m in self.microbatches for job in lose_kv(m)] if failure.kv_lost else []
        going_back = lost if self.setup.role == "token" else []
        for microbatch in self.microbatches if going_back else []:
            microbatch.pending.clear()
        waiting = [m for m in (*interrupted, *self.line) if m.pending or m.active]
        for microbatch in self.microbatches:
            microbatch.in_line = microbatch in waiting
            microbatch.ready_s = max(failure.resume_s, microbatch.ready_s if microbatch in self.line else 0.0)
        self.under_way.clear()
        self.line = deque(waiting)
        self.flow.delay_until(failure.resume_s)
        self.changes += 1
        return going_back


def cut_short(done: Pass, time_s: float) -> Pass:
    """End a pass at `time_s` at the latest."""
    return done._replace(end_s=min(done.end_s, time_s))


def lose_kv(microbatch: Microbatch) -> list[Job]:
    """Make every request of a microbatch start again with a prompt of all its tokens so far; give them."""
    for last_step, _, job in sorted(microbatch.active):
        left = last_step - microbatch.steps
        job.context += job.tokens_left - left
        job.tokens_left = left
        microbatch.pending.append(job)
    microbatch.active.clear()
    microbatch.context = microbatch.same_until = 0
    microbatch.pending.sort(key=lambda job: job.order)
    for job in microbatch.pending:
        job.prompt_left = job.context
    return list(microbatch.pending)


def steady_turn_s(pipeline: Pipeline, microbatch: Microbatch, start_s: float) -> float | None:
    """Give the time of a turn where all steps take equally long and nothing but steps is under way.

    Either stage 0 never waits (each microbatch is back before it is free), or no pass ever waits for another.
    """
    assert isinstance(pipeline.flow, Flow)
    setup, flow, line = pipeline.setup, pipeline.flow, pipeline.line
    step_s = pipeline.step_s(microbatch)
    if len(flow.lines) > 1 or (flow.lines and flow.lines[0][1] != step_s + setup.hop_s):
        return None
    through_s = setup.stages * step_s + (setup.stages - 1) * setup.hop_s
    full_turn_s = (1 + len(line) + len(pipeline.under_way)) * step_s
    if full_turn_s > through_s - SAME_S:
        return full_turn_s if is_back_in_time(pipeline, microbatch, start_s, step_s) else None
    due_s = start_s - SAME_S
    for other in (*line, *pipeline.under_way):
        due_s += step_s
        if other.ready_s < due_s:
            return None
        due_s = other.ready_s
    return through_s if start_s + through_s > due_s + step_s - SAME_S else None


def is_back_in_time(pipeline: Pipeline, microbatch: Microbatch, start_s: float, step_s: float) -> bool:
    """Tell whether stage 0 never waits in the next turn, and whether the turns after it have the same order."""
    count = len(pipeline.microbatches)
    line = sorted(pipeline.line, key=lambda other: (other.index - microbatch.index) % count)
    due_s, crowded = start_s, False
    for other in (*line, *pipeline.under_way):
        crowded |= other.ready_s <= due_s + SAME_S  # two wait at once: round robin decides, not who is back first
        due_s += step_s
        if other.ready_s > due_s + SAME_S:
            return False
    order = [(other.index - microbatch.index) % count for other in (*line, *pipeline.under_way)]
    return not crowded or order == sorted(order)


def turns_to_skip(pipeline: Pipeline, microbatch: Microbatch, turn_s: float, horizon_s: float) -> int:
    """Count the turns in which no request ends, no time of a step changes, and nothing comes from outside."""
    taking_part = [microbatch, *pipeline.line, *pipeline.under_way]
    turns = min([other.active[0].last_step - other.steps if other.active else 0 for other in taking_part]) - 1
    if any(other.prompting or other.pending for other in taking_part):
        return 0
    if horizon_s < INFINITY and turn_s > 0:
        latest_s = max([other.ready_s for other in taking_part])
        turns = min(turns, int((horizon_s - latest_s) / turn_s) - 1)
    if turns <= 0 or pipeline.uniform:
        return turns
    return min([turns, *[steps_alike(pipeline, other) for other in taking_part]])


def steps_alike(pipeline: Pipeline, microbatch: Microbatch) -> int:
    """Count the token steps of a microbatch that take as long as its next one, without waiting for a fetch."""
    pipeline.step_s(microbatch)
    alike: float = microbatch.same_until - microbatch.steps
    swap = pipeline.setup.swap
    if swap and swap.bytes_per_token and len(pipeline.microbatches) > 2:
        shortest_s = min([pipeline.step_s(other) for other in pipeline.microbatches if other.active])
        alike = min(
            alike, (shortest_s * swap.bandwidth / swap.bytes_per_token - microbatch.context) / len(microbatch.active)
        )
    return int(alike) - 1
