"""Set runs beside each other: repeats of one configuration as one column, with confidence intervals and ratios."""

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from dejavu.measure.report.runs import Run

SAME_WHATEVER = frozenset({"seed", "out", "name", "progress"})
METRICS = {
    "tokens_per_s": "tokens/s",
    "requests_per_s": "requests/s",
    "makespan_s": "makespan, s",
    "p50_ttft_s": "time to first token, p50, ms",
    "p95_ttft_s": "time to first token, p95, ms",
    "p50_tpot_s": "time per later token, p50, ms",
    "p95_tpot_s": "time per later token, p95, ms",
    "p50_normalized_latency_s": "latency per output token, p50, ms",
    "p95_normalized_latency_s": "latency per output token, p95, ms",
    "p95_handover_s": "exposed hand-over of KV, p95, ms",
    "p95_row_wait_s": "wait for a token row, p95, ms",
    "peak_kv_bytes": "peak KV, MiB",
}
# To the unit of the title, where it is not the column's.
SCALES = {name: 1e3 for name in METRICS if name.startswith("p")} | {"peak_kv_bytes": 2.0**-20}
# Two-sided 95 % points of Student's t for 1, 2, ... degrees of freedom; beyond the table the normal's.
T_95 = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228, 2.201, 2.179, 2.160, 2.145, 2.131)
NORMAL_95 = 1.96


@dataclass(frozen=True, slots=True)
class Estimate:
    """Hold a mean and half the width of its 95 % confidence interval; NaN width for a single measurement."""

    mean: float
    half_width: float
    count: int

    @classmethod
    def of(cls, values: Sequence[float]) -> "Estimate":
        """Estimate from repeats; NaN ones are left out."""
        kept = np.array([value for value in values if value == value], dtype=np.float64)
        if kept.size == 0:
            return cls(math.nan, math.nan, 0)
        if kept.size == 1:
            return cls(float(kept[0]), math.nan, 1)
        error = float(kept.std(ddof=1)) / math.sqrt(kept.size)
        return cls(float(kept.mean()), student(kept.size - 1) * error, int(kept.size))

    def times(self, factor: float) -> "Estimate":
        """Give the estimate in another unit."""
        return Estimate(self.mean * factor, self.half_width * factor, self.count)

    def over(self, base: "Estimate") -> "Estimate":
        """Give the ratio to another estimate; relative errors add in squares (delta method)."""
        if not base.mean or not self.count or not base.count:
            return Estimate(math.nan, math.nan, 0)
        ratio = self.mean / base.mean
        parts = [e.half_width / e.mean for e in (self, base) if e.half_width == e.half_width and e.mean]
        half = abs(ratio) * math.hypot(*parts) if parts else math.nan
        return Estimate(ratio, half, min(self.count, base.count))


def student(degrees: int) -> float:
    """Give the two-sided 95 % point of Student's t."""
    return T_95[degrees - 1] if degrees <= len(T_95) else NORMAL_95


@dataclass(frozen=True, slots=True)
class Group:
    """Hold the repeats of one configuration; runs that differ in nothing but seed and name are repeats."""

    label: str
    runs: tuple[Run, ...]

    def estimate(self, metric: str) -> Estimate:
        """Estimate a column of summary.csv over the repeats."""
        return Estimate.of([run.summary.get(metric, math.nan) for run in self.runs])


def group_runs(runs: Sequence[Run]) -> list[Group]:
    """Join repeats, in order of appearance, and label each group by the options in which it differs."""
    by_config: dict[str, list[Run]] = {}
    for run in runs:
        by_config.setdefault(signature(run), []).append(run)
    groups = list(by_config.values())
    varying = varying_options([group[0].config for group in groups])
    labels = [label_of(group[0], varying) for group in groups]
    if len(set(labels)) < len(labels):
        labels = [group[0].name for group in groups]
    return [Group(label, tuple(group)) for label, group in zip(labels, groups, strict=True)]


def signature(run: Run) -> str:
    """Give what repeats have in common; a run with a failure is no repeat of one without."""
    config = {name: value for name, value in run.config.items() if name not in SAME_WHATEVER}
    return json.dumps(
        [bool(run.failures), config, run.description.get("git"), run.machine], sort_keys=True, default=str
    )


def varying_options(configs: Sequence[Mapping[str, Any]]) -> list[str]:
    """Name the options that are not the same everywhere."""
    names = dict.fromkeys(name for config in configs for name in config if name not in SAME_WHATEVER)
    return [name for name in names if len({json.dumps(c.get(name), default=str) for c in configs}) > 1]


def label_of(run: Run, varying: Sequence[str]) -> str:
    """Name a run by its values of the varying options that it has switched on."""
    idle = {"pp", "dp"} if run.config.get("prompt_pp") else {"dp"} if run.config.get("dp") == 1 else set()
    telling = [name for name in varying if run.config.get(name) and name not in idle]
    parts = [f"{name.replace('_', '-')} {run.config[name]}" for name in telling]
    return ", ".join(parts) or run.name


def comparison_rows(groups: Sequence[Group]) -> list[dict[str, Any]]:
    """Give one row per configuration: every metric with its interval, and its ratio to the first configuration."""
    rows = []
    for group in groups:
        row: dict[str, Any] = {"run": group.label, "repeats": len(group.runs)}
        for metric in METRICS:
            estimate, base = group.estimate(metric), groups[0].estimate(metric)
            ratio = estimate.over(base)
            row |= {metric: estimate.mean, f"{metric}_ci95": estimate.half_width}
            row |= {f"{metric}_ratio": ratio.mean, f"{metric}_ratio_ci95": ratio.half_width}
        rows.append(row)
    return rows
