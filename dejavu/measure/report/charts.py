"""The plots of a report: latencies, throughput over time, stages at work, one metric over several runs."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from dejavu.measure.failures import FailureRecord
from dejavu.measure.records import StepRecord
from dejavu.measure.render import format_bytes
from dejavu.measure.report.figures import NUM_SERIES, Colors, Figure
from dejavu.measure.report.runs import MOST_ROWS, Run
from dejavu.measure.summary import percentiles

MOST_BARS = 3000  # of a timeline as shapes; more become one picture inside it
FEWEST_BINS, MOST_BINS, STEPS_A_BIN = 6, 60, 5  # of a throughput: single steps are no rate
KINDS = ("prompt", "token", "mixed")
GB = 1e9
LATENCY_NAMES = {
    "ttft_s": "time to first token",
    "tpot_s": "time per later token",
    "normalized_latency_s": "latency per output token",
}


def run_figures(run: Run) -> list[Figure]:
    """Give the plots of one serving run; none that it has no records for."""
    figures = []
    if any(request.finish_s == request.finish_s for request in run.requests):
        figures.append(latency_figure("latency", {run.name: run}, "ttft_s"))
        figures.append(latency_figure("latency-per-token", {run.name: run}, "normalized_latency_s"))
    if run.steps:
        figures += [throughput_figure({run.name: run}), timeline_figure(run)]
    if run.transfers:
        figures.append(transfer_figure(run))
    return figures


def comparison_figures(runs: Mapping[str, Run]) -> list[Figure]:
    """Give the plots that lay runs over each other, and the stages of each below."""
    served = {label: run for label, run in runs.items() if run.requests}
    figures = [latency_figure(f"compare-{name}", served, name) for name in LATENCY_NAMES] if served else []
    stepped = {label: run for label, run in runs.items() if run.steps}
    if stepped:
        figures.append(throughput_figure(stepped))
        until_s = max(step.end_s for run in stepped.values() for step in run.steps)
        figures += [timeline_figure(run, label, until_s) for label, run in stepped.items()]
    return figures


def latency_figure(name: str, runs: Mapping[str, Run], metric: str) -> Figure:
    """Draw which share of the requests had at most which latency."""
    values = {label: latencies(run, metric) for label, run in runs.items()}

    def draw(axes: Any, colors: Colors) -> None:
        for index, (label, sample) in enumerate(values.items()):
            shares = np.arange(len(sample) + 1) / max(len(sample), 1) * 100
            ends = np.concatenate([sample[:1], sample])
            color = colors.series[index % NUM_SERIES]
            axes.step(ends, shares[: len(ends)], where="post", color=color, label=label if len(values) > 1 else None)
        axes.set(xlabel=f"{LATENCY_NAMES[metric]}, s", ylabel="% of requests", ylim=(0, 103))
        axes.set_xlim(left=0)

    text = "; ".join(f"{label}: median {percentiles(sample).p50:.3g} s" for label, sample in values.items())
    return Figure(name, f"{LATENCY_NAMES[metric].capitalize()} by share of requests", text, draw)


def latencies(run: Run, metric: str) -> NDArray[np.float64]:
    """Give the sorted latencies of the requests that have one."""
    values = np.array([getattr(request, metric) for request in run.requests], dtype=np.float64)
    return np.sort(values[~np.isnan(values)])


def throughput_figure(runs: Mapping[str, Run]) -> Figure:
    """Draw tokens per second over the time of the run; dashed where a failure was seen, if it is one run."""
    lines = {label: throughput(run.steps, stages_per_copy(run), first_tokens(run)) for label, run in runs.items()}
    failures = next(iter(runs.values())).failures if len(runs) == 1 else []

    def draw(axes: Any, colors: Colors) -> None:
        for index, (label, (edges, rates)) in enumerate(lines.items()):
            color = colors.series[index % NUM_SERIES]
            axes.stairs(rates, edges, color=color, label=label if len(lines) > 1 else None, linewidth=1.4)
        draw_failures(axes, failures, colors)
        axes.set(xlabel="seconds of the run", ylabel="tokens/s")
        axes.set_xlim(left=0)
        axes.set_ylim(bottom=0)

    text = "; ".join(f"{label}: at most {max(rates, default=0):.3g} tokens/s" for label, (_, rates) in lines.items())
    return Figure("throughput", "Output tokens per second", text, draw)


def stages_per_copy(run: Run) -> int:
    """Count the stages through which each token goes: of one of `dp` pipelines, or of both where there is a pair."""
    config = run.description.get("config") or {}
    return int(config.get("pp") or 0) if (config.get("dp") or 1) > 1 else 0


def first_tokens(run: Run) -> list[float]:
    """Give when each request had its first token; mixed passes have counted them already."""
    if any(step.kind == "mixed" for step in run.steps):
        return []
    return [request.first_token_s for request in run.requests if request.first_token_s == request.first_token_s]


def throughput(
    steps: Sequence[StepRecord], stages_per_copy: int = 0, first_tokens_s: Sequence[float] = ()
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Count the rows of token steps, and first tokens, over time: (edges [bins + 1] in s, tokens/s [bins]).

    All stages of a pipeline see the same rows; the one with the most counts: a rank that died took its records along.
    Where pipelines of `stages_per_copy` stages share the requests, each has one that counts; 0 is one pipeline.
    """
    seen: dict[int, dict[int, list[StepRecord]]] = {}
    for step in steps:
        if step.kind != "prompt" and step.tp_rank == 0:
            copy = step.stage // stages_per_copy if stages_per_copy else 0
            seen.setdefault(copy, {}).setdefault(step.stage, []).append(step)
    fullest = [max(stages.values(), key=lambda found: sum(s.num_rows for s in found)) for stages in seen.values()]
    counted = [step for found in fullest for step in found]
    ends = np.array([step.end_s for step in counted] + list(first_tokens_s))
    rows = np.array([step.num_rows for step in counted] + [1] * len(first_tokens_s), dtype=np.float64)
    start_s = steps[0].start_s if len(steps) >= MOST_ROWS else 0.0  # those before are not here
    stop_s = max(step.end_s for step in steps)
    bins = min(max(len(counted) // STEPS_A_BIN, FEWEST_BINS), MOST_BINS)
    counts, edges = np.histogram(ends, bins=bins, range=(start_s, max(stop_s, start_s + 1e-9)), weights=rows)
    return edges, counts / np.diff(edges)


def timeline_figure(run: Run, label: str = "", until_s: float | None = None) -> Figure:
    """Draw when each worker computed prompts and tokens, to `until_s` or the end; the gaps are bubbles."""
    ranks = sorted({step.rank for step in run.steps})
    names = rank_names(run)
    title = f"Stages at work, {label}: gaps are bubbles" if label else "Stages at work: gaps are bubbles"

    def draw(axes: Any, colors: Colors) -> None:
        for index, kind in enumerate(KINDS):
            draw_bars(axes, [s for s in run.steps if s.kind == kind], ranks, colors.series[index], kind)
        draw_failures(axes, run.failures, colors)
        axes.set_xlim(0, until_s)
        axes.set_yticks(range(len(ranks)), [names.get(rank, f"rank {rank}") for rank in ranks])
        axes.set(xlabel="seconds of the run", ylim=(len(ranks) - 0.4, -0.6))

    busy = ", ".join(f"{stage} idle {value:.0%}" for stage, value in idle(run).items())
    name = f"timeline-{label}" if label else "timeline"
    return Figure(re_name(name), title, busy or "stages over time", draw, 1.1 + 0.42 * len(ranks))


def draw_bars(axes: Any, steps: Sequence[StepRecord], ranks: Sequence[int], color: str, kind: str) -> None:
    """Draw one bar for each pass, on the line of its rank."""
    if not steps:
        return
    lines = np.array([ranks.index(step.rank) for step in steps], dtype=np.float64)
    starts = np.array([step.start_s for step in steps])
    widths = np.array([step.compute_end_s for step in steps]) - starts
    corners = np.stack([starts, starts + widths, lines - 0.32, lines + 0.32], axis=1)
    from matplotlib.collections import PolyCollection

    shapes = corners[:, [[0, 2], [1, 2], [1, 3], [0, 3]]]
    bars = PolyCollection(list(shapes), facecolors=color, edgecolors="none", label=kind)
    bars.set_rasterized(len(steps) > MOST_BARS)
    axes.add_collection(bars)
    axes.autoscale_view()


def draw_failures(axes: Any, failures: Sequence[FailureRecord], colors: Colors) -> None:
    """Mark each failure by a dashed line, and the time until its requests were served again by a shade."""
    color = colors.series[3]
    for index, failure in enumerate(failures):
        axes.axvline(failure.detected_s, color=color, linestyle="--", linewidth=1, label=None if index else "failure")
        if failure.resumed_s == failure.resumed_s:
            shade = None if index else "until served again"
            axes.axvspan(failure.detected_s, failure.resumed_s, color=color, alpha=0.15, linewidth=0, label=shade)


def transfer_figure(run: Run) -> Figure:
    """Draw how fast each transfer was over its size, and what plain copies reached where that was measured."""
    kinds = list(dict.fromkeys((move.kind, move.transport) for move in run.transfers))
    sizes = sorted(max(move.bytes, 1) for move in run.transfers)

    def draw(axes: Any, colors: Colors) -> None:
        for kind, color in zip(kinds, colors.series * len(kinds), strict=False):
            moves = [
                move for move in run.transfers if (move.kind, move.transport) == kind and move.end_s > move.start_s
            ]
            rates = [move.bytes / (move.end_s - move.start_s) / GB for move in moves]
            marks = {"s": 30, "alpha": 0.5, "linewidths": 0, "rasterized": len(moves) > MOST_BARS}
            axes.scatter([move.bytes for move in moves], rates, color=color, label=" over ".join(kind), **marks)
            if ceiling := best_ceiling(run, *kind):
                axes.scatter(
                    *ceiling,
                    color=color,
                    marker="_",
                    s=300,
                    linewidths=2.5,
                    label=f"a plain copy as long as a {kind[0]}",
                )
        axes.set(yscale="log", xlabel="bytes of a transfer", ylabel="GB/s")
        axes.set_xscale("log", base=16)
        axes.set_xlim(sizes[0] / 4, sizes[-1] * 4)
        axes.xaxis.set_major_formatter(lambda nbytes, _: format_bytes(round(nbytes)))
        axes.yaxis.set_major_formatter(lambda rate, _: f"{rate:g}")

    return Figure("transfers", "Transfers beside plain copies", "as the table of transfers has it", draw, 3.4)


def best_ceiling(run: Run, kind: str, transport: str) -> tuple[int, float] | None:
    """Give the bytes and the GB/s of the fastest plain copy that a kind of transfer is held beside, if any was made."""
    own = [(c.gbps, c.bytes) for c in run.ceilings if (c.kind, c.transport) == (kind, transport)]
    return max(own)[::-1] if own else None


def rank_names(run: Run) -> dict[int, str]:
    """Name the workers by role and stage, with pipeline and tensor rank where there are several."""
    names = {}
    copies = (run.description.get("config") or {}).get("dp") or 1
    for rank in run.description.get("ranks") or []:
        if "stage" in rank:
            role = {"both": "stage"}.get(rank["role"], rank["role"])
            pipeline = f"pipeline {rank['pipeline']} " if copies > 1 and "pipeline" in rank else ""
            tensor_rank = f".{rank['tp_rank']}" if rank["tp_rank"] else ""
            names[rank["rank"]] = f"{pipeline}{role} {rank['stage']}{tensor_rank}"
    return names


def idle(run: Run) -> dict[str, float]:
    """Give the idle fractions of the summary, by the stage's name."""
    names = stage_names(run)
    found = {name[5:].split("_")[0]: value for name, value in run.summary.items() if name.endswith("_idle_fraction")}
    return {names.get(int(stage), f"stage {stage}"): value for stage, value in found.items()}


def stage_names(run: Run) -> dict[int, str]:
    """Name the stages of all pipelines, numbered through as in summary.csv."""
    names = rank_names(run)
    ranks = [rank for rank in run.description.get("ranks") or [] if "stage" in rank and not rank["tp_rank"]]
    return {number: names[rank["rank"]] for number, rank in enumerate(ranks)}


def re_name(name: str) -> str:
    """Make a file name of a label."""
    return "".join(mark if mark.isalnum() or mark in "-_" else "-" for mark in name)
