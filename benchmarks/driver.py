"""What every benchmark shares: its ranks, its run directory, its table and its last line."""

import json
import os
from collections.abc import Callable, Mapping, Sequence
from importlib import import_module
from pathlib import Path
from typing import Any

import rich_click as click
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table

from dejavu.cluster.jobs import start_job
from dejavu.cluster.launcher import RUN_DIR, world_rank
from dejavu.measure.environment import describe_run
from dejavu.measure.records import write_table
from dejavu.measure.render import format_value
from dejavu.measure.run_directory import RunDirectory

Row = dict[str, Any]
WIDEST = 400  # characters of a table, whose lines are never folded


def run_ranks(context: click.Context, num_ranks: int, name: str, out: str | None, rank_main: Callable[[], int]) -> int:
    """Be a rank of the benchmark inside mpirun; outside, start `num_ranks` of them with the same arguments."""
    if world_rank(os.environ) is None:
        return start_job(num_ranks, context.obj, name=f"bench-{name}", out=out, progress=False)
    from dejavu.cluster.process import guarded, importing

    def run() -> int:
        with importing():
            import_module("torch")
        return rank_main()

    return guarded(run)


def open_run_directory(name: str, out: str | None) -> RunDirectory:
    """Take the run directory that the launcher made, or make it."""
    if path := os.environ.get(RUN_DIR):
        return RunDirectory(Path(path))
    return RunDirectory.create(f"bench-{name}", out)


def finish(
    directory: RunDirectory,
    name: str,
    rows: Sequence[Row],
    options: Row,
    ranks: Sequence[Row] = (),
    *,
    table: Sequence[Row] | None = None,
    notes: Sequence[str] = (),
    more: Mapping[str, Any] | None = None,
    error: str | None = None,
    **facts: Any,
) -> int:
    """Write run.yaml and NAME.csv, print the table and the JSON line; say how it went, and give the exit code.

    `table` is printed in place of rows that are too wide, and `notes` below it; `more` is added to the JSON object;
    `error` says what was measured to be wrong.
    """
    directory.write_run(describe_run(options, list(ranks), **facts))
    columns = list(rows[0]) if rows else []
    write_table(directory.path / f"{name}.csv", columns, [[row[column] for column in columns] for row in rows])
    print_table(name, rows if table is None else table)
    for note in notes:
        Console().print(note, highlight=False, markup=False)
    print(json.dumps({"bench": name, "run": str(directory.path), "rows": list(rows), **(more or {})}), flush=True)
    directory.write_result("error" if error else "ok", 1 if error else 0, error)
    return 1 if error else 0


def print_table(title: str, rows: Sequence[Row]) -> None:
    """Print rows for people: numbers with few digits, right-aligned."""
    table = Table(title=title, title_justify="left", box=SIMPLE_HEAD, pad_edge=False)
    for column in rows[0] if rows else ():
        words = isinstance(rows[0][column], str)
        table.add_column(column.replace("_", " "), justify="left" if words else "right", no_wrap=True)
    for row in rows:
        table.add_row(*(format_value(value) for value in row.values()))
    console = Console()
    console.width = max(console.width, console.measure(table, options=console.options.update(width=WIDEST)).maximum)
    console.print(table)
