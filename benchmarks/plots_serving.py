"""Draw how arrangements serve: latency over the rate of requests, and makespans where all come at once."""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from .driver import Row
from .plots import COLORS

if TYPE_CHECKING:
    from matplotlib.axes import Axes


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
