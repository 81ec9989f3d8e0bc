"""Draw how arrangements serve, latency over the rate of requests and makespans; and what streaming slows serving by."""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from .driver import Row
from .plots import COLORS

if TYPE_CHECKING:
    from matplotlib.axes import Axes

PHASES = {"prompt": "prompt pass", "token": "token step", "cache": "whole cache"}


def plot_serving(rows: Sequence[Row], path: Path, title: str) -> None:
    """Write a PNG: normalized latency over rate on the left, where there are rates; makespan bars on the right."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    names = list(dict.fromkeys(row["arrangement"] for row in rows))
    has_rates = any(row["rate"] for row in rows)
    figure = Figure(figsize=(11 if has_rates else 6, 4.5), layout="constrained")
    bars = figure.add_subplot(1, 2, 2) if has_rates else figure.add_subplot()
    if has_rates:
        plot_latency(rows, names, figure.add_subplot(1, 2, 1))
    for name, color in zip(names, COLORS, strict=False):
        at_once = [row["makespan_s"] for row in rows if row["arrangement"] == name and not row["rate"]]
        bars.bar([name], at_once[:1], color=color)
    bars.set(ylabel="makespan, s", title="all requests at once")
    bars.grid(visible=True, axis="y", alpha=0.25)
    figure.suptitle(title)
    FigureCanvasAgg(figure).print_png(str(path))


def plot_latency(rows: Sequence[Row], names: Sequence[str], axes: "Axes") -> None:
    """Draw a line for each arrangement."""
    for name, color in zip(names, COLORS, strict=False):
        own = [row for row in rows if row["arrangement"] == name]
        line = sorted((row["rate"], row["p50_normalized_latency_s"]) for row in own if row["rate"])
        axes.plot([rate for rate, _ in line], [value for _, value in line], "o-", color=color, label=name)
    axes.set(xlabel="requests per second", ylabel="median latency per output token, s")
    axes.set_ylim(bottom=0)
    axes.legend(fontsize=8)
    axes.grid(visible=True, axis="y", alpha=0.25)


def plot_slowdown(rows: Sequence[Row], path: Path, title: str) -> None:
    """Write a PNG: what each level of streaming slows a pass by, in bars, with the least and the most of the turns."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 4), layout="constrained")
    axes = figure.add_subplot()
    levels = list(dict.fromkeys(row["optimization"] for row in rows if row["optimization"] != "none"))
    width = 0.8 / max(len(levels), 1)
    for index, (level, color) in enumerate(zip(levels, COLORS, strict=False)):
        own = [row for row in rows if row["optimization"] == level]
        middles = [row["slowdown_percent"] for row in own]
        reach = [[m - row["slowdown_min"] for m, row in zip(middles, own, strict=True)]]
        reach.append([row["slowdown_max"] - m for m, row in zip(middles, own, strict=True)])
        places = [place + (index - (len(levels) - 1) / 2) * width for place in range(len(own))]
        axes.bar(places, middles, width * 0.9, color=color, label=level, yerr=reach, ecolor="gray", capsize=3)
    phases = list(dict.fromkeys(row["phase"] for row in rows))
    axes.set_xticks(range(len(phases)), [PHASES[phase] for phase in phases])
    axes.axhline(0, color="black", linewidth=0.8)
    axes.set(ylabel="slow-down beside no streaming, %", title=title)
    axes.grid(visible=True, axis="y", alpha=0.25)
    axes.legend(fontsize=8, title="streaming")
    FigureCanvasAgg(figure).print_png(str(path))
