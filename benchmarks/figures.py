"""The paper's figures that this project does again: what to run for each, and what to read off the rows. Pure.

A figure is a YAML file beside this module:

    figure: "8"
    title: Prompts in a pipeline of their own
    paper: up to 2 x the throughput of a colocated pipeline
    runs: {cpu: {command: [bench, disaggregation], note: ...}, gpu: {...}}
    measures:
      - name: speed-up, all requests at once
        paper: 1.88
        better: higher
        value: {column: makespan_s, where: {arrangement: colocated}, over: {arrangement: disaggregated}}

`value` names a column and the rows that count, of another `table` of the command's last line where it has several;
`take` (max by default, min, median, first) makes one number of them, and `over` divides by the same column of other
rows. `spread` names the columns of the least and the most that single turns gave.
"""

import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import yaml

from dejavu.errors import ConfigError

Row = Mapping[str, Any]
TAKE: dict[str, Callable[[Sequence[float]], float]] = {
    "max": max,
    "min": min,
    "median": statistics.median,
    "first": lambda values: values[0],
}


@dataclass(frozen=True, slots=True)
class Measure:
    """Say how to read one number off a benchmark's rows, and what the paper found."""

    name: str
    value: Mapping[str, Any]
    paper: float | None = None
    better: Literal["higher", "lower", "neither"] = "higher"
    spread: Sequence[str] = ()

    def read(self, tables: Mapping[str, Any]) -> float | None:
        """Give the number from a command's last line; None where no row fits, or there is no such table."""
        rows = tables.get(self.value.get("table", "rows"), [])
        column, take = self.value["column"], TAKE[self.value.get("take", "max")]
        numbers = select(rows, self.value.get("where", {}), column)
        if "over" not in self.value:
            return take(numbers) if numbers else None
        others = select(rows, self.value["over"], self.value.get("over_column", column))
        ratios = [a / b for a, b in zip(numbers, others, strict=False) if b]
        return take(ratios) if ratios else None

    def read_spread(self, tables: Mapping[str, Any]) -> tuple[float, float] | None:
        """Give the least and the most of single turns; None where that is not in the table."""
        rows, where = tables.get(self.value.get("table", "rows"), []), self.value.get("where", {})
        ends = [select(rows, where, column) for column in self.spread]
        return (min(ends[0]), max(ends[1])) if ends and all(ends) else None

    def verdict(self, measured: float | None, spread: tuple[float, float] | None = None) -> str:
        """Say how the number stands to the paper's, and whether single turns agree."""
        if measured is None:
            return "not measured"
        if self.paper is None:
            return "no number in the paper"
        if self.better == "neither":
            return "for comparison"
        reached = measured >= self.paper if self.better == "higher" else measured <= self.paper
        words = "at least as good as the paper's" if reached else "behind the paper's"
        return f"{words}; single turns on both sides" if spread and spread[0] < self.paper < spread[1] else words


@dataclass(frozen=True, slots=True)
class FigurePlan:
    """Say what a figure of the paper shows, and how it is done again on each kind of machine."""

    figure: str
    title: str
    paper: str
    runs: Mapping[str, Mapping[str, Any]]
    measures: tuple[Measure, ...]

    @property
    def stem(self) -> str:
        """Give the name that the figure's files start with."""
        return f"figure-{self.figure}"


def select(rows: Sequence[Row], where: Mapping[str, Any], column: str) -> list[float]:
    """Give a column's numbers in the rows that have all the wanted values; `a_ms` stands in for an `a_s` in seconds."""
    kept = [row for row in rows if all(row.get(name) == value for name, value in where.items())]
    found = [float(row[column]) for row in kept if row.get(column) not in (None, "")]
    if found or not column.endswith("_s"):
        return found
    return [float(row[other]) / 1e3 for row in kept if row.get(other := column[:-1] + "ms") not in (None, "")]


def read_plans(directory: Path = Path(__file__).parent) -> list[FigurePlan]:
    """Read all figures, in the paper's order."""
    plans = [read_plan(path) for path in directory.glob("figure-*.yaml")]
    return sorted(plans, key=lambda plan: int(plan.figure.partition("-")[0]))


def read_plan(path: Path) -> FigurePlan:
    """Read one figure; ConfigError says what is wrong with the file."""
    try:
        values = yaml.safe_load(path.read_text(encoding="utf-8"))
        measures = tuple(Measure(**measure) for measure in values.pop("measures"))
        return FigurePlan(**values, measures=measures)
    except (OSError, yaml.YAMLError, TypeError, KeyError, AttributeError) as error:
        raise ConfigError(f"{path} describes no figure ({error}): see another figure-*.yaml") from None


def measure_row(plan: FigurePlan, kind: str, measure: Measure, tables: Mapping[str, Any]) -> dict[str, Any]:
    """Make the row of one measure, from the tables that a command gave."""
    ours, spread = measure.read(tables), measure.read_spread(tables)
    least, most = spread or (None, None)
    row = {"figure": plan.figure, "machine": kind, "measure": measure.name, "ours": ours, "paper": measure.paper}
    return row | {"turns_min": least, "turns_max": most, "verdict": measure.verdict(ours, spread)}
