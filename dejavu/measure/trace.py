"""Draw a run as a timeline in the Trace Event Format, which ui.perfetto.dev and chrome://tracing open.

One process per rank, in it one thread per kind of work: computing, handing on, and each carrier's transfers. Requests
are asynchronous slices of the controller; an arrow follows each step of a microbatch from stage to stage, and each
request's KV from a prompt pipeline to a token pipeline; failures are marks through all tracks.
Format: docs.google.com/document/d/1CvAClvFfyA5R-PhYUmn5OOQtYMH4h6I0nSsKchNAySU (times in microseconds).
"""

import heapq
import json
import math
from bisect import bisect_left, bisect_right
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from dejavu.measure.failures import FailureRecord
from dejavu.measure.files import replacing
from dejavu.measure.records import RequestRecord, StepRecord, TransferRecord

if TYPE_CHECKING:
    from dejavu.topology import Topology

CONTROLLER = 0
COMPUTE = "compute"
HAND_ON = "hand on"

Event = dict[str, Any]


class Slice(NamedTuple):
    """Hold one piece of work of a rank, on the thread of its kind; seconds after the run's start."""

    rank: int
    thread: str
    name: str
    start_s: float
    end_s: float
    args: dict[str, Any]


@dataclass(frozen=True, slots=True)
class Tracks:
    """Say what each rank is, such as "stage 0", and how the stages, numbered through all pipelines, form pipelines."""

    rank_names: Mapping[int, str]
    first_stages: tuple[int, ...] = (0,)
    hands_over: bool = False  # the first pipeline's requests go on in the second

    @classmethod
    def of(cls, topology: "Topology") -> "Tracks":
        """Describe a run's ranks."""
        names = {CONTROLLER: "controller"}
        for place in topology.workers:
            assert place.shard is not None
            tensor_rank = f" tensor rank {place.shard.tp_rank}" if place.shard.tp_size > 1 else ""
            names[place.rank] = f"{place.role} stage {place.stage}{tensor_rank}"
        roles = [pipeline.role.value for pipeline in topology.pipelines]
        return cls(names, tuple(p.first_stage for p in topology.pipelines), "prompt" in roles)

    def pipeline(self, stage: int) -> int:
        """Give the pipeline that a stage is part of."""
        return bisect_right(self.first_stages, stage) - 1


def write_trace(
    path: Path,
    layout: Tracks,
    steps: Sequence[StepRecord],
    requests: Sequence[RequestRecord] = (),
    transfers: Sequence[TransferRecord] = (),
    failures: Sequence[FailureRecord] = (),
) -> None:
    """Write the timeline of a run, one event a line."""
    with replacing(path) as file:
        file.write('{"displayTimeUnit": "ms", "traceEvents": [')
        separator = "\n"
        for event in trace_events(layout, steps, requests, transfers, failures):
            file.write(separator + json.dumps(event, allow_nan=False))
            separator = ",\n"
        file.write("\n]}\n")


def trace_events(
    layout: Tracks,
    steps: Sequence[StepRecord],
    requests: Sequence[RequestRecord] = (),
    transfers: Sequence[TransferRecord] = (),
    failures: Sequence[FailureRecord] = (),
) -> Iterator[Event]:
    """Yield the events of a run: names first, then slices by rank and thread, requests, arrows, and failures."""
    rank_names = layout.rank_names
    slices = sorted(chain(step_slices(steps), transfer_slices(transfers)), key=lambda piece: piece.start_s)
    tracks: dict[tuple[int, str], list[Slice]] = defaultdict(list)
    for piece in slices:
        tracks[piece.rank, piece.thread].append(piece)
    threads = {thread: index for index, thread in enumerate(thread_order(tracks))}
    for rank in sorted({*rank_names, *(rank for rank, _ in tracks)}):
        yield from name_event("process", rank, 0, f"rank {rank}: {rank_names.get(rank, 'worker')}", rank)
    for (rank, thread), pieces in sorted(tracks.items(), key=lambda item: (item[0][0], threads[item[0][1]])):
        yield from track_events(rank, thread, threads[thread] * 100, pieces)
    end_s = max((piece.end_s for piece in slices), default=0.0)
    for index, request in enumerate(requests):
        yield from request_events(index, request, end_s)
    tid = threads.get(COMPUTE, 0) * 100
    paths = [*step_paths(layout, steps), *(handover_paths(layout, steps, requests))]
    for index, (name, path) in enumerate(paths):
        yield from arrow_events(index, name, path, tid)
    for failure in failures:
        yield from failure_events(failure)


def step_slices(steps: Iterable[StepRecord]) -> Iterator[Slice]:
    """Cut each step into what it computed and, where it took any time, handing the result on."""
    for step in steps:
        args = {
            "microbatch": step.microbatch,
            "step": step.step,
            "stage": step.stage,
            "rows": step.num_rows,
            "tokens": step.num_tokens,
        }
        name = f"{step.kind} m{step.microbatch}"
        yield Slice(step.rank, COMPUTE, name, step.start_s, step.compute_end_s, args)
        if step.end_s > step.compute_end_s:
            yield Slice(step.rank, HAND_ON, name, step.compute_end_s, step.end_s, args)


def transfer_slices(transfers: Iterable[TransferRecord]) -> Iterator[Slice]:
    """Make a slice of each transfer, on the thread of its kind and carrier."""
    for move in transfers:
        seconds = move.end_s - move.start_s
        args: dict[str, Any] = {"bytes": move.bytes, "source": move.source, "target": move.target}
        if seconds > 0:
            args["gbps"] = move.bytes / seconds / 1e9
        name = f"{move.kind} {move.source}→{move.target}"
        yield Slice(move.rank, f"{move.kind} ({move.transport})", name, move.start_s, move.end_s, args)


def thread_order(tracks: Iterable[tuple[int, str]]) -> list[str]:
    """Give the kinds of thread from top to bottom: compute, hand on, then transfers by name."""
    return sorted({thread for _, thread in tracks}, key=lambda thread: (thread != COMPUTE, thread != HAND_ON, thread))


def track_events(rank: int, thread: str, first_tid: int, pieces: Iterable[Slice]) -> Iterator[Event]:
    """Yield the slices of one kind, in order of start; a slice that overlaps another gets a further lane."""
    lanes: list[tuple[float, int]] = []  # (busy until, tid): a thread's slices must not overlap
    for piece in pieces:
        if lanes and lanes[0][0] <= piece.start_s:
            _, tid = heapq.heappop(lanes)
        else:
            tid = first_tid + len(lanes)
            yield from name_event("thread", rank, tid, thread if tid == first_tid else f"{thread} {len(lanes)}", tid)
        heapq.heappush(lanes, (piece.end_s, tid))
        yield {
            "ph": "X",
            "pid": rank,
            "tid": tid,
            "name": piece.name,
            "cat": thread,
            "ts": to_us(piece.start_s),
            "dur": max(0.0, to_us(piece.end_s) - to_us(piece.start_s)),
            "args": piece.args,
        }


def request_events(index: int, request: RequestRecord, end_s: float) -> Iterator[Event]:
    """Yield a request's life as nested asynchronous slices: waiting, prompt, tokens; open ends reach to `end_s`."""
    moments = [request.arrival_s, request.admitted_s, request.first_token_s, request.finish_s]
    known = [moment for moment in moments if not math.isnan(moment)]
    last_s = max(end_s, *known) if math.isnan(request.finish_s) else request.finish_s
    args: dict[str, Any] = {"prompt_tokens": request.prompt_tokens, "output_tokens": request.output_tokens}
    if request.finish_reason is not None:
        args["finish_reason"] = request.finish_reason.value
    name = f"request {request.request_id}"
    yield async_event("b", index, name, request.arrival_s) | {"args": args}
    for phase, start_s, stop_s in zip(("waiting", "prompt", "tokens"), moments, moments[1:], strict=False):
        if not math.isnan(start_s):
            yield async_event("b", index, phase, start_s)
            yield async_event("e", index, phase, last_s if math.isnan(stop_s) else stop_s)
    yield async_event("e", index, name, last_s)


def step_paths(layout: Tracks, steps: Iterable[StepRecord]) -> Iterator[tuple[str, list[StepRecord]]]:
    """Follow each step of a microbatch through the leaders of its pipeline's stages."""
    paths: dict[tuple[int, int, int], list[StepRecord]] = defaultdict(list)
    for step in steps:
        if step.tp_rank == 0:
            paths[layout.pipeline(step.stage), step.microbatch, step.step].append(step)
    for path in paths.values():
        yield "step", sorted(path, key=lambda step: step.start_s)


def handover_paths(
    layout: Tracks, steps: Iterable[StepRecord], requests: Iterable[RequestRecord]
) -> Iterator[tuple[str, list[StepRecord]]]:
    """Follow each request's KV from the pass that ended its prompt to its first token step in the other pipeline."""
    if not layout.hands_over:
        return
    first = layout.first_stages[1]
    ends = sorted((s for s in steps if s.tp_rank == 0 and s.stage == first - 1), key=lambda step: step.start_s)
    starts = sorted((s for s in steps if s.tp_rank == 0 and s.stage == first), key=lambda step: step.start_s)
    for request in requests:
        source = bisect_right(ends, request.first_token_s, key=lambda step: step.start_s) - 1
        target = bisect_left(starts, request.token_start_s, key=lambda step: step.start_s)
        if source >= 0 and target < len(starts) and not math.isnan(request.token_start_s):
            yield f"KV of {request.request_id}", [ends[source], starts[target]]


def arrow_events(index: int, name: str, path: Sequence[StepRecord], tid: int) -> Iterator[Event]:
    """Yield an arrow through some passes' slices, from the middle of each."""
    phases = ["s", *"t" * (len(path) - 2), "f"] if len(path) > 1 else []
    for phase, step in zip(phases, path, strict=False):
        event = {"ph": phase, "pid": step.rank, "tid": tid, "ts": to_us((step.start_s + step.compute_end_s) / 2)}
        yield event | {"id": index, "cat": name.split()[0], "name": name, "bp": "e"}


def failure_events(failure: FailureRecord) -> Iterator[Event]:
    """Mark a failure through all tracks: when it was noticed, and when the last request that it stalled went on."""
    who = f"{failure.target} (rank {failure.rank})"
    moments = {f"{who} lost": failure.detected_s, f"{who} recovered": failure.resumed_s}
    for name, moment_s in moments.items():
        if not math.isnan(moment_s):
            mark = {"ph": "i", "s": "g", "pid": CONTROLLER, "tid": 0, "cat": "failure"}
            yield mark | {"name": name, "ts": to_us(max(0.0, moment_s))}  # the trace begins with serving


def name_event(what: str, rank: int, tid: int, name: str, order: int) -> list[Event]:
    """Make the events that name a process or a thread, and put it in its place from the top."""
    place = {"ph": "M", "pid": rank, "tid": tid}
    return [
        place | {"name": f"{what}_name", "args": {"name": name}},
        place | {"name": f"{what}_sort_index", "args": {"sort_index": order}},
    ]


def async_event(phase: str, index: int, name: str, moment_s: float) -> Event:
    """Make one end of an asynchronous slice of the controller."""
    return {
        "ph": phase,
        "pid": CONTROLLER,
        "tid": 0,
        "cat": "request",
        "id": index,
        "name": name,
        "ts": to_us(moment_s),
    }


def to_us(seconds: float) -> float:
    """Turn seconds into the format's microseconds, to the nanosecond."""
    return round(seconds * 1e6, 3)
