"""`dejavu report`: pages, tables and pictures of runs."""

import csv
import json
import math
import sys
from pathlib import Path
from typing import TYPE_CHECKING

import click
import rich_click

from dejavu.errors import UsageError
from dejavu.measure.run_directory import RUNS, locate

if TYPE_CHECKING:
    from dejavu.measure.report.runs import Run

HELP = """Show runs as a page that opens from disk: one run, or several side by side with ratios.

RUN is a directory that a command wrote, or its name under results/runs; one of `fail-inject` stands for the runs in it.
Runs that differ in nothing but the seed count as repeats of each other, and get confidence intervals."""


@click.command(cls=rich_click.RichCommand, help=HELP)
@click.argument("runs", nargs=-1, type=click.Path(path_type=Path))
@click.option("--list", "list_runs", is_flag=True, help="List the runs in results/runs, and stop.")
@click.option("--out", type=click.Path(path_type=Path), help="Where to write; by default the run's own directory.")
@click.option("--csv", "as_csv", is_flag=True, help="Print the numbers as CSV instead of writing a page.")
@click.option("--markdown", is_flag=True, help="Print the tables as Markdown instead of writing a page.")
@click.option("--png/--no-png", default=True, help="Write the plots as PNG files beside the page.", show_default=True)
def command(runs: tuple[Path, ...], list_runs: bool, out: Path | None, as_csv: bool, markdown: bool, png: bool) -> int:
    """List, print or write."""
    if list_runs:
        return show_list()
    if as_csv and markdown:
        raise UsageError("--csv and --markdown print the same numbers in two forms: give one of them")
    if not runs:
        raise UsageError("no run was named: give a directory, or see `dejavu report --list`")
    from dejavu.measure.report.runs import read_runs

    found = read_runs(locate(path) for path in runs)
    if as_csv:
        return print_csv(found)
    if markdown:
        return print_markdown(found)
    return write(found, out, png)


def show_list() -> int:
    """List the runs of the current directory, newest last."""
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    from dejavu.measure.report.runs import find_runs

    table = Table(box=None, padding=(0, 2, 0, 0), pad_edge=False)
    table.add_column("run", min_width=15, overflow="fold")
    table.add_column("started", no_wrap=True)
    table.add_column("outcome", no_wrap=True)
    table.add_column("tokens/s", no_wrap=True, justify="right")
    table.add_column("what", min_width=20)
    for path in find_runs(RUNS):
        table.add_row(*map(Text, list_cells(path)))
    if not table.row_count:
        raise UsageError(f"{RUNS} holds no runs: `dejavu serve demo.yaml` makes one")
    Console().print(table)
    return 0


def list_cells(path: Path) -> tuple[str, str, str, str, str]:
    """Give a run's line of the list: of one that went wrong what the matter was, else what was run."""
    from dejavu.measure.render import format_number
    from dejavu.measure.report.runs import read_head
    from dejavu.measure.report.words import brief

    try:
        run = read_head(path)
    except UsageError as error:
        return str(path.relative_to(RUNS)), "", "unreadable", "", str(error)
    rate = format_number(run.summary.get("tokens_per_s", math.nan))
    return run.name, run.started, run.outcome, rate, str(run.result.get("error") or brief(run.config))


def print_csv(runs: "list[Run]") -> int:
    """Print the comparison's numbers, or one run's summary, as CSV."""
    from dejavu.measure.report.compare import comparison_rows, group_runs

    rows = comparison_rows(group_runs(runs))
    writer = csv.DictWriter(sys.stdout, list(rows[0]), lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return 0


def print_markdown(runs: "list[Run]") -> int:
    """Print the tables as Markdown."""
    from dejavu.measure.report.compare import group_runs
    from dejavu.measure.report.tables import comparison_table, run_tables

    tables = run_tables(runs[0]) if len(runs) == 1 else [comparison_table(group_runs(runs))]
    click.echo("\n".join(table.markdown() for table in tables))
    return 0


def joined_name(runs: "list[Run]") -> str:
    """Name the directory of a report of several runs."""
    return "+".join(run.name.replace("/", "-") for run in runs)[:120]


def write(runs: "list[Run]", out: Path | None, png: bool) -> int:
    """Write the page and the pictures; the last line is JSON."""
    from dejavu.measure.report.charts import comparison_figures, run_figures
    from dejavu.measure.report.compare import group_runs
    from dejavu.measure.report.figures import to_png
    from dejavu.measure.report.page import comparison_page, first_runs, run_page

    single = len(runs) == 1
    directory = out or (runs[0].path if single else RUNS.parent / "reports" / joined_name(runs))
    try:
        (directory / "plots" if png else directory).mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UsageError(f"cannot make {directory} ({error.strerror}): name a writable one with --out") from None
    page = directory / "report.html"
    page.write_text(run_page(runs[0]) if single else comparison_page(runs), encoding="utf-8")
    figures = run_figures(runs[0]) if single else comparison_figures(first_runs(group_runs(runs)))
    pictures = [str(to_png(figure, directory / "plots")) for figure in figures] if png else []
    click.echo(f"Report in {page}")
    click.echo(json.dumps({"bench": "report", "page": str(page), "pictures": pictures}))
    return 0
