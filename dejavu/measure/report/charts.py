"""The plots of a report: latencies, throughput over time, stages at work, one metric over several runs."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from dejavu.measure.records import StepRecord
from dejavu.measure.report.figures import NUM_SERIES, Colors, Figure
from dejavu.measure.report.runs import Run
from dejavu.measure.summary import percentiles

MOST_BARS = 3000  # of a timeline as shapes; more become one picture inside it
THROUGHPUT_BINS = 60
KINDS = ("prompt", "token", "mixed")
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
    return figures


def comparison_figures(runs: Mapping[str, Run]) -> list[Figure]:
    """Give the plots that lay runs over each other, and the stages of each below."""
    served = {label: run for label, run in runs.items() if run.requests}
    figures = [latency_figure(f"compare-{name}", served, name) for name in LATENCY_NAMES] if served else []
    stepped = {label: run for label, run in runs.items() if run.steps}
    if stepped:
        figures.append(throughput_figure(stepped))
        figures += [timeline_figure(run, label) for label, run in stepped.items()]
    return figures


def latency_figure(name: str, runs: Mapping[str, Run], metric: str) -> Figure:
    """Draw which share of the requests had at most which latency."""
    values = {label: latencies(run, metric) for label, run in runs.items()}

    def draw(axes: Any, colors: Colors) -> None:
        for index, (label, sample) in enumerate(values.items()):
            shares = np.arange(1, len(sample) + 1) / max(len(sample), 1) * 100
            color = colors.series[index % NUM_SERIES]
            axes.step(sample, shares, where="post", color=color, label=label if len(values) > 1 else None)
        axes.set(xlabel=f"{LATENCY_NAMES[metric]}, s", ylabel="% of requests", ylim=(0, 103))
        axes.set_xlim(left=0)

    text = "; ".join(f"{label}: median {percentiles(sample).p50:.3g} s" for label, sample in values.items())
    return Figure(name, f"{LATENCY_NAMES[metric].capitalize()} by share of requests", text, draw)


def latencies(run: Run, metric: str) -> NDArray[np.float64]:
    """Give the sorted latencies of the requests that have one."""
    values = np.array([getattr(request, metric) for request in run.requests], dtype=np.float64)
    return np.sort(values[~np.isnan(values)])


def throughput_figure(runs: Mapping[str, Run]) -> Figure:
    """Draw tokens per second over the time of the run."""
    lines = {label: throughput(run.steps, stages_per_copy(run)) for label, run in runs.items()}

    def draw(axes: Any, colors: Colors) -> None:
        for index, (label, (edges, rates)) in enumerate(lines.items()):
            color = colors.series[index % NUM_SERIES]
            axes.stairs(rates, edges, color=color, label=label if len(lines) > 1 else None, linewidth=1.4)
        axes.set(xlabel="seconds of the run", ylabel="tokens/s")
        axes.set_ylim(bottom=0)

    text = "; ".join(f"{label}: at most {max(rates, default=0):.3g} tokens/s" for label, (_, rates) in lines.items())
    return Figure("throughput", "Output tokens per second", text, draw)


def stages_per_copy(run: Run) -> int:
    """Count the stages through which each token goes: of one of `dp` pipelines, or of both where there is a pair."""
    config = run.description.get("config") or {}
    return int(config.get("pp") or 0) if (config.get("dp") or 1) > 1 else 0


def throughput(
    steps: Sequence[StepRecord], stages_per_copy: int = 0
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Count the rows of token steps over time: (edges [bins + 1] in s, tokens/s [bins]).

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
    ends = np.array([step.end_s for step in counted])
    rows = np.array([step.num_rows for step in counted], dtype=np.float64)
    stop_s = max(step.end_s for step in steps)
    counts, edges = np.histogram(ends, bins=THROUGHPUT_BINS, range=(0.0, max(stop_s, 1e-9)), weights=rows)
    return edges, counts / np.diff(edges)


def timeline_figure(run: Run, label: str = "") -> Figure:
    """Draw when each worker computed prompts and tokens; the gaps are bubbles."""
    ranks = sorted({step.rank for step in run.steps})
    names = rank_names(run)
    title = "Stages at work" + (f": {label}" if label else "")

    def draw(axes: Any, colors: Colors) -> None:
        for index, kind in enumerate(KINDS):
            draw_bars(axes, [s for s in run.steps if s.kind == kind], ranks, colors.series[index], kind)
        for failure in run.failures:
            axes.axvline(failure.detected_s, color=colors.series[3], linestyle="--", linewidth=1)
        axes.set_yticks(range(len(ranks)), [names.get(rank, f"rank {rank}") for rank in ranks])
        axes.set(xlabel="seconds of the run", ylim=(len(ranks) - 0.4, -0.6))

    busy = ", ".join(f"stage {name[5:].split('_')[0]} idle {value:.0%}" for name, value in idle(run).items())
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
    """Give the idle fractions of the summary."""
    return {name: value for name, value in run.summary.items() if name.endswith("_idle_fraction")}


def re_name(name: str) -> str:
    """Make a file name of a label."""
    return "".join(mark if mark.isalnum() or mark in "-_" else "-" for mark in name)
