"""Draw plots twice: as SVG that takes its colours and width from the page, and as PNG files.

A plot is a function of (axes, colours). For a page it is drawn with stand-in colours, which become CSS variables, so
that one picture suits light and dark; and at two widths, of which the page shows the one that fits.
"""

import io
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

NUM_SERIES = 8
WIDTHS = {"wide": 9.0, "narrow": 3.9}  # inches, shown at 100 a pixel

LETTER, KEY, MARGIN = 0.06, 0.5, 0.5  # inches: a letter of a legend, its line with the space around, beside the axes

Drawing = Callable[[Any, "Colors"], None]


@dataclass(frozen=True, slots=True)
class Colors:
    """Name the colours of a plot: text and lines, grid, and the series."""

    ink: str
    grid: str
    series: tuple[str, ...]


STAND_INS = Colors("#010201", "#010202", tuple(f"#0103{index:02x}" for index in range(NUM_SERIES)))
PRINT = Colors(
    "#222222",
    "#dddddd",
    ("#2f6fb5", "#d9822b", "#3a9a5c", "#c4474d", "#8a63b8", "#8c6d4f", "#4aa5b5", "#b8569b"),
)
DARK_SERIES = ("#6ea8e8", "#f0a860", "#6cc88c", "#ee8085", "#b795e0", "#c0a080", "#7accd8", "#e08ac6")


@dataclass(frozen=True, slots=True)
class Figure:
    """Hold a plot to be drawn: `name` for its file, a title, how to draw it, and its height in inches.

    `text` says the same in words, for who cannot see it.
    """

    name: str
    title: str
    text: str
    draw: Drawing
    height: float = 3.0


def css_variables() -> str:
    """Give the page's colour variables, for light and for dark."""

    def block(ink: str, grid: str, series: Sequence[str]) -> str:
        return f"--ink:{ink};--grid:{grid};" + "".join(f"--s{i}:{color};" for i, color in enumerate(series))

    return (
        f":root{{{block('#1c1e21', '#e2e4e8', PRINT.series)}}}"
        f"@media(prefers-color-scheme:dark){{:root{{{block('#e4e6ea', '#363a41', DARK_SERIES)}}}}}"
    )


def render(figure: Figure, colors: Colors, width: float) -> Any:
    """Draw a plot into a matplotlib figure of `width` inches."""
    from matplotlib.figure import Figure as Canvas

    canvas = Canvas(figsize=(width, figure.height), layout="constrained", facecolor="none")
    axes = canvas.add_subplot()
    figure.draw(axes, colors)
    axes.set_facecolor("none")
    axes.tick_params(colors=colors.ink, labelsize=9)
    axes.xaxis.label.set(color=colors.ink, fontsize=9)
    axes.yaxis.label.set(color=colors.ink, fontsize=9)
    for side, spine in axes.spines.items():
        spine.set_visible(side in ("left", "bottom"))
        spine.set_color(colors.grid)
    axes.grid(visible=True, axis="y", color=colors.grid, linewidth=0.6)
    axes.set_axisbelow(True)
    if labels := axes.get_legend_handles_labels()[1]:
        columns, place = legend_columns(labels, width), {"loc": "lower left", "bbox_to_anchor": (0, 1.0)}
        axes.legend(fontsize=8, frameon=False, labelcolor=colors.ink, ncols=columns, **place)
    return canvas


def legend_columns(labels: Sequence[str], width: float) -> int:
    """Give how many of a legend's entries go beside each other in `width` inches, at most three."""
    widest = max(len(label) for label in labels) * LETTER + KEY
    return min(3, max(1, int((width - MARGIN) / widest)))


def to_svg(figure: Figure, layout: str) -> str:
    """Give a plot as an inline SVG element of class `layout`, with CSS variables for colours."""
    import matplotlib as mpl
    from matplotlib.backends.backend_svg import FigureCanvasSVG

    settings = {"svg.fonttype": "none", "svg.hashsalt": f"{figure.name}-{layout}", "font.family": "sans-serif"}
    with mpl.rc_context(settings):
        buffer = io.StringIO()
        FigureCanvasSVG(render(figure, STAND_INS, WIDTHS[layout])).print_svg(buffer, metadata={"Date": None})
    return themed(buffer.getvalue(), figure, layout)


def themed(svg: str, figure: Figure, layout: str) -> str:
    """Make matplotlib's SVG file an element of the page: no prolog, no fixed size, the page's colours and fonts."""
    from html import escape

    svg = svg[svg.index("<svg") :]
    svg = re.sub(r"<metadata>.*?</metadata>", "", svg, flags=re.DOTALL)
    svg = re.sub(r'(<svg[^>]*?) width="[^"]*"', r"\1", svg, count=1)
    svg = re.sub(r'(<svg[^>]*?) height="[^"]*"', r"\1", svg, count=1)
    svg = re.sub(r"font: ([0-9.]+px)[^;\"]*", r"font-size: \1", svg)
    label = f'class="{layout}" role="img" aria-label="{escape(figure.title)}: {escape(figure.text)}"'
    svg = svg.replace("<svg", f"<svg {label}", 1)
    svg = svg.replace(STAND_INS.ink, "var(--ink)").replace(STAND_INS.grid, "var(--grid)")
    for index, stand_in in enumerate(STAND_INS.series):
        svg = svg.replace(stand_in, f"var(--s{index})")
    return re.sub(r' id="(?![mp][0-9a-f]{10})[^"]*"', "", svg)


def to_png(figure: Figure, directory: Path) -> Path:
    """Write a plot to NAME.png, with its title, and give the path."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg

    canvas = render(figure, PRINT, WIDTHS["wide"])
    canvas.suptitle(figure.title, fontsize=11, color=PRINT.ink)
    canvas.set_facecolor("white")
    path = directory / f"{figure.name}.png"
    FigureCanvasAgg(canvas).print_png(str(path))
    return path
