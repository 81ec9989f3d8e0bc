"""Draw a run's status for who watches it: what `status.json` holds, a few times a second."""

from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

from dejavu.measure.render import format_bytes, format_number, format_percent, format_seconds

if TYPE_CHECKING:
    from rich.console import RenderableType

BAR_WIDTH = 20
QUIET_S = 5.0  # without a new status, where five a second are usual
MOST_FAILURES = 8  # that are shown, so that the newest are on the screen


def draw_status(name: str, status: Mapping[str, Any], tokens_per_s: float, silence_s: float = 0.0) -> "RenderableType":
    """Draw one status, `silence_s` after it was written; what a run does not use is not shown.

    `tokens_per_s` is the rate over the last seconds.
    """
    from rich.panel import Panel
    from rich.table import Table

    table = Table(box=None, show_header=False, pad_edge=False, padding=(0, 2, 0, 0))
    table.add_column(style="bold", no_wrap=True)
    table.add_column()
    for label, value in status_lines(status, tokens_per_s):
        table.add_row(label, value)
    if status.get("state") == "serving" and silence_s > QUIET_S:
        table.add_row("no news", f"for {format_seconds(silence_s)}: the run recovers from a failure, or was killed")
    title = f"{name}: {status.get('state', 'starting')}, {status.get('elapsed_s', 0.0):.1f} s"
    return Panel(table, title=title, title_align="left", expand=False)


def status_lines(status: Mapping[str, Any], tokens_per_s: float) -> Iterator[tuple[str, str]]:
    """Give the named lines of a status."""
    done, total = status.get("requests_done", 0), status.get("requests_total", 0)
    running, waiting = status.get("requests_running", 0), status.get("requests_waiting", 0)
    yield "requests", f"{bar(done, total)} {done} of {total} done, {running} running, {waiting} waiting"
    yield "tokens", f"{status.get('tokens_out', 0)}, {format_number(tokens_per_s)} a second"
    if rows := status.get("rows"):
        yield "rows", f"{bar(status.get('busy_rows', 0), rows)} {status.get('busy_rows', 0)} of {rows} busy"
    for name, busy in (status.get("stages") or {}).items():
        yield name, f"{bar(busy, 1.0)} {format_percent(busy)} busy"
    for name, (used, blocks) in (status.get("kv_blocks") or {}).items():
        yield f"KV of {name}", f"{bar(used, blocks)} {used} of {blocks} blocks"
    yield from streaming_lines(status)


def streaming_lines(status: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    """Give the lines of swapping, replication and failures, where there is any of it."""
    if swap := status.get("swap"):
        yield "swaps", f"{swap['fetches']} fetches, {format_bytes(swap['bytes'])} in and out"
    if replication := status.get("replication"):
        lag = replication["lag_steps"]
        yield "replicas", f"at most {lag} step{'s' * (lag != 1)} behind"
    failures = status.get("failures") or []
    if len(failures) > MOST_FAILURES:
        yield "failures", f"{len(failures)}, the newest:"
    for line in failures[-MOST_FAILURES:]:
        yield "failure", line


def bar(value: float, whole: float) -> str:
    """Draw a share as a bar of fixed width."""
    filled = round(BAR_WIDTH * min(max(value / whole, 0.0), 1.0)) if whole else 0
    return "█" * filled + "░" * (BAR_WIDTH - filled)
