"""What the ranks of a pipeline tell each other; the tensors travel beside these.

What every step sends is a tuple, and its rows are pickled as plain ones: in a fifth of the time of dataclasses.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from dejavu.measure.cpu import CpuUsage
from dejavu.measure.records import CeilingRecord, StepKind, StepRecord, TransferRecord
from dejavu.request import Request, TokenLogprobs


@dataclass(frozen=True, slots=True)
class Admission:
    """A request takes a row, and these blocks, until its end; every stage learns it with the request's first pass."""

    serial: int  # unique in the run, so that nobody takes a late message for one about the row's next request
    microbatch: int
    row: int
    blocks: tuple[int, ...]
    request: Request
    handover: tuple[int, ...] = ()  # the token pipeline's blocks, to which a prompt pipeline streams the prompt's KV
    outputs: tuple[int, ...] = ()  # tokens that the request has already, from another pipeline or before a failure
    num_cached: int = 0  # of its prompt and outputs, the first so many have their KV in the blocks already


@dataclass(frozen=True, slots=True)
class Expect:
    """Controller → every rank of the token pipeline: the KV of this request's prompt will come into these blocks."""

    serial: int
    num_tokens: int
    blocks: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Resend:
    """Controller → every rank of the prompt pipeline: send on the KV of this prompt, which lies in these blocks."""

    serial: int
    num_tokens: int
    blocks: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Moved:
    """Prompt and token ranks → controller: this rank has sent, or has, all its part of a request's prompt KV."""

    serial: int


@dataclass(frozen=True, slots=True)
class Replicated:
    """Owner or holder → controller: rank `rank`'s KV is in its replica, of these microbatches up to these steps."""

    rank: int
    steps: tuple[tuple[int, int], ...]  # microbatch, step


@dataclass(frozen=True, slots=True)
class AllReplicated:
    """Holder → owner on another host, at the end: your whole replica is here, and you may close what led to it."""


@dataclass(frozen=True, slots=True)
class Admissions:
    """Controller → first stage: requests that were seated together, so that their prompts can share a pass."""

    admissions: tuple[Admission, ...]


@dataclass(frozen=True, slots=True)
class Resume:
    """Controller → first stage, after a failure: go on with these requests; all passes that were under way are void."""

    admissions: tuple[Admission, ...]
    steps: tuple[int, ...]  # by microbatch: the number of its next pass


@dataclass(frozen=True, slots=True)
class Release:
    """Controller → first stage: a request has ended for a reason that the stage cannot see; start no step for it."""

    serial: int


@dataclass(frozen=True, slots=True)
class Released:
    """First stage → controller: no pass of its microbatch from this step on is for the request."""

    serial: int
    step: int


@dataclass(frozen=True, slots=True)
class Stop:
    """Controller → first stage → every stage: no more work will come."""


class RowWork(NamedTuple):
    """One row of a pass: `num_new` tokens after the `context` tokens that are in the cache already."""

    serial: int
    row: int
    num_new: int
    context: int
    is_prompt: bool
    samples: bool  # the last new token's logits give the next token
    prompt_len: int  # tokens of the whole prompt; after a loss of KV, those that were generated before it too


class Work(NamedTuple):
    """One pass of one microbatch, on its way from the first stage to the last.

    `admissions` are the requests whose first pass this is; `token_ids` are the new tokens, row after row, or nothing
    where each row takes what the pass before draws, which nobody has seen yet.
    """

    step: int  # counts the passes of this microbatch
    microbatch: int
    rows: tuple[RowWork, ...]
    admissions: tuple[Admission, ...]
    token_ids: tuple[int, ...]
    seated: tuple[Admission, ...] = ()  # in other microbatches since the last pass, with their prompts' KV: to fetch
    start_s: float = 0.0  # when the first stage took it up, on the controller's clock

    def __reduce__(self) -> tuple[object, tuple[object, ...]]:
        return remake_work, (tuple(map(tuple, self.rows)), self._replace(rows=())[:])

    @property
    def kind(self) -> StepKind:
        """Name the pass for the records: it processes prompts, generates tokens, or both."""
        num_prompts = sum(row.is_prompt for row in self.rows)
        if num_prompts == 0:
            return "token"
        return "prompt" if num_prompts == len(self.rows) else "mixed"

    @property
    def prompt_share(self) -> float:
        """Give the part that this pass processes of the prompts of its rows; 1 where no row has a prompt."""
        prompts = [row for row in self.rows if row.is_prompt]
        return sum(row.num_new for row in prompts) / sum(row.prompt_len for row in prompts) if prompts else 1.0


class SampledToken(NamedTuple):
    """The next token of one request; `index` counts its output tokens from 0."""

    serial: int
    index: int  # type: ignore[assignment]  # hides that of tuples, which no token needs
    token_id: int
    logprobs: TokenLogprobs | None


class Sampled(NamedTuple):
    """Last stage → first stage and controller: a pass is through, with these new tokens (none after a mere chunk)."""

    step: int
    microbatch: int
    tokens: tuple[SampledToken, ...]
    time_s: float  # on the controller's clock
    start_s: float = 0.0  # of the pass
    chunks: tuple[tuple[int, int], ...] = ()  # serials whose prompts are not through yet, and their tokens that are

    def __reduce__(self) -> tuple[object, tuple[object, ...]]:
        return remake_sampled, (tuple(map(tuple, self.tokens)), self._replace(tokens=())[:])


def remake_work(rows: Iterable[Iterable[Any]], others: Iterable[Any]) -> Work:
    """Make a pass of what it was pickled as."""
    return Work(*others)._replace(rows=tuple(map(RowWork._make, rows)))


def remake_sampled(tokens: Iterable[Iterable[Any]], others: Iterable[Any]) -> Sampled:
    """Make a result of what it was pickled as."""
    return Sampled(*others)._replace(tokens=tuple(map(SampledToken._make, tokens)))


@dataclass(frozen=True, slots=True)
class Ready:
    """Worker → controller, at the start and after each failure: weights are loaded and the pool is there.

    From a spare: it has prepared what it was asked to.
    """

    load_s: float
    notes: tuple[str, ...] = ()  # how its GPU is joined to others
    keeps_kv: bool = False  # what the pool held before the failure, it holds still
    tokens: Mapping[int, int] = field(default_factory=dict)  # of requests, by serial; of others all or nothing
    restored_bytes: int = 0  # that came back from a replica
    restore_s: float = 0.0
    kept_bytes: int = 0  # of KV that a new process of this place found at the keeper
    has_new_replica: bool = False  # what its replica had is gone


@dataclass(frozen=True, slots=True)
class Rehearse:
    """Controller → spare: all workers are ready, so what each of them holds can be prepared."""


@dataclass(frozen=True, slots=True)
class Busy:
    """Worker → controller, about twice a second while it has passes: how long it computed since it said so last.

    And how often it has fetched swapped KV since, and the bytes that it fetched and flushed.
    """

    compute_s: float
    num_fetches: int = 0
    swapped_bytes: int = 0


@dataclass(frozen=True, slots=True)
class Farewell:
    """Controller → everybody, at the very end: the results are written, and nobody is needed any more."""


@dataclass(frozen=True, slots=True)
class RecordChunk:
    """Worker → controller, before its report: a part of a file of records that this host's processes do not see."""

    name: str
    offset: int
    data: bytes


@dataclass(frozen=True, slots=True)
class Report:
    """Worker → controller, at the end: records that are in no file, and the processor time it took while serving."""

    steps: list[StepRecord]
    cpu: CpuUsage
    host_us_per_step: float  # that its thread takes for a pass; on a CPU it is computed in it
    transfers: list[TransferRecord] = field(default_factory=list)
    ceilings: list[CeilingRecord] = field(default_factory=list)
