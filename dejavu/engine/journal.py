"""What the controller has taken and given out, line by line in a file: who takes its place goes on from there.

A line is a JSON list: its kind, its values, and a checksum of both. Lines are written before anybody is given what they
say. What a loss of power leaves at the end of the file is no line, and is cut off before further ones are written.
"""

import json
import os
import threading
import zlib
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from dejavu.engine.messages import Admission, SampledToken
from dejavu.errors import DejavuError, UsageError
from dejavu.measure.clock import RunClock
from dejavu.measure.failures import FailureRecord
from dejavu.measure.run_directory import lock
from dejavu.request import Completion, FinishReason, Request, SamplingParams, TokenLogprobs

JOURNAL = "journal.jsonl"  # in the run directory
SYNC_EVERY_S = 0.5
LOCK_S = 10.0  # that a process may take to end which had the journal before


class NoJournal:
    """Write nothing."""

    def note_request(self, request: Request) -> None:
        """Write nothing."""

    def note_seats(self, lane: int, admissions: Iterable[Admission]) -> None:
        """Write nothing."""

    def note_token(self, token: SampledToken, time_s: float, start_s: float) -> None:
        """Write nothing."""

    def note(self, kind: str, *values: Any) -> None:
        """Write nothing."""

    def flush(self) -> None:
        """Write nothing."""


class Journal(NoJournal):
    """Write lines: with one system call for all that happened together, and to the disk itself twice a second."""

    def __init__(self, path: Path, num_bytes: int = 0) -> None:
        """Go on behind the first `num_bytes`, which are lines; UsageError where another process writes here."""
        self.path = path
        self.file = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
        lock(self.file, path.parent, LOCK_S)
        os.ftruncate(self.file, num_bytes)
        sync_name(path)
        self.error: OSError | None = None  # of the thread
        self.lines: list[str] = []
        self.lock = threading.Lock()  # requests may be taken from any thread
        self.dirty, self.ended = threading.Event(), threading.Event()
        self.syncer = threading.Thread(target=self.sync, name="journal", daemon=True)
        self.syncer.start()

    def note_request(self, request: Request) -> None:
        """Add a request that was taken."""
        self.note("request", asdict(request))

    def note_seats(self, lane: int, admissions: Iterable[Admission]) -> None:
        """Add the rows that requests take in a pipeline that generates tokens."""
        for admission in admissions:
            self.note("seat", *seat_values(lane, admission))

    def note_token(self, token: SampledToken, time_s: float, start_s: float) -> None:
        """Add a token."""
        logprobs = token.logprobs and [token.logprobs.chosen, token.logprobs.top]
        self.note("token", token.serial, token.token_id, time_s, start_s, logprobs)

    def note(self, kind: str, *values: Any) -> None:
        """Add a line, to be written with the next `flush`."""
        line = make_line([kind, *values])
        with self.lock:
            self.lines.append(line)

    def flush(self) -> None:
        """Write what was added; DejavuError where the disk refuses."""
        with self.lock:
            lines, self.lines = self.lines, []
        try:
            if self.error:
                raise self.error
            if lines:
                self.write("".join(lines).encode())
        except OSError as error:
            place = f"{self.path} cannot be written ({error.strerror})"
            raise DejavuError(
                f"{place}: mend that, then go on with `dejavu serve --resume {self.path.parent}`"
            ) from error

    def write(self, data: bytes) -> None:
        """Write bytes, with one call where the disk takes them all."""
        while data:
            data = data[os.write(self.file, data) :]
        self.dirty.set()

    def sync(self) -> None:
        """Bring to the disk what was written, again and again, beside the serving thread."""
        while not self.ended.wait(SYNC_EVERY_S):
            if self.dirty.is_set():
                self.dirty.clear()
                try:
                    os.fdatasync(self.file)
                except OSError as error:
                    self.error = error
                    return

    def close(self) -> None:
        """End; everything is on the disk then."""
        self.flush()
        self.ended.set()
        self.syncer.join()
        os.fdatasync(self.file)
        os.close(self.file)


def sync_name(path: Path) -> None:
    """Have the disk know a file's name."""
    directory = os.open(path.parent, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(directory)
    finally:
        os.close(directory)


@dataclass(slots=True)
class Progress:
    """Hold one request as the journal knows it; `seat` is its pipeline, and what it began with in its row there."""

    completion: Completion
    serial: int = -1
    seat: tuple[int, Admission] | None = None  # while it has a row where tokens are generated
    times_s: list[float] = field(default_factory=list)  # of its tokens


@dataclass(slots=True)
class Past:
    """Hold what a journal says: all requests in the order in which they were taken, by their id."""

    origin_s: float = 0.0  # of the run's clock, on the host's
    origin: tuple[float, str] = (0.0, "")  # the same on the wall clock, and which start of a host the other is of
    num_bytes: int = 0  # of all lines
    requests: dict[str, Progress] = field(default_factory=dict)
    serials: dict[int, Progress] = field(default_factory=dict)
    steps: list[list[int]] = field(default_factory=list)  # by pipeline and microbatch: the next pass's number
    failures: list[FailureRecord] = field(default_factory=list)
    is_complete: bool = False  # every request of the workload was taken

    @property
    def unfinished(self) -> list[Progress]:
        """Give the requests that have not ended, first come first."""
        return [progress for progress in self.requests.values() if progress.completion.finish_reason is None]

    def clock(self) -> RunClock:
        """Give the run's clock as it is on this host now: no token came later than that."""
        latest_s = max((progress.times_s[-1] for progress in self.requests.values() if progress.times_s), default=0.0)
        return RunClock.resume(self.origin_s, *self.origin, latest_s)


def read_journal(path: Path) -> Past:
    """Read a journal to its end; what is no line there is passed over, UsageError where lines follow it."""
    past = Past()
    lines = path.read_bytes().splitlines(keepends=True) if path.exists() else []
    for number, line in enumerate(lines, 1):
        said = read_line(line)
        if said is None:
            if any(map(read_line, lines[number:])):
                raise UsageError(
                    f"line {number} of {path} is corrupted: restore it from a copy, or remove it and all behind it, "
                    "which are then served again"
                )
            break
        past.num_bytes += len(line)
        READERS[said[0]](past, *said[1:])
    return past


def make_line(values: list[Any]) -> str:
    """Write a line."""
    text = json.dumps(values, ensure_ascii=False)[:-1]
    return f'{text}, "{checksum(text.encode())}"]\n'


def read_line(line: bytes) -> list[Any] | None:
    """Give the values of a line; None where it is not one that was written."""
    text, _, rest = line.rpartition(b", ")
    if rest != f'"{checksum(text)}"]\n'.encode():
        return None
    values: list[Any] = json.loads(text + b"]")
    return values


def checksum(text: bytes) -> str:
    """Give what a line ends with."""
    return f"{zlib.crc32(text):08x}"


def take_start(past: Past, origin_s: float, wall_s: float, boot: str) -> None:
    """Take the run's clock."""
    past.origin_s, past.origin = origin_s, (wall_s, boot)


def take_request(past: Past, values: dict[str, Any]) -> None:
    """Take a request."""
    sampling = {name: tuples(value) for name, value in values.pop("sampling").items()}
    request = Request(**{name: tuples(value) for name, value in values.items()}, sampling=SamplingParams(**sampling))
    past.requests[request.request_id] = Progress(Completion(request))


def take_complete(past: Past) -> None:
    """Take note that no further request comes."""
    past.is_complete = True


def take_admission(past: Past, serial: int, request_id: str, admitted_s: float) -> None:
    """Take the begin of a request."""
    progress = past.requests[request_id]
    progress.serial, progress.seat = serial, None
    progress.completion.admitted_s = admitted_s
    past.serials[serial] = progress


def take_seat(
    past: Past, serial: int, lane: int, place: list[int], blocks: list[int], num_outputs: int, num_cached: int
) -> None:
    """Take the row in which a request's tokens are generated, and what it begins with there."""
    progress = past.serials[serial]
    request, outputs = progress.completion.request, tuple(progress.completion.token_ids[:num_outputs])
    microbatch, row = place
    admission = Admission(serial, microbatch, row, tuple(blocks), request, outputs=outputs, num_cached=num_cached)
    progress.seat = lane, admission


def take_token(past: Past, serial: int, token_id: int, time_s: float, start_s: float, logprobs: Any) -> None:
    """Take a token."""
    completion = past.serials[serial].completion
    past.serials[serial].times_s.append(time_s)
    if not completion.token_ids:
        completion.first_token_s = time_s
    elif len(completion.token_ids) == 1:
        completion.token_start_s = start_s
    completion.token_ids.append(token_id)
    if logprobs:
        completion.logprobs.append(TokenLogprobs(logprobs[0], tuples(logprobs[1])))


def take_end(past: Past, request_id: str, reason: str, time_s: float, text: str | None) -> None:
    """Take the end of a request."""
    progress = past.requests[request_id]
    progress.seat = None
    completion = progress.completion
    completion.finish_reason, completion.finish_s, completion.text = FinishReason(reason), time_s, text


def take_steps(past: Past, steps: list[list[int]]) -> None:
    """Take the numbers of the next passes."""
    past.steps = steps


def take_failures(past: Past, rows: list[dict[str, Any]]) -> None:
    """Take all failures so far."""
    past.failures = [FailureRecord(**values) for values in rows]


READERS: dict[str, Callable[..., None]] = {
    "start": take_start,
    "request": take_request,
    "complete": take_complete,
    "admitted": take_admission,
    "seat": take_seat,
    "token": take_token,
    "end": take_end,
    "steps": take_steps,
    "failures": take_failures,
}


def tuples(value: Any) -> Any:
    """Turn lists, at any depth, into tuples."""
    return tuple(tuples(item) for item in value) if isinstance(value, list) else value


def seat_values(lane: int, admission: Admission) -> tuple[Any, ...]:
    """Give a seat's values for a line."""
    place = admission.microbatch, admission.row
    return admission.serial, lane, place, admission.blocks, len(admission.outputs), admission.num_cached
