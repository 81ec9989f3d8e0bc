"""Lay pipelines and requests out in flat arrays, for `compiled` to simulate; requests are numbered by their arrival."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from dejavu.planning.lengths import Lengths
from dejavu.planning.setup import PipelineSetup, Setup
from dejavu.planning.times import Line, Tabled

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]

BOTH, PROMPT, TOKEN = 0, 1, 2
ROLES = {"both": BOTH, "prompt": PROMPT, "token": TOKEN}
RESERVED, ARRIVED, READY_FROM, READY_TO = range(4)  # places in `World.counts`
NOW = 0  # place in `World.moments`


class Grid(NamedTuple):
    """Hold measured times of pipelines [pipeline, batch, length], as `profile.Profile` has them; seconds."""

    num_batches: Ints  # [pipeline]
    batches: Floats  # [pipeline, batch]
    num_lengths: Ints  # [pipeline, batch]
    lengths: Floats
    seconds: Floats


class World(NamedTuple):
    """Hold everything that a simulation reads and changes. A row of `*_jobs` is the microbatch's own."""

    # of each pipeline
    role: Ints
    depth: Ints  # stages, less one
    num_microbatches: Ints
    first: Ints  # number of its first microbatch
    num_rows: Ints  # of each microbatch
    chunk: Ints
    most_tokens: Ints  # of a prompt pass
    span: Ints  # of context, over which a token step takes the same; 0 is all
    hop_s: Floats
    back_s: Floats
    by_share: Ints  # whether a prompt pass takes its share of the prompts' time
    overhead_s: Floats
    num_lines: Ints
    line_start_s: Floats  # [pipeline, line]: see `flow.Flow`
    line_slope_s: Floats
    clock_s: Floats
    turn: Ints
    num_seated: Ints
    waiting: Ints  # [pipeline, place]: microbatches in line for stage 0
    num_waiting: Ints
    out: Ints  # [pipeline, place]: microbatches under way
    num_out: Ints
    next_s: Floats
    work_s: Floats
    num_passes: Ints
    # of each microbatch
    ready_s: Floats
    in_line: Ints
    steps: Ints
    context: Ints
    stepping: Ints
    num_pending: Ints
    num_prompting: Ints  # the first of the pending
    num_active: Ints
    num_fresh: Ints
    step_s: Floats
    step_rows: Ints  # for so many rows, and
    step_span: Ints  # this span of context, `step_s` is
    pending_jobs: Ints
    prompting_tokens: Ints
    active_jobs: Ints
    active_ends: Ints  # the microbatch's step with which the request ends
    # of each request
    arrival_s: Floats
    prompt: Ints
    left: Ints  # tokens to produce
    prompt_left: Ints
    seen_s: Floats
    reserves: Ints
    admitted_s: Floats
    first_s: Floats
    arrived_s: Floats
    begun_s: Floats
    finish_s: Floats
    # of the whole
    counts: Ints
    moments: Floats
    queue_s: Floats  # requests that wait for a token row, first to be ready first
    queue_jobs: Ints
    free: Ints  # rows of the entry, and of the token side
    settings: Floats  # admission_s, cache_s, most requests that may hold memory of the token side


def fits(setup: Setup) -> bool:
    """Tell whether machine code can simulate a setup."""
    plain = all(isinstance(each.times, Tabled) and not (each.swap or each.replication) for each in setup.pipelines)
    return plain and not setup.failures


def make_grid(tables: Sequence[Sequence[Line]]) -> Grid:
    """Put the lines of each pipeline's times into arrays."""
    most_lines = max(len(lines) for lines in tables)
    most = max(len(line.points) for lines in tables for line in lines)
    grid = Grid(
        num_batches=np.array([len(lines) for lines in tables]),
        batches=np.zeros((len(tables), most_lines)),
        num_lengths=np.zeros((len(tables), most_lines), dtype=np.int64),
        lengths=np.zeros((len(tables), most_lines, most)),
        seconds=np.zeros((len(tables), most_lines, most)),
    )
    for p, lines in enumerate(tables):
        for b, (batch, points) in enumerate(lines):
            grid.batches[p, b], grid.num_lengths[p, b] = batch, len(points)
            grid.lengths[p, b, : len(points)], grid.seconds[p, b, : len(points)] = zip(*points, strict=True)
    return grid


def make_world(setup: Setup, requests: Sequence[Lengths]) -> tuple[World, Grid, Grid]:
    """Give the state before anything has happened, and the times of prompts and of token steps.

    `requests` are in the order of their arrival.
    """
    tables = [each.times.table() for each in setup.pipelines if isinstance(each.times, Tabled)]
    assert len(tables) == len(setup.pipelines)
    world = World(
        **pipeline_arrays(setup.pipelines),
        span=np.array([table.span for table in tables]),
        by_share=np.array([int(table.by_share) for table in tables]),
        overhead_s=np.array([table.overhead_s for table in tables]),
        **microbatch_arrays(setup.pipelines),
        **request_arrays(requests),
        **shared_arrays(setup, len(requests)),
    )
    return world, make_grid([table.prompt for table in tables]), make_grid([table.token for table in tables])


def pipeline_arrays(pipelines: Sequence[PipelineSetup]) -> dict[str, Any]:
    """Describe the pipelines, which nobody has used yet."""
    counts = np.array([each.num_microbatches for each in pipelines])
    num, most = len(pipelines), int(counts.max())
    return {
        "role": np.array([ROLES[each.role] for each in pipelines]),
        "depth": np.array([each.stages - 1 for each in pipelines]),
        "num_microbatches": counts,
        "first": np.cumsum(counts) - counts,
        "num_rows": np.array([each.rows for each in pipelines]),
        "chunk": np.array([each.prompt_chunk for each in pipelines]),
        "most_tokens": np.array([each.max_prompt_tokens for each in pipelines]),
        "hop_s": np.array([each.hop_s for each in pipelines]),
        "back_s": np.array([each.return_s for each in pipelines]),
        "line_start_s": np.zeros((num, most + 16)),
        "line_slope_s": np.zeros((num, most + 16)),
        "waiting": np.zeros((num, most), dtype=np.int64),
        "out": np.zeros((num, most), dtype=np.int64),
        **{name: np.zeros(num) for name in ("clock_s", "next_s", "work_s")},
        **zeros(num, "num_lines", "turn", "num_seated", "num_waiting", "num_out", "num_passes"),
    }


def microbatch_arrays(pipelines: Sequence[PipelineSetup]) -> dict[str, Any]:
    """Describe the microbatches, which are empty."""
    num = sum(each.num_microbatches for each in pipelines)
    rows = max(each.rows for each in pipelines)
    counts = ("pending", "prompting", "active", "fresh")
    lists = ("pending_jobs", "prompting_tokens", "active_jobs", "active_ends")
    return {
        "ready_s": np.zeros(num),
        "step_s": np.zeros(num),
        **zeros(num, "in_line", "steps", "context", "stepping", "step_rows", "step_span"),
        **zeros(num, *[f"num_{name}" for name in counts]),
        **{name: np.zeros((num, rows), dtype=np.int64) for name in lists},
    }


def request_arrays(requests: Sequence[Lengths]) -> dict[str, Any]:
    """Describe the requests, none of which has begun."""
    prompt, output, arrival = zip(*requests, strict=True)
    never = ("seen_s", "admitted_s", "first_s", "arrived_s", "begun_s", "finish_s")
    return {
        "arrival_s": np.array(arrival, dtype=np.float64),
        "prompt": np.array(prompt, dtype=np.int64),
        "left": np.array(output, dtype=np.int64),
        "prompt_left": np.array(prompt, dtype=np.int64),
        **zeros(len(requests), "reserves"),
        **{name: np.full(len(requests), np.nan) for name in never},
    }


def shared_arrays(setup: Setup, num_requests: int) -> dict[str, Any]:
    """Describe what pipelines share."""
    rows = [sum(each.num_rows for each in setup.pipelines if (each.role == "token") == token) for token in (0, 1)]
    ahead = setup.prompt_ahead
    most = np.inf if ahead is None or not setup.is_disaggregated else rows[1] + ahead
    return {
        **zeros(4, "counts"),
        "moments": np.zeros(1),
        "queue_s": np.zeros(num_requests),
        "queue_jobs": np.zeros(num_requests, dtype=np.int64),
        "free": np.array(rows),
        "settings": np.array([setup.admission_s, setup.cache_s, most]),
    }


def zeros(count: int, *names: str) -> dict[str, Any]:
    """Give so many zeros for each name."""
    return {name: np.zeros(count, dtype=np.int64) for name in names}
