"""Draw rows as tables on the terminal."""

from collections.abc import Mapping, Sequence
from typing import Any

from rich import box
from rich.table import Table

from dejavu.measure.render import format_value

LONGEST_HEADING = 9  # characters in one line: a table has to fit 80 columns


def row_table(row: Mapping[str, Any], title: str) -> Table:
    """Lay out one row as a list of names and values."""
    table = Table(title=title, box=box.SIMPLE_HEAD, show_header=False, title_justify="left")
    table.add_column(style="bold")
    table.add_column(justify="right")
    for name, value in row.items():
        table.add_row(name, format_value(value))
    return table


def rows_table(rows: Sequence[Mapping[str, Any]], columns: Mapping[str, str], title: str) -> Table:
    """Lay out some columns of rows, `columns` naming each with its heading."""
    table = Table(
        title=title, box=box.SIMPLE_HEAD, title_justify="left", show_edge=False, pad_edge=False, collapse_padding=True
    )
    for name, heading in columns.items():
        text = any(isinstance(row[name], str) for row in rows)
        last = name == list(columns)[-1]
        heading = heading if len(heading) <= LONGEST_HEADING else heading.replace(" ", "\n")
        table.add_column(heading, justify="left" if text else "right", no_wrap=not (last and text))
    for row in rows:
        table.add_row(*[format_value(row[name]) for name in columns])
    return table
