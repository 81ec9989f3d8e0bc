"""Write a report's numbers as tables of text: for pages, for Markdown, for CSV."""

import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from dejavu.measure.render import format_bytes, format_number, format_percent, format_seconds, format_value
from dejavu.measure.report.charts import GB, best_ceiling, idle
from dejavu.measure.report.compare import METRICS, SCALES, Estimate, Group
from dejavu.measure.report.runs import Run


@dataclass(frozen=True, slots=True)
class TextTable:
    """Hold a table of text: a title, the heads, rows of as many cells, and how to read them where that needs words."""

    title: str
    heads: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]
    note: str = ""

    def markdown(self) -> str:
        """Write the table in GitHub's Markdown, under its title."""
        lines = [self.heads, tuple("---" for _ in self.heads), *self.rows]
        text = "\n".join("| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |" for line in lines)
        return f"## {self.title}\n\n{text}\n" + (f"\n{self.note}\n" if self.note else "")


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
    times += [("exposed hand-over of KV", "handover"), ("wait for a token row", "row_wait")]
    cancelled = f", {value['cancelled_requests']:.0f} cancelled" if value.get("cancelled_requests") else ""
    lines = [
        ("requests", f"{value['requests']:.0f} in {format_seconds(value['makespan_s'])}{cancelled}"),
        ("throughput", f"{format_number(value['tokens_per_s'])} tokens/s"),
        ("request rate", f"{format_number(value['requests_per_s'])} requests/s"),
        ("tokens", f"{value['prompt_tokens']:.0f} prompt, {value['output_tokens']:.0f} output"),
    ]
    for name, key in times:
        middle, tail = (value.get(f"{p}_{key}_s", math.nan) for p in ("p50", "p95"))
        if middle == middle:
            lines.append((name, f"{format_seconds(middle)} median, {format_seconds(tail)} p95"))
    lines.append(("idle by stage", ", ".join(f"{stage}: {format_percent(v)}" for stage, v in idle(run).items()) or "-"))
    if not run.is_cut_off:
        lines.append(("peak KV of a worker", format_bytes(int(value["peak_kv_bytes"]))))
    if stall_ms := value.get("swap_stall_ms"):
        lines.append(("wait of a pass for swapped KV", f"{format_seconds(stall_ms / 1e3)} in the mean"))
    return lines


def transfer_table(run: Run) -> TextTable:
    """Sum transfers up by what moved and how, each beside a plain copy of as many bytes, where one was made."""
    groups: dict[tuple[str, str], list[tuple[int, float]]] = {}
    for move in run.transfers:
        groups.setdefault((move.kind, move.transport), []).append((move.bytes, move.end_s - move.start_s))
    rows = []
    for (kind, transport), moves in groups.items():
        sizes, times = zip(*moves, strict=True)
        rate = sum(sizes) / sum(times) / GB if sum(times) > 0 else math.nan
        ceiling = (best_ceiling(run, kind, transport) or (0, math.nan))[1]
        each = format_bytes(round(statistics.median(sizes))), format_seconds(statistics.median(times))
        cells = (format_number(rate), format_number(ceiling), format_percent(rate / ceiling))
        rows.append((kind, transport, str(len(moves)), format_bytes(sum(sizes)), *each, *cells))
    heads = ("what", "carrier", "transfers", "bytes", "median size", "median time", "GB/s", "plain copy GB/s", "of it")
    return TextTable("Transfers", heads, tuple(rows), transfer_note(run))


def transfer_note(run: Run) -> str:
    """Say how the rates are to be read."""
    kinds = {move.kind for move in run.transfers}
    notes = ["Plain copies are as long as the median transfer, made at the end of the run."] if run.ceilings else []
    if "handover" in kinds:
        notes.append(
            "A hand-over leaves layer by layer while its prompt is computed, and takes as long as that: what a request"
            " waits for is the exposed hand-over."
        )
    if "flush" in kinds:
        notes.append("A flush is a step's new tokens, in many short pieces, behind the step.")
    return " ".join(notes)


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
    ratio = estimate.over(first)
    return interval(estimate) + (f" ({interval(ratio)} x)" if ratio.count else "")


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
