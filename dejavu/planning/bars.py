"""Draw a sweep: makespan and cost over the number of machines, one bar per kind of layout."""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dejavu.planning.sweep import KINDS, SweepRow

if TYPE_CHECKING:
    from matplotlib.axes import Axes

FIGURES = {"makespan_s": "makespan, s", "cost": "cost of the machine-hours"}


def best_rows(rows: Sequence[SweepRow]) -> list[SweepRow]:
    """Give the batch with the least makespan for each number of machines and kind of layout."""
    best: dict[tuple[int, str], SweepRow] = {}
    for row in rows:
        key = row.machines, row.layout
        if key not in best or row.makespan_s < best[key].makespan_s:
            best[key] = row
    return list(best.values())


def draw_sweep(path: Path, rows: Sequence[SweepRow]) -> None:
    """Write a PNG of the best rows: makespan above, cost below."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 7), layout="constrained")
    panels: Any = figure.subplots(len(FIGURES), sharex=True)
    for panel, (column, label) in zip(panels, FIGURES.items(), strict=True):
        draw_panel(panel, best_rows(rows), column)
        panel.set_ylabel(label)
    panels[0].legend()
    panels[-1].set_xlabel("machines")
    figure.savefig(path, dpi=120)


def draw_panel(panel: "Axes", rows: Sequence[SweepRow], column: str) -> None:
    """Draw one bar per kind beside each other at each number of machines."""
    width = 0.8 / len(KINDS)
    for index, kind in enumerate(KINDS):
        of_kind = [row for row in rows if row.layout == kind]
        places = [row.machines + (index - (len(KINDS) - 1) / 2) * width for row in of_kind]
        panel.bar(places, [getattr(row, column) for row in of_kind], width, label=kind)
