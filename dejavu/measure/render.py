"""Draw a run's summary for people: few digits, units, 80 columns."""

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from dejavu.measure.summary import HANDOVERS, LATENCIES, Percentiles, Summary

if TYPE_CHECKING:
    from rich.console import RenderableType

MOST_OUTPUTS = 12
LONGEST_OUTPUT = 150  # characters: two lines or so
TITLES = {
    **dict(zip(LATENCIES, ("time to first token", "time per later token", "latency per output token"), strict=True)),
    **dict(zip(HANDOVERS, ("exposed hand-over of KV", "wait for a token row"), strict=True)),
}


def render_summary(summary: Summary) -> "RenderableType":
    """Draw a summary as a rich table that reads well in 80 columns."""
    from rich import box
    from rich.console import Group
    from rich.table import Table

    facts = Table(box=None, show_header=False, pad_edge=False, padding=(0, 2, 0, 0))
    facts.add_column(style="bold", no_wrap=True)
    facts.add_column()
    for name, text in summary_facts(summary):
        facts.add_row(name, text)
    latencies = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    latencies.add_column("latency", style="bold", no_wrap=True)
    for percentile in Percentiles._fields:
        latencies.add_column(percentile, justify="right", min_width=9, no_wrap=True)
    for key, name in TITLES.items():
        measured = summary.latencies[key]
        if key in LATENCIES or measured.p50 == measured.p50:
            latencies.add_row(name, *map(format_seconds, measured))
    return Group(latencies, facts)


def render_outputs(outputs: Sequence[Mapping[str, Any]], num_requests: int) -> "RenderableType":
    """Draw the first texts, each cut to a few lines; the run directory has them all, and whole.

    `outputs` are the first lines of outputs.jsonl, which has `num_requests`.
    """
    from rich.table import Table
    from rich.text import Text

    shown = [output for output in outputs if output["text"] is not None][:MOST_OUTPUTS]
    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0))
    table.add_column("request", style="bold", max_width=24, no_wrap=True)
    table.add_column("end", style="dim", no_wrap=True)
    table.add_column("output")
    for output in shown:
        name, text = one_line(output["request_id"], 24), one_line(output["text"])
        table.add_row(Text(name), output["finish_reason"] or "-", Text(text))
    if 0 < len(shown) < num_requests:
        table.add_row(Text("...", style="dim"), "", Text(f"and {num_requests - len(shown)} more", style="dim"))
    return table


def one_line(text: str, most: int = LONGEST_OUTPUT) -> str:
    """Put a text into one line of at most so many characters, without what could steer a terminal."""
    line = " ".join("".join(char if char.isprintable() else " " for char in text[: 4 * most]).split())
    return line if len(line) <= most else line[: most - 1].rstrip() + "…"


def summary_facts(summary: Summary) -> list[tuple[str, str]]:
    """Give the named lines of the drawn summary, in order."""
    cancelled = f", {summary.cancelled_requests} cancelled" if summary.cancelled_requests else ""
    good = f", {format_number(summary.goodput_requests_per_s)} within limits"
    idle = "  ".join(f"{stage}:{format_percent(part)}" for stage, part in enumerate(summary.stage_idle_fractions))
    stall = f"a pass waits {format_number(summary.swap_stall_ms)} ms for its microbatch"
    return [
        ("requests", f"{summary.requests}{cancelled} in {format_seconds(summary.makespan_s)}"),
        ("tokens", f"{summary.prompt_tokens} prompt, {summary.output_tokens} output"),
        (
            "throughput",
            f"{format_number(summary.tokens_per_s)} tokens/s, {format_number(summary.requests_per_s)} requests/s"
            + (good if summary.good_requests < summary.requests else ""),
        ),
        ("idle by stage", idle),
        ("peak KV", format_bytes(summary.peak_kv_bytes)),
        *([("swapping", stall)] if summary.swap_stall_ms else []),
    ]


def format_number(value: float) -> str:
    """Write a number with three digits, more only before the point; `-` for NaN."""
    if value != value:
        return "-"
    exponent = int(f"{value:.2e}".partition("e")[2])  # of the rounded number: 9.996 is 10.0
    return f"{value:.{max(0, 2 - exponent)}f}" if value else "0"


def format_value(value: object) -> str:
    """Write any cell of a table for people: numbers with few digits, `-` for nothing."""
    if value is None or value == "":
        return "-"
    if isinstance(value, bool):
        return "yes" if value else "no"
    return format_number(value) if isinstance(value, float) else str(value)


def format_seconds(seconds: float) -> str:
    """Write a time with three digits in the unit that suits it."""
    if seconds != seconds or abs(seconds) >= 0.9995:
        return format_number(seconds) + ("" if seconds != seconds else " s")
    scale, unit = (1e3, "ms") if abs(seconds) >= 0.9995e-3 else (1e6, "µs")
    return f"{format_number(seconds * scale)} {unit}"


def format_percent(fraction: float) -> str:
    """Write a fraction as a whole percentage; `-` for NaN."""
    return "-" if fraction != fraction else f"{100 * fraction:.0f}%"


def format_bytes(count: int) -> str:
    """Write a number of bytes with three digits in a power of 1024."""
    units = ("B", "KiB", "MiB", "GiB", "TiB")
    power = min(max(count.bit_length() - 1, 0) // 10, len(units) - 1)
    return f"{format_number(count / 1024**power)} {units[power]}" if power else f"{count} B"
