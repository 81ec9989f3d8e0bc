"""`dejavu top`: watch a run in the terminal while it serves."""

import time
from pathlib import Path

import click
import rich_click
from rich.console import Console, RenderableType
from rich.live import Live

from dejavu.cluster.progress import TokenRate, read_status
from dejavu.errors import UsageError
from dejavu.measure.run_directory import RUNS, RunDirectory, locate
from dejavu.measure.top import draw_status

REFRESH_S = 0.25
ENDED = ("done", "failed")

HELP = """Watch a run while it serves: requests, tokens per second, stages, KV blocks, swaps, replication, failures.

RUN is a run's directory, or its name under results/runs; the newest one by default. Ctrl-C leaves the run alone."""


@click.command(cls=rich_click.RichCommand, help=HELP)
@click.argument("run", required=False, type=click.Path(path_type=Path))
@click.option("--once", is_flag=True, help="Print the present state, and stop.")
def command(run: Path | None, once: bool) -> int:
    """Draw the status until the run has ended."""
    directory = RunDirectory(find(run))
    console = Console()
    rate = TokenRate()
    if once or not console.is_terminal:
        console.print(draw(directory, rate))
        return 0
    with Live(draw(directory, rate), console=console, auto_refresh=False) as live:
        while not has_ended(directory):
            time.sleep(REFRESH_S)
            live.update(draw(directory, rate), refresh=True)
    return 0


def find(run: Path | None) -> Path:
    """Give the run's directory; UsageError where there is none."""
    if run is None:
        files = [*RUNS.glob("*/status.json"), *RUNS.glob("*/*/status.json")]  # `fail-inject` has runs in its own
        newest = max(files, key=lambda path: path.stat().st_mtime, default=None)
        if newest is None:
            raise UsageError(f"{RUNS} holds no runs: start one, or name its directory")
        return newest.parent
    path = locate(run)
    if not (path / "status.json").exists():
        raise UsageError(f"no run at {str(path)!r}: `dejavu report --list` shows those that are there")
    return path


def has_ended(directory: RunDirectory) -> bool:
    """Tell whether the run writes no more."""
    return directory.read_result() is not None or read_status(directory).state in ENDED


def draw(directory: RunDirectory, rate: TokenRate) -> RenderableType:
    """Draw the newest status."""
    silence_s = 0.0 if has_ended(directory) else time.time() - directory.status_file.stat().st_mtime
    status = directory.read_status() or {}
    return draw_status(directory.path.name, status, rate.update(read_status(directory)), silence_s)
