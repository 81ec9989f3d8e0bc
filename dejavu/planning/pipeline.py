"""Move microbatches through one simulated pipeline, by the rules of the engine's scheduler.

A pass is an event only at both its ends: what happens between stages follows from `Flow`. Where a whole turn of the
microbatches only moves the state later by a constant, further such turns are done at once (`skip_turns`).
"""

import heapq
from collections import deque

from dejavu.measure.records import StepKind
from dejavu.planning.flow import SAME_S, Flow, Moves, StagedFlow
from dejavu.planning.microbatch import INFINITY, Done, Job, Mark, Microbatch, Pass, Seat
from dejavu.planning.setup import Failure, PipelineSetup
from dejavu.planning.steady import begin_turn, space_out, steady_turn_s, turns_to_skip


class Pipeline:
    """Run one pipeline's events in the order of time; what comes out lies in `done` until it is taken.

    With `record` every pass is kept in `passes`, stage by stage, and no turn is skipped.
    """

    def __init__(self, setup: PipelineSetup, *, record: bool = False) -> None:
        self.setup = setup
        self.microbatches = [Microbatch(index, setup.rows) for index in range(setup.num_microbatches)]
        self.staged = record or setup.swap is not None or setup.replication is not None
        self.flow: Flow | StagedFlow = Flow(setup.stages, setup.hop_s)
        if self.staged:
            resident = setup.swap.resident if setup.swap else 1
            self.flow = StagedFlow(setup.stages, setup.hop_s, resident)
        self.present: list[int] = []  # microbatches whose KV is on the device, the last used last
        self.line: deque[Microbatch] = deque()  # waiting for stage 0, first to be ready first
        self.under_way: deque[Microbatch] = deque()  # first to end first
        self.next_index = 0  # round robin goes on here
        self.num_rows = setup.num_microbatches * setup.rows
        self.num_seated = 0  # rows taken
        self.return_s = setup.return_s
        self.work_s = 0.0  # of all passes, in each stage
        self.num_passes = 0
        self.done: list[Done] = []
        self.begun: list[tuple[float, Job]] = []  # when the first token steps of requests began
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
        under_way, line, quick = self.under_way, self.line, not self.staged
        moved = False
        while True:
            if quick and under_way and not line:
                before = self.num_passes
                self.run_steps(until_s)
                moved |= self.num_passes > before
            start_s = self.start_s
            if under_way and under_way[0].ready_s <= start_s + SAME_S:
                if moved and min(under_way[0].ready_s, start_s) >= until_s:
                    return
                self.finish_pass(under_way.popleft())
                if self.done:
                    return
            elif moved and start_s >= until_s:
                return
            else:
                self.start_pass(self.choose(start_s), start_s, horizon_s)
                line = self.line  # a skipped turn puts it in order anew
            moved = True

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
            microbatch.ready_s = flow.push(start_s, step_s) + self.return_s
            self.work_s += step_s
            self.num_passes += 1
            self.next_index = microbatch.index + 1
            under_way.rotate(-1)

    def seat(self, microbatch: Microbatch, job: Job, seen_s: float) -> None:
        """Give a request a free row; stage 0 hears of it at `seen_s`."""
        assert microbatch.count_free() > 0
        job.seen_s = seen_s
        microbatch.pending.append(job)
        self.num_seated += 1
        self.changes += 1
        if not microbatch.in_line:
            microbatch.ready_s = seen_s
            self.enter_line(microbatch)

    def enter_line(self, microbatch: Microbatch) -> None:
        """Let a microbatch wait for its turn, before those that are ready later."""
        microbatch.in_line = True
        place = len(self.line)
        while place and self.line[place - 1].ready_s > microbatch.ready_s:
            place -= 1
        self.line.insert(place, microbatch)

    def choose(self, start_s: float) -> Microbatch:
        """Take the next microbatch out of the line: round robin among those that are ready."""
        if len(self.line) == 1:
            chosen = self.line.popleft()
        else:
            count, first = len(self.microbatches), self.next_index
            turns = [(m.index - first) % count for m in self.line if m.ready_s <= start_s + SAME_S]
            place = turns.index(min(turns))
            chosen = self.line[place]
            del self.line[place]
        self.next_index = chosen.index + 1
        return chosen

    def start_pass(self, microbatch: Microbatch, start_s: float, horizon_s: float) -> None:
        """Send a microbatch's next pass on its way."""
        begun_s = start_s
        if microbatch.pending:
            self.take_prompts(microbatch, start_s)
        elif not self.record and not self.setup.replication:
            start_s += self.skip_turns(microbatch, start_s, horizon_s)
        chunked = self.setup.prompt_chunk > 0
        microbatch.stepping = len(microbatch.active) if chunked or not microbatch.prompting else 0
        if microbatch.fresh and microbatch.stepping:
            self.begin_fresh(microbatch, begun_s)
        duration_s = self.duration_s(microbatch)
        if isinstance(self.flow, Flow):
            microbatch.ready_s = self.flow.push(start_s, duration_s) + self.return_s
        else:
            moves = Moves(*self.swap_s(microbatch), self.copy_s(microbatch))
            microbatch.ready_s = self.flow.push(start_s, duration_s, moves) + self.return_s
        self.work_s += duration_s
        self.num_passes += 1
        self.under_way.append(microbatch)
        if self.record:
            self.note(microbatch)

    def take_prompts(self, microbatch: Microbatch, start_s: float) -> None:
        """Choose the prompts, or the parts of them, that go into the next pass; a token pipeline finds them done."""
        seen = [job for job in microbatch.pending if job.seen_s <= start_s + SAME_S]
        self.changes += bool(seen)
        if self.setup.role == "token":
            for job in seen:
                self.activate(microbatch, job)
                microbatch.pending.remove(job)
            return
        budget = self.setup.prompt_chunk or self.setup.max_prompt_tokens
        for job in seen:
            num_tokens = min(job.prompt_left, budget) if self.setup.prompt_chunk else job.prompt_left
            if microbatch.prompting and (num_tokens > budget or not num_tokens):
                break
            microbatch.prompting.append((job, num_tokens))
            budget -= num_tokens

    def activate(self, microbatch: Microbatch, job: Job) -> None:
        """Let a request whose prompt is done take part in token steps."""
        assert job.tokens_left > 0
        heapq.heappush(microbatch.active, Seat(microbatch.steps + job.tokens_left, job.order, job))
        microbatch.fresh.append(job)
        microbatch.context += job.context
        microbatch.same_until = 0

    def begin_fresh(self, microbatch: Microbatch, start_s: float) -> None:
        """Note when requests take their first token step."""
        self.begun += [(start_s, job) for job in microbatch.fresh]
        microbatch.fresh.clear()

    def duration_s(self, microbatch: Microbatch) -> float:
        """Give the time of the pass that a microbatch starts, in each stage."""
        times = self.setup.times
        seconds = 0.0
        if microbatch.prompting:
            num_tokens = sum([tokens for _, tokens in microbatch.prompting])
            whole = sum([job.context for job, _ in microbatch.prompting])
            seconds = times.prompt_s(num_tokens, len(microbatch.prompting), num_tokens / whole)
        return max(seconds, self.step_s(microbatch)) if microbatch.stepping else seconds

    def swap_s(self, microbatch: Microbatch) -> tuple[float, float]:
        """Give the time to fetch what the pass reads, and to flush its new tokens; nothing where all are resident."""
        swap = self.setup.swap
        if swap is None or len(self.microbatches) <= swap.resident:
            return 0.0, 0.0
        is_here = microbatch.index in self.present
        self.make_present(microbatch, swap.resident)
        read = microbatch.context if microbatch.stepping and not is_here else 0
        return swap.move_s(read), swap.move_s(new_tokens(microbatch))

    def copy_s(self, microbatch: Microbatch) -> float:
        """Give the time to copy a pass's new tokens to their replica; a prompt pipeline has none."""
        replication = self.setup.replication
        return replication.copy_s(new_tokens(microbatch)) if replication and self.setup.role != "prompt" else 0.0

    def make_present(self, microbatch: Microbatch, resident: int) -> None:
        """Let a microbatch's KV be on the device, in place of one that has no step to come, or the longest unused."""
        others = [index for index in self.present if index != microbatch.index]
        if len(others) == resident:
            idle = (index for index in others if not self.goes_on(self.microbatches[index]))
            others.remove(next(idle, others[0]))
        self.present = [*others, microbatch.index]

    def goes_on(self, microbatch: Microbatch) -> bool:
        """Tell whether a microbatch has a token step to come after the pass under way."""
        after = microbatch.steps + (microbatch in self.under_way and microbatch.stepping > 0)
        return bool(microbatch.prompting) or any(seat.last_step > after for seat in microbatch.active)

    def finish_pass(self, microbatch: Microbatch) -> None:
        """Count the tokens of a pass that has left the last stage."""
        if microbatch.stepping:
            self.count_tokens(microbatch)
        if microbatch.prompting:
            self.count_prompts(microbatch)
        microbatch.passes += 1
        if not microbatch.active and microbatch.pending:
            microbatch.ready_s = max(microbatch.ready_s, microbatch.pending[0].seen_s)
        if microbatch.active or microbatch.pending:
            self.enter_line(microbatch)
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
        turns = turns_to_skip(self, microbatch, turn_s, horizon_s - start_s)
        if horizon_s == INFINITY and not self.setup.times.context_step:
            self.settled = self.changes  # what is left is less than a turn
        if turns <= 0:
            return 0.0
        others = (*self.line, *self.under_way)
        if self.uniform:
            begin_turn(self, microbatch, start_s)
        self.work_s += turns * sum([self.step_s(other) for other in (microbatch, *others)])
        self.num_passes += turns * (1 + len(others))
        self.flow.shift(turns * turn_s)
        for other in (microbatch, *others):
            other.move_on(turns, turns * turn_s)
        if self.uniform:
            space_out(self, microbatch, start_s + (turns - 1) * turn_s)
        self.mark = Mark(-1, None, 0, [])
        return turns * turn_s

    def repeated_turn_s(self, microbatch: Microbatch) -> float | None:
        """Give the time of a turn, if all that the last one did was to move the state later."""
        if any(other.pending for other in self.line):
            return None
        for other in (microbatch, *self.line):
            self.step_s(other)  # counts as a change where the time is no longer what it was
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
            self.changes += span > 0
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
        self.present = []
        self.line = deque(sorted(waiting, key=lambda m: m.ready_s))
        self.flow.delay_until(failure.resume_s)
        self.changes += 1
        return going_back


def new_tokens(microbatch: Microbatch) -> int:
    """Count the tokens that the pass under way adds to the cache."""
    return microbatch.stepping + sum([tokens for _, tokens in microbatch.prompting])


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
    microbatch.fresh.clear()
    microbatch.context = microbatch.same_until = 0
    microbatch.pending.sort(key=lambda job: job.order)
    for job in microbatch.pending:
        job.prompt_left = job.context
    return list(microbatch.pending)
