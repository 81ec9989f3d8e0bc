"""Pictures of a benchmark's rows, as PNG files."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from .driver import Row
from .shapes import format_size

COLORS = ("#1f77b4", "#ff7f0e", "#2ca02c", "#d62728", "#9467bd", "#8c564b", "#e377c2", "#17becf")
MARKERS = {"prompt": "s", "token_step": "^", "microbatch": "D"}


def lines_of(rows: Sequence[Row]) -> dict[str, list[Row]]:
    """Group the messages of plain sizes by carrier and direction, ascending in bytes."""
    lines: dict[str, list[Row]] = {}
    for row in sorted(rows, key=lambda row: row["bytes"]):
        if row["operation"] in ("contiguous", "plain"):
            lines.setdefault(line_name(row), []).append(row)
    return lines


def line_name(row: Row) -> str:
    """Name a carrier's line; a store has one for each direction, and NCCL's own calls have one."""
    if row["operation"] == "plain":
        return f"{row['transport']} alone"
    if row["target"] in ("host", "disk"):
        return f"{row['transport']} out"
    return f"{row['transport']} in" if row["source"] in ("host", "disk") else str(row["transport"])


def plot_bandwidth(rows: Sequence[Row], path: Path, title: str) -> None:
    """Draw bandwidth over bytes: a line and a dashed ceiling for each carrier, and marks for what serving moves."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10, 6), layout="constrained")
    axes = figure.add_subplot()
    lines = lines_of(rows)
    names = list(dict.fromkeys([*lines, *(line_name(row) for row in rows if row["operation"] in MARKERS)]))
    for name, color in zip(names, COLORS * 2, strict=False):
        line = lines.get(name, [])
        sizes = [row["bytes"] for row in line]
        if line:
            axes.plot(sizes, [row["bandwidth_gbps"] for row in line], "o-", color=color, label=name, markersize=4)
            axes.plot(sizes, [row["ceiling_gbps"] for row in line], "--", color=color, linewidth=0.9, alpha=0.7)
        for row in rows:
            if row["operation"] in MARKERS and line_name(row) == name:
                faint = {"naive": "none"}.get(row["optimization"], color)
                mark = MARKERS[row["operation"]]
                axes.plot(row["bytes"], row["bandwidth_gbps"], mark, color=color, markerfacecolor=faint, markersize=7)
    decorate(axes, title)
    FigureCanvasAgg(figure).print_png(str(path))


def decorate(axes: Any, title: str) -> None:
    """Label the axes, and say what marks and dashes are."""
    from matplotlib.lines import Line2D

    kinds = [Line2D([], [], color="gray", linestyle="--", label="ceiling")]
    for operation, mark in MARKERS.items():
        kinds.append(Line2D([], [], color="gray", marker=mark, linestyle="", label=operation.replace("_", " ")))
    kinds.append(Line2D([], [], color="gray", marker="s", markerfacecolor="none", linestyle="", label="naive (hollow)"))
    axes.set(
        xscale="log",
        yscale="log",
        xlabel="bytes of a message",
        ylabel="bandwidth, GB/s",
        title=f"KV streaming on {title}",
    )
    axes.set_xscale("log", base=4)
    axes.xaxis.set_major_formatter(lambda nbytes, _: format_size(round(nbytes)))
    axes.grid(visible=True, which="both", alpha=0.25)
    first = axes.legend(loc="lower right", fontsize=8, title="contiguous, by carrier")
    axes.add_artist(first)
    axes.legend(handles=kinds, loc="upper left", fontsize=8)
