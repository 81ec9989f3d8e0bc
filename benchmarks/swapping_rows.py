"""Put serving with and without swapping beside each other, and beside what was predicted: rows and a picture."""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from dejavu.measure.records import TransferRecord
from dejavu.measure.run_directory import RunDirectory
from dejavu.measure.summary import covered
from dejavu.planning.lengths import Lengths
from dejavu.planning.planner import ADMISSION_S
from dejavu.planning.setup import PipelineSetup, Setup, Swap
from dejavu.planning.simulator import simulate
from dejavu.planning.swapping import SwapCase
from dejavu.planning.times import FixedTimes

from .driver import Row, finish
from .passes import PassTimes, fit_admission, fit_passes
from .plots import COLORS

if TYPE_CHECKING:
    from .swapping import Case, Options, Served

SHOWN = {
    "model": "model",
    "stages": "stages",
    "prompt_len": "prompt",
    "output_len": "output",
    "batch": "batch",
    "swapped_batch": "swapped",
    "plain_tokens_per_s": "tok/s",
    "swapped_tokens_per_s": "swapped tok/s",
    "speedup": "gain",
    "simulated_speedup": "simulated",
    "simulated_difference_percent": "sim %",
    "plan_speedup": "plan: steps",
    "plan_pays": "pays",
    "stall_ms_per_step": "stall ms",
    "overlap_percent": "hidden %",
    "wrong": "wrong",
}


def report(
    directory: RunDirectory, served: "Sequence[tuple[Case, dict[str, Served]]]", options: "Options", given: Row
) -> int:
    """Write and print everything; give the exit code."""
    rows = [make_row(case, ways, options) for case, ways in served]
    plot(rows, directory.path / "swapping.png")
    table = [{name: row[column] for column, name in SHOWN.items()} for row in rows]
    wrong = sum(row["wrong"] for row in rows)
    error = f"{wrong} requests got other tokens than without swapping" if wrong else None
    notes = [
        f"{row['model']}, {row['stages']} stages, {row['prompt_len']} + {row['output_len']}: {row['verdict']}"
        for row in rows
    ]
    notes += describe_sharing(options)
    return finish(directory, "swapping", rows, given, table=table, notes=notes, error=error)


def describe_sharing(options: "Options") -> list[str]:
    """Say that ranks take turns on GPUs, where they do: passes begin late then, and look short."""
    from dejavu.device import num_cuda_devices

    if options.is_synthetic or options.shared["device"] == "cpu":
        return []
    num_gpus, stages = num_cuda_devices(), max(case.stages for case in options.cases)
    if not 0 < num_gpus < stages:
        return []
    return [f"{stages} ranks take turns on {num_gpus} GPUs: the times of their passes predict no throughput"]


def make_row(case: "Case", ways: "dict[str, Served]", options: "Options") -> Row:
    """Give the row of one case."""
    plain, swapped, roomy = ways["plain"], ways["swapped"], ways["roomy"]
    times, admission_s = fit(roomy, case.stages)
    planned = SwapCase(
        case.prompt_len,
        case.output_len,
        case.swapped_batch,
        times.token_s,
        swapped.token_bytes,
        options.link_bytes_s,
        case.swapped_batch / case.batch,
    )
    predicted = {way: predict(case, ways[way], options, admission_s, times) for way in ("plain", "swapped")}
    return {
        "model": case.model,
        "stages": case.stages,
        "prompt_len": case.prompt_len,
        "output_len": case.output_len,
        "requests": case.num_requests,
        "batch": case.batch,
        "swapped_batch": case.swapped_batch,
        "kv_bytes": swapped.kv_bytes,
        "plain_kv_bytes": plain.kv_bytes,
        "link_gbps": options.link_bytes_s / 1e9,
        "token_ms": 1e3 * times.token_s,
        "plain_tokens_per_s": plain.tokens_per_s,
        "swapped_tokens_per_s": swapped.tokens_per_s,
        "roomy_tokens_per_s": roomy.tokens_per_s,
        "speedup": swapped.tokens_per_s / plain.tokens_per_s,
        "cost_percent": 100 * (roomy.tokens_per_s / swapped.tokens_per_s - 1),
        "simulated_tokens_per_s": predicted["swapped"],
        "simulated_difference_percent": 100 * (predicted["swapped"] / swapped.tokens_per_s - 1),
        "simulated_speedup": predicted["swapped"] / predicted["plain"],
        "plan_speedup": planned.speedup,
        "plan_pays": planned.pays,
        **movement(swapped),
        "wrong": count_wrong(swapped, roomy),
        "verdict": planned.verdict(),
    }


def fit(served: "Served", stages: int) -> tuple[PassTimes, float]:
    """Give how long passes took, and how long a request's way to its first one."""
    admitted_s = [completion.admitted_s for completion in served.completions]
    return fit_passes(served.steps, 0, stages), fit_admission(served.steps, [0], admitted_s, ADMISSION_S)


def predict(case: "Case", served: "Served", options: "Options", admission_s: float, roomy: PassTimes) -> float:
    """Simulate a way of serving and give its tokens per second; swapped passes take what those without need."""
    config = served.config
    times = roomy if config.swap else fit(served, case.stages)[0]
    pipeline = PipelineSetup(
        case.stages,
        FixedTimes(times.prompt_s, times.token_s),
        rows=config.microbatch_size,
        max_prompt_tokens=config.max_prompt_tokens,
        hop_s=times.hop_s,
        swap=Swap(served.token_bytes, options.link_bytes_s) if config.swap else None,
    )
    requests = [Lengths(case.prompt_len, case.output_len)] * case.num_requests
    return simulate(Setup((pipeline,), admission_s=admission_s), requests).tokens_per_s


def movement(served: "Served") -> Row:
    """Give what was moved in swapping, what passes waited for it, and which part was hidden beside other work."""
    steps = [step for step in served.steps if step.kind == "token"]
    stall_ms = sum(step.swap_stall_ms for step in served.steps)
    fetches, flushes = ([move for move in served.transfers if move.kind == kind] for kind in ("fetch", "flush"))
    moving_s = sum(busy_s(served.transfers, rank) for rank in {move.rank for move in served.transfers})
    return {
        "fetched_bytes": sum(move.bytes for move in fetches),
        "flushed_bytes": sum(move.bytes for move in flushes),
        "fetch_ms": mean_ms(fetches),
        "flush_ms": mean_ms(flushes),
        "fetch_gbps": sum(move.bytes for move in fetches) / max(1e-9, sum(m.end_s - m.start_s for m in fetches)) / 1e9,
        "stall_ms_per_step": stall_ms / max(1, len(steps)),
        "overlap_percent": 100 * (1 - min(1.0, stall_ms / 1e3 / moving_s)) if moving_s else None,
    }


def busy_s(transfers: Sequence[TransferRecord], rank: int) -> float:
    """Give how long a rank had something on its way."""
    spans = [(move.start_s, move.end_s) for move in transfers if move.rank == rank]
    return covered(np.array(spans))


def mean_ms(moves: Sequence[TransferRecord]) -> float:
    """Give the mean time of transfers; 0 of none."""
    return 1e3 * sum(move.end_s - move.start_s for move in moves) / max(1, len(moves))


def count_wrong(served: "Served", reference: "Served") -> int:
    """Count the requests whose tokens differ."""
    pairs = zip(served.completions, reference.completions, strict=True)
    return sum(mine.token_ids != other.token_ids for mine, other in pairs)


def plot(rows: Sequence[Row], path: Path) -> None:
    """Write a PNG: throughput without and with swapping, the prediction as a mark, for each case."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(max(6.0, 1.6 * len(rows)), 4.5), layout="constrained")
    axes = figure.subplots()
    places = np.arange(len(rows))
    bars: list[tuple[str, str]] = [("plain", "without swapping"), ("swapped", "swapping"), ("roomy", "memory for all")]
    for index, (way, label) in enumerate(bars):
        heights = [row[f"{way}_tokens_per_s"] for row in rows]
        axes.bar(places + 0.27 * (index - 1), heights, 0.25, color=COLORS[index], label=label)
    simulated = [row["simulated_tokens_per_s"] for row in rows]
    axes.plot(places, simulated, "k_", markersize=18, label="swapping, simulated")
    labels = [f"{row['model']}\n{row['stages']} stages\n{row['prompt_len']} + {row['output_len']}" for row in rows]
    axes.set_xticks(places, labels, fontsize=8)
    axes.set(ylabel="output tokens per second", title="the same memory for KV")
    axes.grid(visible=True, axis="y", alpha=0.25)
    axes.legend(fontsize=8)
    FigureCanvasAgg(figure).print_png(str(path))
