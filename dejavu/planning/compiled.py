"""Run simulations as machine code: the rules of `pipeline` and `simulator` over flat arrays, compiled by numba.

Every pass is an event of some twenty nanoseconds, so nothing is skipped. Failures, swapping and records of passes are
left to the objects, which are also what the tests hold this against.
"""

from collections.abc import Callable
from typing import Any, TypeVar

import numpy as np
from numba import njit
from numpy.typing import NDArray

from dejavu.planning.flow import SAME_S
from dejavu.planning.world import ARRIVED, BOTH, NOW, READY_FROM, READY_TO, RESERVED, TOKEN, Grid, World

Function = TypeVar("Function", bound=Callable[..., Any])
Floats = NDArray[np.float64]
Ints = NDArray[np.int64]

INFINITY = np.inf


def compiled(function: Function) -> Function:
    """Compile a function, and keep the machine code beside the source, or in the user's cache.

    Without numba's memory management, which would count references at each look at an array: 200 times slower.
    """
    made: Function = njit(cache=True, error_model="numpy", _nrt=False)(function)
    return made


@compiled
def interpolate(xs: Floats, ys: Floats, count: int, at: float) -> float:
    """Interpolate as `profile.interpolate` does."""
    if count == 1:
        return float(ys[0])
    index = 1
    while index < count - 1 and xs[index] < at:
        index += 1
    slope = (ys[index] - ys[index - 1]) / (xs[index] - xs[index - 1])
    value = ys[index - 1] + slope * (at - xs[index - 1])
    part = min(1.0, at / xs[0]) if xs[0] else 1.0
    least = ys[0]
    for place in range(1, count):
        least = min(least, ys[place])
    return float(max(value, least * part))


@compiled
def look_up(grid: Grid, p: int, batch: float, length: float) -> float:
    """Give a time as `profile.Profile.look_up` does."""
    count = grid.num_batches[p]
    if count == 1:
        return interpolate(grid.lengths[p, 0], grid.seconds[p, 0], grid.num_lengths[p, 0], length)
    index = 1
    while index < count - 1 and grid.batches[p, index] < batch:
        index += 1
    least = below = above = INFINITY
    for b in range(count):
        value = interpolate(grid.lengths[p, b], grid.seconds[p, b], grid.num_lengths[p, b], length)
        least = min(least, value)
        below = value if b == index - 1 else below
        above = value if b == index else above
    x0, x1 = grid.batches[p, index - 1], grid.batches[p, index]
    value = below + (above - below) / (x1 - x0) * (batch - x0)
    return float(max(value, least * min(1.0, batch / grid.batches[p, 0])))


@compiled
def push(w: World, p: int, start_s: float, duration_s: float) -> float:
    """Send a pass through all stages, as `flow.Flow.push` does; give when it leaves the last, or -1 if it cannot."""
    depth = w.depth[p]
    clock = max(start_s, w.clock_s[p]) + duration_s
    slope = duration_s + w.hop_s[p]
    end = last = clock + slope * depth
    w.clock_s[p] = clock
    kept = 0
    for line in range(w.num_lines[p]):
        steeper = w.line_slope_s[p, line]
        if steeper <= slope:
            break
        late = w.line_start_s[p, line] + duration_s + steeper * depth
        if late > end + SAME_S:
            w.line_start_s[p, kept] = w.line_start_s[p, line] + duration_s
            w.line_slope_s[p, kept] = steeper
            kept += 1
            last = max(last, late)
    if kept == w.line_start_s.shape[1]:
        return -1.0
    w.line_start_s[p, kept] = clock
    w.line_slope_s[p, kept] = slope
    w.num_lines[p] = kept + 1
    return float(last)


@compiled
def enter_line(w: World, p: int, m: int) -> None:
    """Let a microbatch wait for its turn, before those that are ready later."""
    w.in_line[m] = 1
    place = w.num_waiting[p]
    while place and w.ready_s[w.waiting[p, place - 1]] > w.ready_s[m]:
        w.waiting[p, place] = w.waiting[p, place - 1]
        place -= 1
    w.waiting[p, place] = m
    w.num_waiting[p] += 1


@compiled
def drop_first(places: Ints, p: int, place: int, count: int) -> int:
    """Take one microbatch out of a list; give it."""
    m = places[p, place]
    for later in range(place, count - 1):
        places[p, later] = places[p, later + 1]
    return int(m)


@compiled
def choose(w: World, p: int, start_s: float) -> int:
    """Take the next microbatch out of the line: round robin among those that are ready."""
    best, best_turn = 0, 1 << 60
    count = w.num_microbatches[p]
    for place in range(w.num_waiting[p]):
        m = w.waiting[p, place]
        turn = (m - w.first[p] - w.turn[p]) % count
        if w.ready_s[m] <= start_s + SAME_S and turn < best_turn:
            best, best_turn = place, turn
    chosen = drop_first(w.waiting, p, best, w.num_waiting[p])
    w.num_waiting[p] -= 1
    w.turn[p] = chosen - w.first[p] + 1
    return chosen


@compiled
def step_seconds(w: World, tokens: Grid, p: int, m: int) -> float:
    """Give the time of a microbatch's next token step, in each stage."""
    count, context, span = w.num_active[m], 0.0, 0
    if w.span[p]:
        span = int(w.context[m] / count) // w.span[p]
        context = (span + 0.5) * w.span[p]
    if w.step_rows[m] != count or w.step_span[m] != span:
        w.step_rows[m], w.step_span[m] = count, span
        w.step_s[m] = look_up(tokens, p, count, context)
    return float(w.step_s[m])


@compiled
def take_prompts(w: World, p: int, m: int, start_s: float) -> None:
    """Choose the prompts, or the parts of them, that go into the next pass; a token pipeline finds them done."""
    seen = 0
    while seen < w.num_pending[m] and w.seen_s[w.pending_jobs[m, seen]] <= start_s + SAME_S:
        seen += 1
    if w.role[p] == TOKEN:
        for place in range(seen):
            activate(w, m, w.pending_jobs[m, place])
        drop_pending(w, m, seen)
        return
    budget = w.chunk[p] if w.chunk[p] else w.most_tokens[p]
    for place in range(seen):
        tokens = w.prompt_left[w.pending_jobs[m, place]]
        if w.chunk[p]:
            tokens = min(tokens, budget)
        if place and (tokens > budget or not tokens):
            break
        w.prompting_tokens[m, place] = tokens
        w.num_prompting[m] = place + 1
        budget -= tokens


@compiled
def drop_pending(w: World, m: int, count: int) -> None:
    """Forget the first pending requests of a microbatch."""
    for place in range(count, w.num_pending[m]):
        w.pending_jobs[m, place - count] = w.pending_jobs[m, place]
    w.num_pending[m] -= count


@compiled
def activate(w: World, m: int, job: int) -> None:
    """Let a request whose prompt is done take part in token steps."""
    place = w.num_active[m]
    w.active_jobs[m, place] = job
    w.active_ends[m, place] = w.steps[m] + w.left[job]
    w.num_active[m] = place + 1
    w.num_fresh[m] += 1
    w.context[m] += w.prompt[job]


@compiled
def begin_fresh(w: World, m: int, start_s: float) -> None:
    """Note when requests take their first token step."""
    for place in range(w.num_active[m]):
        job = w.active_jobs[m, place]
        if w.begun_s[job] != w.begun_s[job]:
            w.begun_s[job] = start_s
    w.num_fresh[m] = 0


@compiled
def prompt_seconds(w: World, prompts: Grid, p: int, m: int) -> float:
    """Give the time of the prompts in a microbatch's next pass."""
    count, tokens, whole = w.num_prompting[m], 0, 0
    for place in range(count):
        tokens += w.prompting_tokens[m, place]
        whole += w.prompt[w.pending_jobs[m, place]]
    seconds = look_up(prompts, p, count, tokens / count)
    return float(seconds * (tokens / whole if w.by_share[p] else 1.0) + w.overhead_s[p])


@compiled
def start_pass(w: World, prompts: Grid, tokens: Grid, p: int, m: int, start_s: float) -> bool:
    """Send a microbatch's next pass on its way; tell whether that was possible."""
    if w.num_pending[m]:
        take_prompts(w, p, m, start_s)
    stepping = w.num_active[m] if w.chunk[p] or not w.num_prompting[m] else 0
    w.stepping[m] = stepping
    if stepping and w.num_fresh[m]:
        begin_fresh(w, m, start_s)
    duration_s = prompt_seconds(w, prompts, p, m) if w.num_prompting[m] else 0.0
    if stepping:
        duration_s = max(duration_s, step_seconds(w, tokens, p, m))
    last_s = push(w, p, start_s, duration_s)
    w.ready_s[m] = last_s + w.back_s[p]
    w.work_s[p] += duration_s
    w.num_passes[p] += 1
    w.out[p, w.num_out[p]] = m
    w.num_out[p] += 1
    return last_s >= 0.0


@compiled
def run_steps(w: World, tokens: Grid, p: int, until_s: float) -> int:
    """Do token steps while nothing else is due: each microbatch that is back goes out again. Give how many."""
    done = 0
    while w.num_out[p] > 1 and not w.num_waiting[p]:
        m = w.out[p, 0]
        start_s = max(w.ready_s[m], w.clock_s[p])
        if w.num_prompting[m] or w.num_pending[m] or w.num_fresh[m] or not w.stepping[m] or start_s >= until_s:
            break
        if w.ready_s[w.out[p, 1]] <= start_s + SAME_S or ends_soon(w, m):
            break
        w.steps[m] += 1
        w.context[m] += w.stepping[m]
        step_s = step_seconds(w, tokens, p, m)
        last_s = push(w, p, start_s, step_s)
        if last_s < 0.0:
            return -1
        w.ready_s[m] = last_s + w.back_s[p]
        w.work_s[p] += step_s
        w.turn[p] = m - w.first[p] + 1
        count = w.num_out[p]
        drop_first(w.out, p, 0, count)
        w.out[p, count - 1] = m
        done += 1
    w.num_passes[p] += done
    return done


@compiled
def ends_soon(w: World, m: int) -> bool:
    """Tell whether a request ends with the step under way."""
    soon = False
    for place in range(w.num_active[m]):
        soon = soon or w.active_ends[m, place] == w.steps[m] + 1
    return soon


@compiled
def end_request(w: World, p: int, job: int, time_s: float) -> None:
    """Take a request out of its row: it has ended, or goes on in a token pipeline."""
    if w.left[job]:
        arrived_s = time_s + w.settings[1]
        w.arrived_s[job] = arrived_s
        place = w.counts[READY_TO]
        while place > w.counts[READY_FROM] and comes_before(w, place - 1, arrived_s, job):
            w.queue_s[place], w.queue_jobs[place] = w.queue_s[place - 1], w.queue_jobs[place - 1]
            place -= 1
        w.queue_s[place], w.queue_jobs[place] = arrived_s, job
        w.counts[READY_TO] += 1
    else:
        w.finish_s[job] = time_s - w.back_s[p]
        w.counts[RESERVED] -= w.reserves[job]
    w.num_seated[p] -= 1
    w.free[int(w.role[p] == TOKEN)] += 1


@compiled
def comes_before(w: World, place: int, time_s: float, job: int) -> bool:
    """Tell whether a request comes before another that waits for a token row."""
    return bool(time_s < w.queue_s[place] or (time_s == w.queue_s[place] and job < w.queue_jobs[place]))


@compiled
def count_tokens(w: World, p: int, m: int) -> bool:
    """Give each active row its token; tell whether a request ended."""
    w.steps[m] += 1
    w.context[m] += w.stepping[m]
    before = place = w.num_active[m]
    while place:
        place -= 1
        if w.active_ends[m, place] == w.steps[m]:
            job = w.active_jobs[m, place]
            w.context[m] -= w.prompt[job] + w.left[job]
            w.left[job] = 0
            w.num_active[m] -= 1
            w.active_jobs[m, place] = w.active_jobs[m, w.num_active[m]]
            w.active_ends[m, place] = w.active_ends[m, w.num_active[m]]
            end_request(w, p, job, w.ready_s[m])
    return bool(w.num_active[m] < before)


@compiled
def count_prompts(w: World, p: int, m: int) -> bool:
    """Take prompts, or parts of them, as done; tell whether one is, as a whole."""
    kept, done = 0, False
    for place in range(w.num_pending[m]):
        job = w.pending_jobs[m, place]
        if place < w.num_prompting[m]:
            w.prompt_left[job] -= w.prompting_tokens[m, place]
        if w.prompt_left[job]:
            w.pending_jobs[m, kept] = job
            kept += 1
            continue
        done = True
        w.left[job] -= 1
        w.first_s[job] = w.ready_s[m] - w.back_s[p]
        if w.left[job] and w.role[p] == BOTH:
            activate(w, m, job)
        else:
            end_request(w, p, job, w.ready_s[m])
    w.num_pending[m] = kept
    w.num_prompting[m] = 0
    return done


@compiled
def finish_pass(w: World, p: int) -> bool:
    """Count the tokens of the pass that leaves the last stage; tell whether something has to be done about it."""
    m = drop_first(w.out, p, 0, w.num_out[p])
    w.num_out[p] -= 1
    done = False
    if w.stepping[m]:
        done = count_tokens(w, p, m)
    if w.num_prompting[m]:
        done = count_prompts(w, p, m) or done
    if done:
        w.moments[NOW] = max(w.moments[NOW], w.ready_s[m])
    if not w.num_active[m] and w.num_pending[m]:
        w.ready_s[m] = max(w.ready_s[m], w.seen_s[w.pending_jobs[m, 0]])
    w.in_line[m] = 0
    if w.num_active[m] or w.num_pending[m]:
        enter_line(w, p, m)
    return done


@compiled
def start_at(w: World, p: int) -> float:
    """Give when the next pass can start, or infinity while no microbatch is in line."""
    return float(max(w.ready_s[w.waiting[p, 0]], w.clock_s[p])) if w.num_waiting[p] else INFINITY


@compiled
def next_is_return(w: World, p: int) -> bool:
    """Tell whether a pipeline's next event is the end of a pass."""
    return bool(w.num_out[p] and w.ready_s[w.out[p, 0]] <= start_at(w, p) + SAME_S)


@compiled
def note_next(w: World, p: int) -> None:
    """Note when a pipeline's next event is."""
    w.next_s[p] = start_at(w, p)
    if next_is_return(w, p):
        w.next_s[p] = min(w.next_s[p], w.ready_s[w.out[p, 0]])


@compiled
def drive(w: World, prompts: Grid, tokens: Grid, p: int, until_s: float) -> bool:
    """Do a pipeline's next event, and those after it before `until_s`, up to one that matters outside."""
    moved = False
    while True:
        steps = run_steps(w, tokens, p, until_s)
        if steps < 0:
            return False
        moved = moved or steps > 0
        start_s = start_at(w, p)
        if next_is_return(w, p):
            if moved and min(w.ready_s[w.out[p, 0]], start_s) >= until_s:
                return True
            if finish_pass(w, p):
                return True
        elif moved and start_s >= until_s:
            return True
        elif not start_pass(w, prompts, tokens, p, choose(w, p, start_s), start_s):
            return False
        moved = True


@compiled
def emptiest(w: World, is_token: bool) -> int:
    """Give the pipeline with the fewest requests that has a free row."""
    best = -1
    for p in range(len(w.role)):
        fits = (w.role[p] == TOKEN) == is_token and w.num_seated[p] < w.num_microbatches[p] * w.num_rows[p]
        if fits and (best < 0 or w.num_seated[p] < w.num_seated[best]):
            best = p
    return best


@compiled
def admit(w: World, is_token: bool, time_s: float) -> int:
    """Seat the first waiting request in the emptiest microbatch; give its pipeline."""
    w.moments[NOW] = max(w.moments[NOW], time_s)
    p = emptiest(w, is_token)
    best, most = -1, 0
    for m in range(w.first[p], w.first[p] + w.num_microbatches[p]):
        free = w.num_rows[p] - w.num_pending[m] - w.num_active[m]
        if free > most:
            best, most = m, free
    place = READY_FROM if is_token else ARRIVED
    job = w.queue_jobs[w.counts[place]] if is_token else w.counts[place]
    w.counts[place] += 1
    w.seen_s[job] = w.moments[NOW] + w.settings[0]
    w.pending_jobs[best, w.num_pending[best]] = job
    w.num_pending[best] += 1
    w.num_seated[p] += 1
    w.free[int(is_token)] -= 1
    if not is_token:
        w.admitted_s[job] = w.moments[NOW]
        w.reserves[job] = w.left[job] > 1
        w.counts[RESERVED] += w.reserves[job]
    if not w.in_line[best]:
        w.ready_s[best] = w.seen_s[job]
        enter_line(w, p, best)
    return p


@compiled
def entry_s(w: World) -> float:
    """Give when the next request can take a row at the entry."""
    job = w.counts[ARRIVED]
    if job == len(w.arrival_s) or not w.free[0]:
        return INFINITY
    may = w.left[job] == 1 or w.counts[RESERVED] < w.settings[2]
    return float(w.arrival_s[job]) if may else INFINITY


@compiled
def soonest(w: World) -> int:
    """Give the pipeline whose next event is first."""
    best = 0
    for p in range(1, len(w.next_s)):
        if w.next_s[p] < w.next_s[best]:
            best = p
    return best


@compiled
def run(w: World, prompts: Grid, tokens: Grid) -> bool:
    """Drive everything to its end in the order of time; tell whether that was possible."""
    for p in range(len(w.role)):
        note_next(w, p)
    while True:
        p = soonest(w)
        first_s = w.next_s[p]
        arrival_s = entry_s(w)
        is_waiting = w.free[1] > 0 and w.counts[READY_FROM] < w.counts[READY_TO]
        ready_s = w.queue_s[w.counts[READY_FROM]] if is_waiting else INFINITY
        admission_s = min(arrival_s, ready_s)
        is_due = len(w.role) > 1 and first_s <= max(admission_s, w.moments[NOW]) + SAME_S and next_is_return(w, p)
        if admission_s <= first_s and admission_s < INFINITY and not is_due:
            p = admit(w, ready_s <= arrival_s, admission_s)
        elif first_s < INFINITY:
            w.next_s[p] = INFINITY
            if not drive(w, prompts, tokens, p, min(w.next_s[soonest(w)], admission_s)):
                return False
        else:
            return True
        note_next(w, p)
