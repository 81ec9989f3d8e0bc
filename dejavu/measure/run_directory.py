"""The directory of one run: who may make it, and what each file in it holds."""

import fcntl
import json
import os
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import datetime
from itertools import islice
from pathlib import Path
from typing import Any, TypeVar

import yaml

from dejavu.errors import ConfigError, UsageError
from dejavu.measure.ended import Ended, plain
from dejavu.measure.failures import FailureRecord
from dejavu.measure.files import replacing
from dejavu.measure.records import RequestRecord, StepRecord, TransferRecord, write_csv, write_table
from dejavu.measure.summary import Limits, Summary, Totals
from dejavu.measure.trace import Tracks, write_trace

RUNS = Path("results/runs")
TRACE_SPANS = 100_000
Row = TypeVar("Row")
DYING_S = 3.0  # that the processes of a run that was lost may take to end
LOOK_EVERY_S = 0.02


@dataclass(frozen=True, slots=True)
class RunDirectory:
    """Name the files of one run; whoever was given the path of an existing one may make it anew from that path."""

    path: Path

    @classmethod
    def create(cls, name: str, out: str | Path | None = None, now: datetime | None = None) -> "RunDirectory":
        """Make the directory of a new run: `out`, or results/runs/TIME-NAME under the current directory.

        An existing `out` may hold other files, which stay; one that holds a run is refused. The directory is claimed
        by its status file, so of two runs that ask for the same `out` one is refused. Raises ConfigError.
        """
        try:
            if out is None:
                return cls(make_unique(RUNS / f"{now or datetime.now():%Y%m%d-%H%M%S}-{name}")).claim()
            Path(out).mkdir(parents=True, exist_ok=True)
            return cls(Path(out)).claim()
        except OSError as error:
            place = RUNS if out is None else out
            reason = error.strerror or error
            raise ConfigError(f"cannot make run directory {place} ({reason}): name a writable one with --out") from None

    def claim(self) -> "RunDirectory":
        """Write the first status, exclusively; raise ConfigError if a run has been here."""
        files = (self.run_file, self.result_file, self.status_file, self.outputs_file)
        taken = next((file for file in files if file.exists()), None)
        if taken is not None or not write_exclusive(self.status_file, {"state": "starting"}):
            name = (taken or self.status_file).name
            raise ConfigError(
                f"{self.path} already holds a run (its {name}): name another directory with --out, or remove that run"
            )
        return self

    @contextmanager
    def alone(self) -> Iterator[None]:
        """Be the only one that sees to this run; UsageError where another process does."""
        file = os.open(self.path, os.O_RDONLY | os.O_DIRECTORY)
        try:
            lock(file, self.path, 0.0)
            yield
        finally:
            os.close(file)

    def check_deserted(self, journal: Path) -> None:
        """Check that nobody sees to this run nor serves it; UsageError where somebody does, and goes on to."""
        for path in (self.path, journal):
            file = os.open(path, os.O_RDONLY)
            try:
                lock(file, self.path, DYING_S)
            finally:
                os.close(file)

    @property
    def run_file(self) -> Path:
        """Name the file that says what was run, where and with what."""
        return self.path / "run.yaml"

    @property
    def outputs_file(self) -> Path:
        """Name the file of generated tokens and texts."""
        return self.path / "outputs.jsonl"

    @property
    def status_file(self) -> Path:
        """Name the file that says how far the run is."""
        return self.path / "status.json"

    @property
    def result_file(self) -> Path:
        """Name the file that says how the run ended."""
        return self.path / "result.json"

    def write_run(self, description: Mapping[str, Any]) -> None:
        """Write run.yaml from plain values (see `environment.describe_run`); the disk has it then."""
        with replacing(self.run_file) as file:
            yaml.safe_dump(dict(description), file, sort_keys=False, allow_unicode=True, width=120)
            file.flush()
            os.fsync(file.fileno())

    def read_run(self) -> dict[str, Any]:
        """Read run.yaml; nothing before there is one."""
        if not self.run_file.exists():
            return {}
        return yaml.safe_load(self.run_file.read_text(encoding="utf-8")) or {}

    def write_requests(self, requests: Iterable[Ended], *takers: Callable[[RequestRecord], object]) -> None:
        """Write outputs.jsonl and requests.csv, a line a request in the given order; show each row to the takers."""
        with replacing(self.outputs_file) as file:

            def records() -> Iterator[RequestRecord]:
                for done in requests:
                    file.write(json.dumps(done.output, ensure_ascii=False, allow_nan=False) + "\n")
                    yield done.record

            write_csv(self.path / "requests.csv", seen(records(), *takers), RequestRecord)

    def read_outputs(self, most: int) -> list[dict[str, Any]]:
        """Read the first lines of outputs.jsonl."""
        with self.outputs_file.open(encoding="utf-8") as file:
            return [json.loads(line) for line in islice(file, most)]

    def write_records(
        self,
        ended: Iterable[Ended],
        steps: Iterable[StepRecord],
        transfers: Iterable[TransferRecord] = (),
        *,
        tracks: Tracks,
        num_stages: int,
        peak_kv_bytes: int,
        limits: Limits | None = None,
        failures: Sequence[FailureRecord] = (),
        trace_spans: int = TRACE_SPANS,
    ) -> Summary:
        """Write all of a run's tables (transfers and failures where there are any) and its trace; give the summary.

        Steps and transfers come in the order in which they began. Nothing is held but what the trace has: of requests,
        steps and transfers the newest `trace_spans` each.
        """
        totals = Totals(limits or Limits(), num_stages)
        requests: deque[RequestRecord] = deque(maxlen=trace_spans)
        newest: deque[StepRecord] = deque(maxlen=trace_spans)
        moved: deque[TransferRecord] = deque(maxlen=trace_spans)
        self.write_requests(ended, totals.take_request, requests.append)
        write_csv(self.path / "steps.csv", seen(steps, totals.take_step, newest.append), StepRecord)
        write_csv(self.path / "transfers.csv", seen(transfers, moved.append), TransferRecord)
        if not moved:
            (self.path / "transfers.csv").unlink()
        if failures:
            write_csv(self.path / "failures.csv", failures, FailureRecord)
        summary = totals.summary(peak_kv_bytes)
        row = summary.row()
        write_table(self.path / "summary.csv", row.keys(), [row.values()])
        write_trace(self.path / "trace.json", tracks, newest, requests, moved, failures)
        return summary

    def write_status(self, status: Mapping[str, Any]) -> None:
        """Replace status.json at once: a reader sees the old or the new one, whole."""
        with replacing(self.status_file) as file:
            json.dump(plain(status), file, allow_nan=False)

    def read_status(self) -> dict[str, Any] | None:
        """Read status.json; None before there is one."""
        return read_object(self.status_file)

    def write_result(self, outcome: str, exit_code: int, error: str | None = None, rank: int = 0) -> bool:
        """Write how the run ended, unless a rank has said so already; tell whether this call was the first."""
        result = {"outcome": outcome, "exit_code": exit_code, "error": error, "rank": rank}
        return write_exclusive(self.result_file, result)

    def read_result(self) -> dict[str, Any] | None:
        """Read how the run ended; None before the outcome is written, and whole."""
        return read_object(self.result_file)


def seen(rows: Iterable[Row], *takers: Callable[[Row], object]) -> Iterator[Row]:
    """Pass rows on, and show each to all takers."""
    for row in rows:
        for take in takers:
            take(row)
        yield row


def lock(file: int, run: Path, most_s: float) -> None:
    """Lock an open file of a run until it is closed; UsageError where another process has it for so long."""
    deadline = time.monotonic() + most_s
    while True:
        try:
            return fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            if time.monotonic() > deadline:
                raise UsageError(f"the run in {run} is still going on: wait for its end, or end it") from None
            time.sleep(LOOK_EVERY_S)
        except OSError:  # a file system without locks
            return None


def locate(run: Path) -> Path:
    """Take a run's directory as it is given, or by its name under results/runs."""
    return run if run.exists() or run.is_absolute() else RUNS / run


def make_unique(path: Path) -> Path:
    """Make a directory that was not there: `path`, or the first free one of `path`-2, `path`-3, ..."""
    path.parent.mkdir(parents=True, exist_ok=True)
    candidate, number = path, 1
    while True:
        try:
            candidate.mkdir()
        except FileExistsError:
            number += 1
            candidate = path.with_name(f"{path.name}-{number}")
        else:
            return candidate


def write_exclusive(path: Path, value: Mapping[str, Any]) -> bool:
    """Write a JSON object into a new file with one system call; leave an existing one alone and give False."""
    try:
        file = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o644)
    except FileExistsError:
        return False
    with os.fdopen(file, "wb", buffering=0) as target:
        target.write(json.dumps(value).encode() + b"\n")
    return True


def read_object(path: Path) -> dict[str, Any] | None:
    """Read a JSON object; None while the file is missing or unfinished."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (FileNotFoundError, json.JSONDecodeError):
        return None
    if not isinstance(value, dict):
        raise UsageError(f"{path} holds no JSON object: name a directory that `dejavu serve` wrote")
    return value
