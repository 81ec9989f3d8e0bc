"""Read a run directory back: what was run, what it measured, and how it ended."""

import csv
import math
from collections import deque
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import yaml

from dejavu.errors import UsageError
from dejavu.measure.ended import read_ended
from dejavu.measure.failures import FailureRecord
from dejavu.measure.lines import read_lines
from dejavu.measure.parts import parts_are_left, read_steps, read_transfers
from dejavu.measure.records import (
    CeilingRecord,
    RankRecord,
    RequestRecord,
    StepRecord,
    TransferRecord,
    read_csv,
    read_rows,
)
from dejavu.measure.run_directory import RunDirectory, seen
from dejavu.measure.summary import Limits, Totals

Table = list[dict[str, str]]
MARKS = ("run.yaml", "result.json")  # of a run that has begun to serve, and of one that has ended
RECORDS = frozenset(
    {"requests.csv", "steps.csv", "transfers.csv", "failures.csv", "summary.csv", "ranks.csv", "ceilings.csv"}
)
Row = TypeVar("Row")
MOST_ROWS = 500_000


@dataclass(frozen=True, slots=True)
class Run:
    """Hold what one run directory says; an empty list where the run did not write that file.

    Passes and transfers of a run that has not come to its end are those in its `parts/`.
    """

    path: Path
    description: Mapping[str, Any]  # run.yaml
    result: Mapping[str, Any]  # result.json; empty while the run goes on
    summary: Mapping[str, float] = field(default_factory=dict)
    requests: list[RequestRecord] = field(default_factory=list)
    steps: list[StepRecord] = field(default_factory=list)
    transfers: list[TransferRecord] = field(default_factory=list)
    failures: list[FailureRecord] = field(default_factory=list)
    num_steps: int = 0  # of which `steps` are the newest
    ranks: list[RankRecord] = field(default_factory=list)
    ceilings: list[CeilingRecord] = field(default_factory=list)
    status: Mapping[str, Any] = field(default_factory=dict)  # status.json: how far it was
    tables: Mapping[str, Table] = field(default_factory=dict)  # a benchmark's rows, by the file's stem
    pictures: tuple[Path, ...] = ()
    is_cut_off: bool = False  # it goes on still, or was killed: all this is what it has recorded so far

    @property
    def name(self) -> str:
        """Give the directory's name, which starts with the time of the run; a part of a run has the run's before it."""
        path = self.path.resolve()
        return f"{path.parent.name}/{path.name}" if path.with_suffix(".yaml").exists() else path.name

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
    result = directory.read_result() or {}
    if not directory.run_file.exists() and not result:
        raise UsageError(f"{path} holds no run.yaml: name the directory of a run that has started")
    others = sorted(file for file in path.glob("*.csv") if file.name not in RECORDS)
    description = read_description(directory.run_file) if directory.run_file.exists() else {}
    is_cut_off = parts_are_left(path) and not (path / "summary.csv").exists()
    records = recorded_so_far(path, description) if is_cut_off else written_records(path)
    return Run(
        path,
        description,
        result,
        *records,
        ranks=optional_records(path / "ranks.csv", RankRecord),
        ceilings=optional_records(path / "ceilings.csv", CeilingRecord),
        status=directory.read_status() or {},
        tables={file.stem: read_table(file) for file in others},
        pictures=tuple(sorted(path.glob("*.png"))),
        is_cut_off=is_cut_off,
    )


def read_head(path: Path) -> Run:
    """Read what a list of runs shows of one: how it was described and ended, and its summary."""
    directory = RunDirectory(path)
    described = read_description(directory.run_file) if directory.run_file.exists() else {}
    return Run(path, described, directory.read_result() or {}, read_summary(path / "summary.csv"))


class Records(NamedTuple):
    """Hold the records of a run: of passes and transfers the newest, for a run may have more than a page can show."""

    summary: Mapping[str, float]
    requests: list[RequestRecord]
    steps: list[StepRecord]
    transfers: list[TransferRecord]
    failures: list[FailureRecord]
    num_steps: int


def written_records(path: Path) -> Records:
    """Read the tables of a run that has ended well."""
    steps, num_steps = newest(optional_rows(path / "steps.csv", StepRecord))
    return Records(
        read_summary(path / "summary.csv"),
        optional_records(path / "requests.csv", RequestRecord),
        steps,
        newest(optional_rows(path / "transfers.csv", TransferRecord))[0],
        optional_records(path / "failures.csv", FailureRecord),
        num_steps,
    )


def recorded_so_far(path: Path, description: Mapping[str, Any]) -> Records:
    """Read what a run that goes on, or was killed, has recorded: requests that have ended, and passes until then."""
    config = description.get("config") or {}
    limits = Limits.of_ms(config.get("ttft"), config.get("tpot"))
    stages = [rank["stage"] for rank in description.get("ranks") or [] if "stage" in rank]
    totals = Totals(limits, 0)
    requests = [done.record for done in read_ended(path)]
    for request in requests:
        totals.take_request(request)
    steps, num_steps = newest(seen(read_steps(path), totals.take_step))
    totals.num_stages = max([*totals.busy, len(set(stages)) - 1], default=-1) + 1
    failures = optional_records(path / "failures.csv", FailureRecord) or journal_failures(path)
    return Records(totals.summary(0).row(), requests, steps, newest(read_transfers(path))[0], failures, num_steps)


def journal_failures(path: Path) -> list[FailureRecord]:
    """Read the failures of a run from its journal, whose last line about them has all."""
    last: list[dict[str, Any]] = []
    for _, (kind, *values) in read_lines(path / "journal.jsonl"):
        if kind == "failures":
            last = values[0]
    return [FailureRecord(**values) for values in last]


def newest(rows: Iterable[Row]) -> tuple[list[Row], int]:
    """Give the last rows, at most as many as a page can show, and how many there are of all."""
    kept: deque[Row] = deque(maxlen=MOST_ROWS)
    count = 0
    for row in rows:
        kept.append(row)
        count += 1
    return list(kept), count


def read_description(path: Path) -> Mapping[str, Any]:
    """Read run.yaml; UsageError where it is no mapping."""
    try:
        value = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise UsageError(f"cannot read {path}: {' '.join(str(error).split())}") from None
    if not isinstance(value, dict):
        raise UsageError(f"{path} holds no mapping: name a directory that a dejavu command wrote")
    return value


def optional_rows(path: Path, row_type: type[Any]) -> Iterator[Any]:
    """Read records one by one where the run wrote them."""
    return read_rows(path, row_type) if path.exists() else iter(())


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
    """List the run directories in `root`, and the parts of those that have parts, oldest first."""
    files = [file for name in MARKS for depth in ("*", "*/*") for file in root.glob(f"{depth}/{name}")]
    directories = {file.parent: file.stat().st_mtime for file in sorted(files, reverse=True)}
    return sorted(directories, key=lambda path: (directories[path], path))


def read_runs(paths: Iterable[Path]) -> list[Run]:
    """Read several runs, in the given order; one that is made of parts gives these."""
    return [read_run(part) for path in paths for part in parts_of(path)]


def parts_of(path: Path) -> list[Path]:
    """Give the directories with a run's own records: `fail-inject` leaves one for each of the runs that it compares."""
    if any((path / name).exists() for name in MARKS):
        return [path]
    return find_parts(path) or [path]


def find_parts(path: Path) -> list[Path]:
    """List the runs right inside a directory, in the order in which they began."""
    files = list(path.glob(f"*/{MARKS[0]}"))
    return [file.parent for file in sorted(files, key=lambda file: file.stat().st_mtime)]
