"""What every benchmark shares: its ranks, its run directory, its table and its last line."""

import json
import os
from collections.abc import Callable, Mapping, Sequence
from functools import partial
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
from dejavu.measure.files import replacing
from dejavu.measure.records import write_table
from dejavu.measure.render import format_value
from dejavu.measure.run_directory import RunDirectory

Row = dict[str, Any]
PARTIAL = "partial.json"  # the rows so far
WIDEST = 400  # characters of a table, whose lines are never folded


def run_ranks(context: click.Context, num_ranks: int, name: str, out: str | None, rank_main: Callable[[], int]) -> int:
    """Be a rank of the benchmark inside mpirun; outside, start `num_ranks` of them with the same arguments.

    One that is stopped, or fails, shows the rows that it had by then.
    """
    if world_rank(os.environ) is None:
        shown = partial(show_partial, name=name)
        return start_job(num_ranks, context.obj, name=f"bench-{name}", out=out, progress=False, failed=shown)
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


def keep_rows(name: str, rows: Sequence[Row]) -> None:
    """Bring the rows so far to the run directory, for a benchmark that is stopped early; rank 0, between two cases."""
    if not (path := os.environ.get(RUN_DIR)):
        return
    directory = RunDirectory(Path(path))
    if not directory.run_file.exists():
        directory.write_run(describe_run({}, []))
    write_rows(directory, name, rows)
    with replacing(directory.path / PARTIAL) as file:
        json.dump(list(rows), file)


def show_partial(directory: RunDirectory, error: str, *, name: str) -> None:
    """Print the rows of a benchmark that has not come to its end, if it had any, and say that they are not all."""
    path = directory.path / PARTIAL
    if not path.exists():
        return
    rows: list[Row] = json.loads(path.read_text(encoding="utf-8"))
    path.unlink()
    print_table(f"{name} (partial)", rows)
    print(f"These are the {len(rows)} cases that were done when the benchmark ended early: {error}")
    print(json.dumps({"bench": name, "run": str(directory.path), "rows": rows, "partial": True}), flush=True)


def write_rows(directory: RunDirectory, name: str, rows: Sequence[Row]) -> None:
    """Write NAME.csv."""
    columns = list(rows[0]) if rows else []
    write_table(directory.path / f"{name}.csv", columns, [[row[column] for column in columns] for row in rows])


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
    write_rows(directory, name, rows)
    (directory.path / PARTIAL).unlink(missing_ok=True)
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
