"""What the controller has taken and given out, line by line in a file: who takes its place goes on from there.

A line is a JSON list: its kind, then its values. Lines are written before anybody is given what they say.
"""

import json
import os
import threading
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from dejavu.engine.messages import Admission, SampledToken
from dejavu.measure.failures import FailureRecord
from dejavu.request import Completion, FinishReason, Request, SamplingParams, TokenLogprobs

SYNC_EVERY_S = 0.5


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

    def __init__(self, path: Path) -> None:
        """Go on behind what the file holds."""
        self.file = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
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
        line = json.dumps([kind, *values], ensure_ascii=False) + "\n"
        with self.lock:
            self.lines.append(line)

    def flush(self) -> None:
        """Write what was added."""
        with self.lock:
            lines, self.lines = self.lines, []
        if lines:
            os.write(self.file, "".join(lines).encode())
            self.dirty.set()

    def sync(self) -> None:
        """Bring to the disk what was written, again and again, beside the serving thread."""
        while not self.ended.wait(SYNC_EVERY_S):
            if self.dirty.is_set():
                self.dirty.clear()
                os.fdatasync(self.file)

    def close(self) -> None:
        """End; everything is on the disk then."""
        self.flush()
        self.ended.set()
        self.syncer.join()
        os.fdatasync(self.file)
        os.close(self.file)


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
    requests: dict[str, Progress] = field(default_factory=dict)
    serials: dict[int, Progress] = field(default_factory=dict)
    steps: list[list[int]] = field(default_factory=list)  # by pipeline and microbatch: the next pass's number
    failures: list[FailureRecord] = field(default_factory=list)
    is_complete: bool = False  # every request of the workload was taken

    @property
    def unfinished(self) -> list[Progress]:
        """Give the requests that have not ended, first come first."""
        return [progress for progress in self.requests.values() if progress.completion.finish_reason is None]


def read_journal(path: Path) -> Past:
    """Read a journal to its end; a last line that was not written whole is passed over."""
    past = Past()
    for kind, *values in read_lines(path):
        READERS[kind](past, *values)
    return past


def read_lines(path: Path) -> Iterator[list[Any]]:
    """Give the lines of a journal; none where there is no file."""
    if not path.exists():
        return
    for line in path.read_text(encoding="utf-8").splitlines(keepends=True):
        if line.endswith("\n"):
            yield json.loads(line)


def take_start(past: Past, origin_s: float) -> None:
    """Take the run's clock."""
    past.origin_s = origin_s


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
