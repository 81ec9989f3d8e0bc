"""Write the tables of docs/serving.md that the code decides, `python -m tests.documentation`; look names up in docs."""

import re
from collections.abc import Iterable
from itertools import groupby
from pathlib import Path

from dejavu.cli.options import as_given, metavar
from dejavu.config import ServeConfig, choices
from dejavu.planning.workload_fields import FIELDS

ROOT = Path(__file__).resolve().parents[1]
PAGE = ROOT / "docs" / "serving.md"


def unexplained(page: str, title: str, columns: Iterable[str]) -> list[str]:
    """Give the columns that a section of a page, named by a part of its title, does not have in backquotes.

    `latency_…` and `…_percent` stand for all names that begin or end so, and `stageN` for one with any number.
    """
    sections = re.split(r"^(?=## |\*\*)", (ROOT / "docs" / page).read_text(encoding="utf-8"), flags=re.MULTILINE)
    texts = [section for section in sections if title in section.splitlines()[0]]
    assert texts, f"{page} has no section {title}"
    names = {name for text in texts for name in re.findall(r"`([^`\n]+)`", text)}
    patterns = [re.escape(re.sub(r"(?<=[a-z])([A-Z]|\d+)(?=_)", "0", name)).replace("…", ".*") for name in names]
    known = re.compile("|".join(patterns))
    return [column for column in columns if not known.fullmatch(re.sub(r"\d+(?=_)", "0", column))]


def group(item):
    """Give the panel of an option, under which `--help` has it too."""
    return item[1].json_schema_extra["group"]


def option_row(name, field):
    """Describe one field of the configuration."""
    flag = "--" + name.replace("_", "-")
    flag = f"`{flag}`, `--no-{flag[2:]}`" if field.annotation is bool else f"`{flag} {metavar(name, field)}`"
    words = choices(field.annotation)
    meaning = f"{field.description} One of {', '.join(f'`{word}`' for word in words)}." if words else field.description
    default = "" if field.default is None else f"`{as_given(field.default)}`"
    return f"| {flag} | {default} | {meaning} |"


def option_tables():
    """Describe every option, group by group."""
    parts = []
    for title, items in groupby(ServeConfig.model_fields.items(), group):
        rows = [option_row(name, field) for name, field in items]
        parts.append("\n".join([f"**{title}**", "", "| option | default | meaning |", "|---|---|---|", *rows]))
    return "\n\n".join(parts)


def workload_table():
    """Describe every field of a workload line."""
    rows = [f"| `{name}` | {kind.accepts} |" for name, kind in FIELDS.items()]
    return "\n".join(["| field | accepts |", "|---|---|", *rows])


TABLES = {"options": option_tables, "workload fields": workload_table}


def filled(page):
    """Give the page with each table between its markers."""
    for name, table in TABLES.items():
        begin, end = f"<!-- {name}: written by tests/documentation.py -->", f"<!-- end of {name} -->"
        pattern = re.compile(f"{re.escape(begin)}.*?{re.escape(end)}", re.DOTALL)
        assert pattern.search(page), f"{PAGE} has no place for {name}"
        text = f"{begin}\n\n{table()}\n\n{end}"
        page = pattern.sub(lambda _, text=text: text, page)
    return page


if __name__ == "__main__":
    PAGE.write_text(filled(PAGE.read_text(encoding="utf-8")), encoding="utf-8")
