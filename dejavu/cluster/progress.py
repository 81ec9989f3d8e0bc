"""Show how a job gets on, from the status file that its controller keeps: live in a terminal, else by a few lines."""

import sys
import time
from collections import deque
from dataclasses import dataclass, field, fields
from typing import Protocol, Self, TextIO

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn
from rich.text import Text

from dejavu.measure.run_directory import RunDirectory

RATE_WINDOW_S = 3.0
LINE_EVERY_S = 5.0


@dataclass(frozen=True, slots=True)
class Status:
    """Hold one status of a job, as `<run>/status.json` has it."""

    state: str = "starting"
    requests_total: int = 0
    requests_done: int = 0
    requests_running: int = 0
    requests_waiting: int = 0
    tokens_out: int = 0
    elapsed_s: float = 0.0
    rows: int = 0
    busy_rows: int = 0
    stages: tuple[float, ...] = ()


FIELDS = frozenset(item.name for item in fields(Status))


def read_status(directory: RunDirectory) -> Status:
    """Read the newest status; keys that this version does not know are left out."""
    values = directory.read_status() or {}
    return Status(**{name: value for name, value in values.items() if name in FIELDS})


@dataclass(slots=True)
class TokenRate:
    """Measure tokens per second over the last few seconds."""

    seen: deque[tuple[float, int]] = field(default_factory=deque)

    def update(self, status: Status) -> float:
        """Take a status, and give the rate since the oldest one of the window."""
        if not self.seen or status.elapsed_s > self.seen[-1][0]:
            self.seen.append((status.elapsed_s, status.tokens_out))
        while len(self.seen) > 2 and self.seen[-1][0] - self.seen[0][0] > RATE_WINDOW_S:
            self.seen.popleft()
        elapsed = self.seen[-1][0] - self.seen[0][0]
        return (self.seen[-1][1] - self.seen[0][1]) / elapsed if elapsed > 0 else 0.0


def describe(status: Status, rate: float, waited_s: float) -> str:
    """Put a status into one plain line; before there are requests it says how long that has taken."""
    if not status.requests_total:
        return f"{status.state}, {waited_s:.0f} s"
    return (
        f"{status.state}: {status.requests_done}/{status.requests_total} requests, {status.tokens_out} tokens, "
        f"{rate:.1f} tokens/s, {status.busy_rows}/{status.rows} rows busy, {status.elapsed_s:.0f} s"
    )


class Display(Protocol):
    """Show a job's output and its progress."""

    def write(self, line: str, *, error: bool = False) -> None:
        """Show one line of output, of stdout or of stderr."""

    def update(self, status: Status) -> None:
        """Show a new status."""

    def __enter__(self) -> Self: ...

    def __exit__(self, *details: object) -> None: ...


class QuietDisplay:
    """Show the output, and no progress."""

    def write(self, line: str, *, error: bool = False) -> None:
        """Pass one line on as it is."""
        stream: TextIO = sys.stderr if error else sys.stdout
        stream.write(line + "\n")
        stream.flush()

    def update(self, status: Status) -> None:
        """Show nothing."""

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *details: object) -> None:
        """Leave nothing to clear."""


class LineDisplay(QuietDisplay):
    """Write a line to stderr when the state changes, and every few seconds: for logs and pipes."""

    def __init__(self) -> None:
        self.rate = TokenRate()
        self.last = Status("")
        self.started = self.written = time.monotonic()

    def update(self, status: Status) -> None:
        """Write the status where it is news."""
        rate = self.rate.update(status)
        now = time.monotonic()
        finished = status.state == "done" == self.last.state
        if status.state != self.last.state or (now - self.written >= LINE_EVERY_S and not finished):
            self.write(describe(status, rate, now - self.started), error=True)
            self.last, self.written = status, now


class LiveDisplay:
    """Draw a progress bar below the output, in a terminal; it is gone at the end."""

    def __init__(self, console: Console) -> None:
        self.rate = TokenRate()
        self.progress = Progress(
            TextColumn("[bold]{task.description}"),
            BarColumn(bar_width=None),
            TextColumn("{task.fields[text]}"),
            TimeElapsedColumn(),
            console=console,
            expand=True,
            transient=True,
            refresh_per_second=5,
            redirect_stdout=False,
            redirect_stderr=False,
        )
        self.task = self.progress.add_task("starting", total=None, text="")

    def write(self, line: str, *, error: bool = False) -> None:
        """Print one line above the bar, with the colours that a rank gave it; stderr may have been sent elsewhere."""
        if error and not sys.stderr.isatty():
            sys.stderr.write(line + "\n")
            sys.stderr.flush()
            return
        self.progress.console.print(Text.from_ansi(line), soft_wrap=True)

    def update(self, status: Status) -> None:
        """Draw the status."""
        rate = self.rate.update(status)
        text = f"{rate:.1f} tokens/s  {status.busy_rows}/{status.rows} rows busy" if status.rows else ""
        if status.requests_total:
            text = f"{status.requests_done}/{status.requests_total} requests  {text}"
        total = status.requests_total or None
        self.progress.update(
            self.task, description=status.state, total=total, completed=status.requests_done, text=text
        )

    def __enter__(self) -> Self:
        self.progress.start()
        return self

    def __exit__(self, *details: object) -> None:
        self.progress.stop()


def open_display(console: Console, *, progress: bool) -> Display:
    """Choose the display: none, live in a terminal, else lines."""
    if not progress:
        return QuietDisplay()
    live = console.is_interactive and console.file.isatty()  # FORCE_COLOR alone makes no terminal of a file
    return LiveDisplay(console) if live else LineDisplay()
