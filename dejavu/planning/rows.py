"""Turn what planner and simulators give into rows: the columns of CSV files and of the last line of JSON."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from dejavu.errors import UsageError
from dejavu.measure.records import write_table
from dejavu.planning.paper import PaperPlan
from dejavu.planning.paper_simulator import PaperResult
from dejavu.planning.planner import Plan, Scored
from dejavu.planning.result import Result

Row = dict[str, Any]


def spread(name: str, values: NDArray[np.float64]) -> Row:
    """Give the columns of a distribution; NaN is left out."""
    values = values[~np.isnan(values)]
    if not len(values):
        return {f"{name}_{part}": float("nan") for part in ("median", "p95", "p99", "max", "min")}
    return {
        f"{name}_median": float(np.median(values)),
        f"{name}_p95": float(np.percentile(values, 95)),
        f"{name}_p99": float(np.percentile(values, 99)),
        f"{name}_max": float(values.max()),
        f"{name}_min": float(values.min()),
    }


def paper_result_row(result: PaperResult) -> Row:
    """Give the row of a simulation in paper mode."""
    return {
        "requests": len(result.end_s),
        "makespan_s": result.makespan_s,
        "throughput_requests_per_s": result.throughput_requests_per_s,
        **spread("latency_per_token_s", result.latency_per_token_s),
    }


def result_row(result: Result) -> Row:
    """Give the row of a simulation; idle fractions by pipeline and stage."""
    idle = {
        f"pipeline{pipeline}_stage{stage}_idle_fraction": fraction
        for pipeline, stages in enumerate(result.idle_fractions)
        for stage, fraction in enumerate(stages)
    }
    return {
        "requests": len(result.requests),
        "makespan_s": result.makespan_s,
        "throughput_requests_per_s": result.requests_per_s,
        "throughput_tokens_per_s": result.tokens_per_s,
        **spread("latency_per_token_s", result.latency_per_token_s),
        **spread("ttft_s", result.ttft_s),
        **spread("tpot_s", result.tpot_s),
        "swap_stall_s": result.stall_s,
        **idle,
    }


def paper_plan_row(plan: PaperPlan) -> Row:
    """Give the row of the closed form."""
    return {
        "prompt_devices": plan.prompt_devices,
        "token_devices": plan.token_devices,
        "min_prompt_devices": plan.min_prompt_devices,
        "min_token_devices": plan.min_token_devices,
        "disaggregation_pays": plan.pays,
        "colocated_ms": plan.colocated_ms,
        "disaggregated_ms": plan.disaggregated_ms,
        "speedup": plan.speedup,
    }


def plan_rows(plan: Plan, most: int = 10) -> list[Row]:
    """Give the rows of the best layouts."""
    return [scored_row(rank, scored) for rank, scored in enumerate(plan.ranked[:most], 1)]


def scored_row(rank: int, scored: Scored) -> Row:
    """Give the row of one layout; times are NaN where it does not fit."""
    layout, result = scored.layout, scored.result
    nan = float("nan")
    return {
        "rank": rank,
        "layout": layout.kind,
        "tp": layout.tp,
        "prompt_stages": layout.prompt_stages,
        "token_stages": layout.stages,
        "replicas": layout.replicas,
        "prompt_devices": layout.prompt_devices,
        "token_devices": layout.token_devices,
        "batch": layout.batch,
        "swap": layout.swap,
        "score_requests_per_s": scored.score,
        "makespan_s": result.makespan_s if result else nan,
        "ttft_s_median": float(np.median(result.ttft_s)) if result else nan,
        "tpot_s_median": float(spread("tpot_s", result.tpot_s)["tpot_s_median"]) if result else nan,
        "latency_per_token_s_median": float(np.median(result.latency_per_token_s)) if result else nan,
        "reason": scored.reason,
    }


def json_line(bench: str, run: Path | None, rows: Sequence[Mapping[str, Any]]) -> str:
    """Give the last line of a command's output; what is not a number becomes null."""
    cleaned = [{name: finite(value) for name, value in row.items()} for row in rows]
    return json.dumps({"bench": bench, "run": str(run) if run else None, "rows": cleaned}, allow_nan=False)


def finite(value: Any) -> Any:
    """Give None for a float that JSON cannot write."""
    return None if isinstance(value, float) and not np.isfinite(value) else value


def write_rows(path: Path, rows: Sequence[Mapping[str, Any]]) -> None:
    """Write rows as CSV; raise UsageError where that is impossible."""
    columns = list(dict.fromkeys(name for row in rows for name in row))
    try:
        write_table(path, columns, ([row.get(name) for name in columns] for row in rows))
    except OSError as error:
        raise UsageError(f"cannot write {path} ({error.strerror}): name a writable directory with --out") from None
