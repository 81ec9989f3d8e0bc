"""Draw how arrangements serve: latency over the rate of requests, and makespans where all come at once."""

from collections.abc import Sequence
from pathlib import Path

from .driver import Row
from .plots import COLORS


def plot_serving(rows: Sequence[Row], path: Path, title: str) -> None:
    """Write a PNG: normalized latency over rate on the left, makespan bars on the right."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 4.5), layout="constrained")
    latency, bars = figure.subplots(1, 2)
    names = list(dict.fromkeys(row["arrangement"] for row in rows))
    for name, color in zip(names, COLORS, strict=False):
        own = [row for row in rows if row["arrangement"] == name]
        line = sorted((row["rate"], row["p50_normalized_latency_s"]) for row in own if row["rate"])
        latency.plot([rate for rate, _ in line], [value for _, value in line], "o-", color=color, label=name)
        at_once = [row["makespan_s"] for row in own if not row["rate"]]
        bars.bar([name], at_once[:1], color=color)
    latency.set(xlabel="requests per second", ylabel="median latency per output token, s")
    latency.set_ylim(bottom=0)
    latency.legend(fontsize=8)
    bars.set(ylabel="makespan, s", title="all requests at once")
    for axes in (latency, bars):
        axes.grid(visible=True, axis="y", alpha=0.25)
    figure.suptitle(title)
    FigureCanvasAgg(figure).print_png(str(path))
