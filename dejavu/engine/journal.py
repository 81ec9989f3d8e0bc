"""What the controller has taken and given out, line by line in files: who takes its place goes on from there.

A line is a JSON list: its kind, its values, and a checksum of both. Lines are written before anybody is given what they
say. What a loss of power leaves at the end of the file is no line, and is cut off before further ones are written. A
file that has grown large is closed, and removed when all requests that it speaks of have ended: these are elsewhere.

    journal-000001.jsonl | journal-000003.jsonl | journal.jsonl, which begins with all that is said of the run itself
"""

import threading
from collections.abc import Callable, Collection, Iterable
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from dejavu.engine.messages import Admission, SampledToken
from dejavu.engine.segments import Segments, files_of
from dejavu.errors import DejavuError
from dejavu.measure.clock import RunClock
from dejavu.measure.ended import EndedNames, ended_line
from dejavu.measure.failures import FailureRecord
from dejavu.measure.lines import make_line, read_lines
from dejavu.request import Completion, FinishReason, Request, SamplingParams, TokenLogprobs

JOURNAL = "journal.jsonl"  # in the run directory
SYNC_EVERY_S = 0.5
SEGMENT_BYTES = 64 * 2**20
STANDING = frozenset({"start", "complete", "steps", "failures"})  # the last line of each kind holds
OF_REQUESTS = ("prompt", "given_up", "moved", "computed")  # whose serial comes first


class NoJournal:
    """Write nothing."""

    def note_request(self, request: Request) -> None:
        """Write nothing."""

    def note_seats(self, lane: int, admissions: Iterable[Admission]) -> None:
        """Write nothing."""

    def note_prompts(self, admissions: Iterable[Admission]) -> None:
        """Write nothing."""

    def note_token(self, token: SampledToken, time_s: float, start_s: float) -> None:
        """Write nothing."""

    def note_end(self, completion: Completion) -> None:
        """Write nothing."""

    def note(self, kind: str, *values: Any) -> None:
        """Write nothing."""

    def flush(self) -> None:
        """Write nothing."""


class Journal(NoJournal):
    """Write lines: with one system call for all that happened together, and to the disk itself twice a second."""

    def __init__(
        self,
        path: Path,
        past: "Past | None" = None,
        ended: Path | None = None,
        segment_bytes: int = SEGMENT_BYTES,
    ) -> None:
        """Go on behind the `past`; UsageError where another process writes here.

        What stays of requests that end has a line each in the file `ended`; without one no file is ever removed.
        """
        self.path = path
        self.segments = Segments(path, past, ended, segment_bytes)
        self.error: OSError | None = None  # of the thread
        self.lines: list[str] = []
        self.ended_lines: list[str] = []
        self.lock = threading.Lock()  # requests may be taken from any thread
        self.dirty, self.ended = threading.Event(), threading.Event()
        self.syncer = threading.Thread(target=self.sync, name="journal", daemon=True)
        self.syncer.start()

    def note_request(self, request: Request) -> None:
        """Add a request that was taken."""
        with self.lock:
            number = self.segments.book.take(request.request_id)
            self.lines.append(make_line(["request", asdict(request), number]))

    def note_seats(self, lane: int, admissions: Iterable[Admission]) -> None:
        """Add the rows that requests take in a pipeline that generates tokens."""
        for admission in admissions:
            self.segments.book.touch(admission.serial)
            self.note("seat", *seat_values(lane, admission))

    def note_prompts(self, admissions: Iterable[Admission]) -> None:
        """Add the rows that requests take in a pipeline of prompts, and their blocks in the other one."""
        for admission in admissions:
            place = admission.microbatch, admission.row
            self.note("prompt", admission.serial, place, admission.blocks, admission.handover)

    def note_token(self, token: SampledToken, time_s: float, start_s: float) -> None:
        """Add a token."""
        logprobs = token.logprobs and [token.logprobs.chosen, token.logprobs.top]
        self.segments.book.touch(token.serial)
        self.note("token", token.serial, token.token_id, time_s, start_s, logprobs)

    def adopt(self, past: "Past") -> None:
        """Keep what stays of requests whose end only the journal tells."""
        for progress in past.requests.values():
            if progress.has_ended:
                self.ended_lines.append(ended_line(progress.number, progress.completion))

    def note_end(self, completion: Completion) -> None:
        """Add the end of a request, and what stays of it."""
        request_id, reason = completion.request.request_id, completion.finish_reason
        number = self.segments.book.end(request_id)
        if self.segments.ended is not None:
            self.ended_lines.append(ended_line(number, completion))
        self.note("end", request_id, reason, completion.finish_s, completion.text)

    def note(self, kind: str, *values: Any) -> None:
        """Add a line, to be written with the next `flush`."""
        line = make_line([kind, *values])
        if kind in STANDING:
            self.segments.standing[kind] = line
        elif kind == "admitted":
            self.segments.book.admit(values[0], values[1])
        elif kind in OF_REQUESTS:
            self.segments.book.touch(values[0])
        with self.lock:
            self.lines.append(line)

    def flush(self) -> None:
        """Write what was added; DejavuError where the disk refuses."""
        try:
            if self.error:
                raise self.error
            self.write()
        except OSError as error:
            place = f"{self.path} cannot be written ({error.strerror})"
            raise DejavuError(
                f"{place}: mend that, then go on with `dejavu serve --resume {self.path.parent}`"
            ) from error

    def write(self) -> None:
        """Write, with one call where the disk takes all lines."""
        with self.lock:
            lines, self.lines = self.lines, []
            ended, self.ended_lines = self.ended_lines, []
            if not lines:
                return
            self.segments.write("".join(lines), "".join(ended))
        self.dirty.set()

    def sync(self) -> None:
        """Bring to the disk what was written, again and again, beside the serving thread."""
        while not self.ended.wait(SYNC_EVERY_S):
            if self.dirty.is_set():
                self.dirty.clear()
                try:
                    self.segments.sync()
                except OSError as error:
                    self.error = error
                    return

    def close(self) -> None:
        """End; everything is on the disk then."""
        self.flush()
        self.ended.set()
        self.syncer.join()
        self.segments.close()


@dataclass(slots=True)
class Progress:
    """Hold one request as the journal knows it; `seat` is its pipeline, and what it began with in its row there.

    `prompt` is what it began with in a pipeline of prompts, which `keeps_prompt` until it is given up. The token side
    has `num_moved` tokens, or what has come there is not known to be whole.
    """

    completion: Completion
    serial: int = -1
    seat: tuple[int, Admission] | None = None  # while it has a row where tokens are generated
    prompt: Admission | None = None
    keeps_prompt: bool = False
    num_moved: int | None = None
    times_s: list[float] = field(default_factory=list)  # of its tokens
    number: int = 0  # in the order in which requests were taken

    @property
    def has_ended(self) -> bool:
        """Tell whether the request has ended."""
        return self.completion.finish_reason is not None


@dataclass(slots=True)
class Past:
    """Hold what a journal says: requests in the order in which they were taken, by their id.

    Of those that are known to have `ended` elsewhere it has their number, and that of their tokens.
    """

    origin_s: float = 0.0  # of the run's clock, on the host's
    origin: tuple[float, str] = (0.0, "")  # the same on the wall clock, and which start of a host the other is of
    latest_s: float = 0.0  # when anything was given out
    num_bytes: int = 0  # of all lines of the last file
    requests: dict[str, Progress] = field(default_factory=dict)
    serials: dict[int, Progress] = field(default_factory=dict)
    steps: list[list[int]] = field(default_factory=list)  # by pipeline and microbatch: the next pass's number
    failures: list[FailureRecord] = field(default_factory=list)
    is_complete: bool = False  # every request of the workload was taken
    next_serial: int = 0
    ended: Collection[str] = ()  # while it is read
    num_ended: int = 0
    ended_tokens: int = 0

    @property
    def unfinished(self) -> list[Progress]:
        """Give the requests that have not ended, first come first."""
        return [progress for progress in self.requests.values() if not progress.has_ended]

    def clock(self) -> RunClock:
        """Give the run's clock as it is on this host now: no token came later than that."""
        return RunClock.resume(self.origin_s, *self.origin, self.latest_s)


def read_journal(path: Path, ended: EndedNames | None = None) -> Past:
    """Read a journal to its end; what is no line there is passed over, UsageError where lines follow it.

    Requests that have `ended` are left out: the files that there are may say a part of them only.
    """
    ended = ended or EndedNames()
    past = Past(latest_s=ended.latest_s, num_ended=len(ended.names), ended_tokens=ended.num_tokens, ended=ended.names)
    for file in files_of(path):
        for end, (kind, *values) in read_lines(file):
            READERS[kind](past, *values)
            past.num_bytes = end if file == path else 0
    past.ended = ()
    return past


def take_start(past: Past, origin_s: float, wall_s: float, boot: str) -> None:
    """Take the run's clock."""
    past.origin_s, past.origin = origin_s, (wall_s, boot)


def take_request(past: Past, values: dict[str, Any], number: int) -> None:
    """Take a request."""
    if values["request_id"] in past.ended:
        return
    sampling = {name: tuples(value) for name, value in values.pop("sampling").items()}
    request = Request(**{name: tuples(value) for name, value in values.items()}, sampling=SamplingParams(**sampling))
    past.requests[request.request_id] = Progress(Completion(request), number=number)


def take_complete(past: Past) -> None:
    """Take note that no further request comes."""
    past.is_complete = True


def take_admission(past: Past, serial: int, request_id: str, admitted_s: float) -> None:
    """Take the begin of a request."""
    past.next_serial = max(past.next_serial, serial + 1)
    progress = past.requests.get(request_id)
    if progress is None:
        return
    progress.serial, progress.seat, progress.prompt, progress.num_moved = serial, None, None, None
    progress.completion.admitted_s = admitted_s
    past.serials[serial] = progress


def take_seat(
    past: Past, serial: int, lane: int, place: list[int], blocks: list[int], num_outputs: int, num_cached: int
) -> None:
    """Take the row in which a request's tokens are generated, and what it begins with there."""
    progress = past.serials.get(serial)
    if progress is None:
        return
    request, outputs = progress.completion.request, tuple(progress.completion.token_ids[:num_outputs])
    microbatch, row = place
    admission = Admission(serial, microbatch, row, tuple(blocks), request, outputs=outputs, num_cached=num_cached)
    progress.seat = lane, admission


def take_prompt(past: Past, serial: int, place: list[int], blocks: list[int], handover: list[int]) -> None:
    """Take the row in which a request's prompt is processed."""
    progress = past.serials.get(serial)
    if progress is None:
        return
    microbatch, row = place
    request = progress.completion.request
    progress.prompt = Admission(serial, microbatch, row, tuple(blocks), request, tuple(handover))
    progress.keeps_prompt = True


def take_given_up(past: Past, serial: int) -> None:
    """Take the end of what a pipeline of prompts has kept of a request."""
    if progress := past.serials.get(serial):
        progress.keeps_prompt = False


def take_moved(past: Past, serial: int, num_tokens: int | None) -> None:
    """Take how much of a request's KV the token side has, or that it is on its way again."""
    if progress := past.serials.get(serial):
        progress.num_moved = num_tokens


def take_computed(past: Past, serial: int, num_tokens: int) -> None:
    """Take the tokens that are through of a prompt that goes through in parts."""
    progress = past.serials.get(serial)
    if progress and progress.seat:
        lane, admission = progress.seat
        progress.seat = lane, replace(admission, num_cached=num_tokens)


def take_token(past: Past, serial: int, token_id: int, time_s: float, start_s: float, logprobs: Any) -> None:
    """Take a token."""
    past.latest_s = max(past.latest_s, time_s)
    progress = past.serials.get(serial)
    if progress is None:
        return
    completion = progress.completion
    progress.times_s.append(time_s)
    if not completion.token_ids:
        completion.first_token_s = time_s
    elif len(completion.token_ids) == 1:
        completion.token_start_s = start_s
    completion.token_ids.append(token_id)
    if logprobs:
        completion.logprobs.append(TokenLogprobs(logprobs[0], tuples(logprobs[1])))


def take_end(past: Past, request_id: str, reason: str, time_s: float, text: str | None) -> None:
    """Take the end of a request."""
    progress = past.requests.get(request_id)
    if progress is None:
        return
    progress.seat = progress.prompt = None
    completion = progress.completion
    completion.finish_reason, completion.finish_s, completion.text = FinishReason(reason), time_s, text


def take_steps(past: Past, steps: list[list[int]]) -> None:
    """Take the numbers of the next passes."""
    past.steps = steps


def take_failures(past: Past, rows: list[dict[str, Any]]) -> None:
    """Take all failures so far."""
    past.failures = [FailureRecord(**values) for values in rows]


def take_next(past: Past, serial: int) -> None:
    """Take the first serial that no request has had; it begins a file."""
    past.next_serial = max(past.next_serial, serial)


READERS: dict[str, Callable[..., None]] = {
    "start": take_start,
    "request": take_request,
    "complete": take_complete,
    "admitted": take_admission,
    "seat": take_seat,
    "prompt": take_prompt,
    "given_up": take_given_up,
    "moved": take_moved,
    "computed": take_computed,
    "token": take_token,
    "end": take_end,
    "steps": take_steps,
    "failures": take_failures,
    "next": take_next,
}


def tuples(value: Any) -> Any:
    """Turn lists, at any depth, into tuples."""
    return tuple(tuples(item) for item in value) if isinstance(value, list) else value


def seat_values(lane: int, admission: Admission) -> tuple[Any, ...]:
    """Give a seat's values for a line."""
    place = admission.microbatch, admission.row
    return admission.serial, lane, place, admission.blocks, len(admission.outputs), admission.num_cached
