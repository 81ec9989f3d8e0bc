"""Read a run directory back: what was run, what it measured, and how it ended."""

import csv
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from dejavu.errors import UsageError
from dejavu.measure.failures import FailureRecord
from dejavu.measure.records import RankRecord, RequestRecord, StepRecord, TransferRecord, read_csv
from dejavu.measure.run_directory import RunDirectory

Table = list[dict[str, str]]
RECORDS = frozenset({"requests.csv", "steps.csv", "transfers.csv", "failures.csv", "summary.csv", "ranks.csv"})


@dataclass(frozen=True, slots=True)
class Run:
    """Hold what one run directory says; an empty list where the run did not write that file."""

    path: Path
    description: Mapping[str, Any]  # run.yaml
    result: Mapping[str, Any]  # result.json; empty while the run goes on
    summary: Mapping[str, float] = field(default_factory=dict)
    requests: list[RequestRecord] = field(default_factory=list)
    steps: list[StepRecord] = field(default_factory=list)
    transfers: list[TransferRecord] = field(default_factory=list)
    failures: list[FailureRecord] = field(default_factory=list)
    ranks: list[RankRecord] = field(default_factory=list)
    tables: Mapping[str, Table] = field(default_factory=dict)  # a benchmark's rows, by the file's stem
    pictures: tuple[Path, ...] = ()

    @property
    def name(self) -> str:
        """Give the directory's name, which starts with the time of the run."""
        return self.path.resolve().name

    @property
    def config(self) -> Mapping[str, Any]:
        """Give the options of the run."""
        return dict(self.description.get("config") or {})

    @property
    def outcome(self) -> str:
        """Say how the run ended: `ok`, `error`, or `unfinished` where nothing says so."""
        return str(self.result.get("outcome", "unfinished"))

    @property
    def started(self) -> str:
        """Give the date and time of the start, to the minute."""
        return str(self.description.get("started", ""))[:16].replace("T", " ")

    @property
    def commit(self) -> str:
        """Give the short commit that ran, with a mark where files had changed."""
        commit = str(self.description.get("git") or "")
        return commit[:7] + ("+" if commit.endswith("-dirty") else "")

    @property
    def machine(self) -> str:
        """Name the devices of the workers, each with how many ranks had it, and the hosts where there are several."""
        devices = [str(rank.get("device", "")) for rank in self.description.get("ranks") or [] if "stage" in rank]
        names = [f"{devices.count(name)} x {name}" for name in dict.fromkeys(devices)]
        hosts = self.description.get("hosts") or []
        if not names:
            system = self.description.get("system") or {}
            names = [f"{system.get('cpu', 'unknown processor')}, {system.get('cores', '?')} cores"]
        return ", ".join(names) + (f" on {len(hosts)} hosts" if len(hosts) > 1 else "")


def read_run(path: Path) -> Run:
    """Read the run in a directory; UsageError names what is missing or malformed."""
    directory = RunDirectory(path)
    if not path.is_dir():
        raise UsageError(f"no run directory {str(path)!r}: `dejavu report --list` shows those that are there")
    if not directory.run_file.exists():
        raise UsageError(f"{path} holds no run.yaml: name the directory of a run that has started")
    others = sorted(file for file in path.glob("*.csv") if file.name not in RECORDS)
    return Run(
        path,
        read_description(directory.run_file),
        directory.read_result() or {},
        read_summary(path / "summary.csv"),
        optional_records(path / "requests.csv", RequestRecord),
        optional_records(path / "steps.csv", StepRecord),
        optional_records(path / "transfers.csv", TransferRecord),
        optional_records(path / "failures.csv", FailureRecord),
        optional_records(path / "ranks.csv", RankRecord),
        {file.stem: read_table(file) for file in others},
        tuple(sorted(path.glob("*.png"))),
    )


def read_description(path: Path) -> Mapping[str, Any]:
    """Read run.yaml; UsageError where it is no mapping."""
    try:
        value = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise UsageError(f"cannot read {path}: {' '.join(str(error).split())}") from None
    if not isinstance(value, dict):
        raise UsageError(f"{path} holds no mapping: name a directory that a dejavu command wrote")
    return value


def optional_records(path: Path, row_type: type[Any]) -> list[Any]:
    """Read records where the run wrote them."""
    return read_csv(path, row_type) if path.exists() else []


def read_table(path: Path) -> Table:
    """Read a CSV file as text cells by column; none where there is no file."""
    if not path.exists():
        return []
    with path.open(encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))


def read_summary(path: Path) -> Mapping[str, float]:
    """Read the one row of summary.csv as numbers; empty cells are NaN."""
    rows = read_table(path)
    return {name: float(cell) if cell else math.nan for name, cell in rows[0].items()} if rows else {}


def find_runs(root: Path) -> list[Path]:
    """List the run directories in `root`, oldest first."""
    return sorted((path.parent for path in root.glob("*/run.yaml")), key=lambda path: path.name)


def read_runs(paths: Iterable[Path]) -> list[Run]:
    """Read several runs, in the given order."""
    return [read_run(path) for path in paths]
