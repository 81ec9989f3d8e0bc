"""Write a report's numbers as tables of text: for pages, for Markdown, for CSV."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from dejavu.measure.render import format_bytes, format_number, format_percent, format_seconds, format_value
from dejavu.measure.report.compare import METRICS, SCALES, Estimate, Group
from dejavu.measure.report.runs import Run

GB = 1e9


@dataclass(frozen=True, slots=True)
class TextTable:
    """Hold a table of text: a title, the heads, and rows of as many cells."""

    title: str
    heads: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]

    def markdown(self) -> str:
        """Write the table in GitHub's Markdown, under its title."""
        lines = [self.heads, tuple("---" for _ in self.heads), *self.rows]
        text = "\n".join("| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |" for line in lines)
        return f"## {self.title}\n\n{text}\n"


def run_tables(run: Run) -> list[TextTable]:
    """Give the tables of one run; none that it has no records for."""
    tables = []
    if run.summary:
        tables.append(TextTable("Summary", ("measure", "value"), tuple(facts(run))))
    if run.transfers:
        tables.append(transfer_table(run))
    if ranks := run.description.get("ranks"):
        tables.append(rank_table(run, ranks))
    for name, rows in run.tables.items():
        if rows:
            tables.append(TextTable(name, tuple(rows[0]), tuple(map(csv_cells, rows))))
    return tables


def facts(run: Run) -> list[tuple[str, str]]:
    """Name the numbers of a run's summary that people look for first."""
    value = run.summary
    times = [("time to first token", "ttft"), ("time per later token", "tpot")]
    times.append(("latency per output token", "normalized_latency"))
    lines = [
        ("requests", f"{value['requests']:.0f} in {format_seconds(value['makespan_s'])}"),
        ("throughput", f"{format_number(value['tokens_per_s'])} tokens/s"),
        ("request rate", f"{format_number(value['requests_per_s'])} requests/s"),
    ]
    for name, key in times:
        middle, tail = value[f"p50_{key}_s"], value[f"p95_{key}_s"]
        lines.append((name, f"{format_seconds(middle)} median, {format_seconds(tail)} p95"))
    idle = [f"{n[5:].split('_')[0]}: {format_percent(v)}" for n, v in value.items() if n.endswith("_idle_fraction")]
    lines.append(("idle by stage", ", ".join(idle) or "-"))
    lines.append(("peak KV of a worker", format_bytes(int(value["peak_kv_bytes"]))))
    return lines


def transfer_table(run: Run) -> TextTable:
    """Sum transfers up by what moved and how, each beside the ceiling that was measured for its link, if any was."""
    groups: dict[tuple[str, str], list[tuple[int, float]]] = {}
    for move in run.transfers:
        groups.setdefault((move.kind, move.transport), []).append((move.bytes, move.end_s - move.start_s))
    ceilings = run.description.get("ceilings_gbps") or {}
    rows = []
    for (kind, transport), moves in groups.items():
        total, seconds = sum(size for size, _ in moves), sum(time for _, time in moves)
        rate = total / seconds / GB if seconds > 0 else math.nan
        ceiling = float(ceilings.get(transport, math.nan))
        cells = (format_number(rate), format_number(ceiling), format_percent(rate / ceiling))
        rows.append((kind, transport, str(len(moves)), format_bytes(total), *cells))
    heads = ("what", "carrier", "transfers", "bytes", "GB/s while moving", "ceiling GB/s", "of ceiling")
    return TextTable("Transfers", heads, tuple(rows))


def rank_table(run: Run, ranks: Sequence[dict[str, object]]) -> TextTable:
    """List the ranks: what each does, where, and the share of a core that it took."""
    shares = {record.rank: record.core_share for record in run.ranks}
    rows = []
    for rank in ranks:
        layers = rank.get("layers")
        span = f"{layers[0]} to {layers[1] - 1}" if isinstance(layers, list) and layers[1] > layers[0] else "-"
        place = "-" if "stage" not in rank else f"{rank['stage']}.{rank['tp_rank']}"
        share = format_percent(shares.get(int(str(rank["rank"])), math.nan))
        named = (str(rank["rank"]), str(rank["role"]), place, span)
        rows.append((*named, str(rank.get("host", "")), str(rank.get("device", "")), share))
    heads = ("rank", "role", "stage.tensor rank", "layers", "host", "device", "of a core")
    return TextTable("Ranks", heads, tuple(rows))


def comparison_table(groups: Sequence[Group]) -> TextTable:
    """Set the groups side by side, one metric a row: mean, half width of the 95 % interval, ratio to the first."""
    rows = []
    for metric, title in METRICS.items():
        estimates = [group.estimate(metric).times(SCALES.get(metric, 1.0)) for group in groups]
        if any(estimate.count for estimate in estimates):
            first = estimates[0]
            cells = [interval(first), *(beside(estimate, first) for estimate in estimates[1:])]
            rows.append((title, *cells))
    heads = ("measure", *(f"{group.label} ({len(group.runs)} x)" for group in groups))
    return TextTable("Side by side", heads, tuple(rows))


def interval(estimate: Estimate) -> str:
    """Write a mean with its interval, where there is one."""
    half = f" ± {format_number(estimate.half_width)}" if estimate.half_width == estimate.half_width else ""
    return format_number(estimate.mean) + half


def beside(estimate: Estimate, first: Estimate) -> str:
    """Write an estimate and how many times the first one it is."""
    return f"{interval(estimate)} ({interval(estimate.over(first))} x)"


def csv_cells(row: Mapping[str, str]) -> tuple[str, ...]:
    """Write a row of a CSV file for people."""
    return tuple(format_value(read_cell(cell)) for cell in row.values())


def read_cell(cell: str) -> str | float:
    """Read a cell of a CSV file as the number that it is, unless it is a whole one, or words."""
    try:
        value = float(cell)
    except (TypeError, ValueError):
        return cell
    return cell if value.is_integer() and "." not in cell else value
