"""The picture of a profile: the paper's Figure 2, prompts and token steps over length, and their ratio."""

from collections.abc import Sequence
from pathlib import Path

from .driver import Row
from .plots import COLORS


def plot_passes(rows: Sequence[Row], path: Path, title: str) -> None:
    """Draw the times of prompts and token steps, with the roofline dashed, and how many steps a prompt takes."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(15, 5), layout="constrained")
    prompts, tokens, ratios = figure.subplots(1, 3)
    figure.suptitle(title)
    for axes, kind, column, label in (
        (prompts, "prompt", "ms", "prompt pass, ms"),
        (tokens, "token", "ms", "token step, ms"),
        (ratios, "prompt", "token_steps", "token steps in the time of a prompt pass"),
    ):
        draw(axes, [row for row in rows if row["kind"] == kind], column)
        axes.set_xlabel("tokens of a row")
        axes.set_ylabel(label)
        axes.set_ylim(bottom=0)
        axes.grid(alpha=0.3)
    prompts.plot([], [], "--", color="gray", linewidth=0.9, label="roofline")
    prompts.legend()
    FigureCanvasAgg(figure).print_png(str(path))


def draw(axes: object, rows: Sequence[Row], column: str) -> None:
    """Draw a line for each batch and tensor degree."""
    groups = sorted({(row["tp"], row["batch"]) for row in rows})
    for (tp, batch), color in zip(groups, COLORS * 3, strict=False):
        line = sorted((r for r in rows if (r["tp"], r["batch"]) == (tp, batch)), key=lambda row: row["length"])
        lengths = [row["length"] for row in line]
        label = f"batch {batch}, tp {tp}"
        axes.plot(lengths, [row[column] for row in line], "o-", color=color, label=label)  # type: ignore[attr-defined]
        if column == "ms":
            rooflines = [row["roofline_ms"] for row in line]
            axes.plot(lengths, rooflines, "--", color=color, linewidth=0.9)  # type: ignore[attr-defined]
