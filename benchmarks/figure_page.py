"""The part of a page that shows the paper's figures done again, from the files that are kept for each.

Of each figure and kind of machine there is one file in `figures/` beside the page: `figure-8-gpu.json`, which
`dejavu bench reproduce` wrote, or `figure-7-gpu.yaml`, which somebody wrote about tables that another command made:

    command: dejavu bench overhead --repeats 4 --level naive,full
    machine: 2 x NVIDIA H200
    date: 2026-11-23
    commit: 0e14040
    tables: {rows: {file: ../2026-11-23-overhead-2xh200.csv, where: {model: opt-13b}}}
    picture: ../overhead.png
    note: ...

The numbers are then read off these tables as off a command's last line. `where`, `picture` and `note` may be missing.
"""

import csv
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from dejavu.errors import ConfigError
from dejavu.measure.render import format_number

from .figures import FigurePlan, measure_row

KINDS = {"gpu": "GPUs", "cpu": "CPU cores"}


@dataclass(frozen=True, slots=True)
class Made:
    """Hold a figure as it was made on one kind of machine; paths are relative to the page."""

    command: str
    machine: str
    date: str
    commit: str
    rows: Sequence[Mapping[str, Any]]
    note: str
    tables: Sequence[str]
    picture: str | None
    seconds: float | None = None


def page_lines(plans: Sequence[FigurePlan], into: Path) -> Iterator[str]:
    """Give the page's part about the figures: all in one table, then each by itself."""
    found = {plan.figure: read_figure(plan, into) for plan in plans}
    shown = [plan for plan in plans if found[plan.figure]]
    yield "\n## The paper's figures, done again\n"
    yield "| figure | what was measured | paper | GPUs | CPU cores |\n|---|---|---|---|---|"
    yield from (overview(plan, found[plan.figure]) for plan in shown)
    yield "\nModels and lengths differ between GPUs and CPU cores; each figure below says what was run, where and when."
    for plan in shown:
        yield from figure_lines(plan, found[plan.figure])


def overview(plan: FigurePlan, found: Mapping[str, Made]) -> str:
    """Give a figure's line of the first table: its first measure on each kind of machine."""
    first, paper = plan.measures[0], "-"
    cells = []
    for kind in KINDS:
        row = next((row for row in found[kind].rows if row["measure"] == first.name), None) if kind in found else None
        cells.append("not run" if kind not in found else number(row))
        paper = format_number(first.paper) if first.paper is not None else paper
    anchor = "".join(mark for mark in f"figure {plan.figure} {plan.title}".lower() if mark.isalnum() or mark in " -")
    link = f"[{plan.figure}: {plan.title}](#{anchor.replace(' ', '-')})"
    return f"| {link} | {first.name} | {paper} | {' | '.join(cells)} |"


def number(row: Mapping[str, Any] | None) -> str:
    """Write what was measured, with the least and the most of single turns where they were noted."""
    if row is None or row["ours"] is None:
        return "-"
    least, most = row.get("turns_min"), row.get("turns_max")
    turns = f" ({format_number(least)} to {format_number(most)})" if least is not None and most is not None else ""
    return format_number(row["ours"]) + turns


def figure_lines(plan: FigurePlan, found: Mapping[str, Made]) -> Iterator[str]:
    """Show one figure, on each kind of machine."""
    yield f"\n### Figure {plan.figure}: {plan.title}\n\nThe paper: {plan.paper}.\n"
    yield "| what | on | ours | paper | verdict |\n|---|---|---|---|---|"
    for kind, made in found.items():
        for row in made.rows:
            paper = format_number(row["paper"]) if row["paper"] is not None else "-"
            yield f"| {row['measure']} | {KINDS[kind]} | {number(row)} | {paper} | {row['verdict']} |"
    for kind, made in found.items():
        took = f", {made.seconds} s" if made.seconds is not None else ""
        tables = ", ".join(f"[{'table' if len(made.tables) == 1 else Path(name).stem}]({name})" for name in made.tables)
        origin = f"{made.machine}, {made.date}, commit {made.commit}{took}{', ' if tables else ''}{tables}"
        yield f"\n**{KINDS[kind]}**: {origin}.\n`{made.command}`\n\n{made.note}".rstrip()
        if made.picture:
            yield f"\n![figure {plan.figure}, {KINDS[kind]}]({made.picture})"


def read_figure(plan: FigurePlan, into: Path) -> dict[str, Made]:
    """Read a figure from the files of each kind of machine that has any."""
    found = {}
    for kind in KINDS:
        stem = into / "figures" / f"{plan.stem}-{kind}"
        if (path := stem.with_name(f"{stem.name}.json")).exists():
            found[kind] = read_own(plan, kind, path)
        elif (path := stem.with_name(f"{stem.name}.yaml")).exists():
            found[kind] = read_described(plan, kind, path)
    return found


def read_own(plan: FigurePlan, kind: str, path: Path) -> Made:
    """Read what `dejavu bench reproduce` noted; the table and the picture lie beside it."""
    record = json.loads(path.read_text(encoding="utf-8"))
    table, picture = (path.with_suffix(f".{suffix}") for suffix in ("csv", "png"))
    note = plan.runs[kind].get("note", "") if kind in plan.runs else ""
    return Made(
        command=" ".join(record["command"]),
        machine=record["machine"],
        date=record["date"],
        commit=record["commit"],
        rows=record["rows"],
        note=f"{note} {other_tokens(table)}".strip(),
        tables=[f"figures/{table.name}"] if table.exists() else [],
        picture=f"figures/{picture.name}" if picture.exists() else None,
        seconds=record["seconds"],
    )


def read_described(plan: FigurePlan, kind: str, path: Path) -> Made:
    """Read the numbers of a figure off the tables that a YAML file names. Raises ConfigError."""
    try:
        record = yaml.safe_load(path.read_text(encoding="utf-8"))
        tables = {name: read_rows(path.parent, table) for name, table in record["tables"].items()}
        rows = [measure_row(plan, kind, measure, tables) for measure in plan.measures]
        return Made(
            command=record["command"],
            machine=record["machine"],
            date=str(record["date"]),
            commit=str(record["commit"]),
            rows=[row for row in rows if row["ours"] is not None],
            note=record.get("note", ""),
            tables=[beside_page(table["file"]) for table in record["tables"].values()],
            picture=beside_page(record["picture"]) if "picture" in record else None,
        )
    except (OSError, yaml.YAMLError, TypeError, KeyError, AttributeError) as error:
        raise ConfigError(f"{path} describes no measured figure ({error}): see another figure-*.yaml there") from None


def other_tokens(table: Path) -> str:
    """Say how many requests got other tokens than in the table's first row; nothing where none did, or it has no word.

    In float32 that makes the command fail, so a table that is kept has it for near-ties of 16-bit formats alone.
    """
    if not table.exists():
        return ""
    with table.open(encoding="utf-8", newline="") as file:
        rows = [row for row in csv.DictReader(file) if row.get("same_tokens") == "false"]
    counts = ", ".join(f"{row['arrangement']} {row['wrong']} of {row['requests']}" for row in rows)
    return f"Requests with other tokens than in the first arrangement, near-ties in 16 bits: {counts}." if rows else ""


def beside_page(name: str) -> str:
    """Give a path that is relative to `figures/` as one relative to the page."""
    return name.removeprefix("../") if name.startswith("../") else f"figures/{name}"


def read_rows(directory: Path, table: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Read the rows of a CSV file that have the values of `where`; numbers as numbers, nothing as None."""
    with (directory / table["file"]).open(encoding="utf-8", newline="") as file:
        rows = [{name: read_cell(cell) for name, cell in row.items()} for row in csv.DictReader(file)]
    return [row for row in rows if all(row[name] == value for name, value in table.get("where", {}).items())]


def read_cell(cell: str) -> float | str | None:
    """Read a cell of a table."""
    try:
        return float(cell) if cell else None
    except ValueError:
        return cell
