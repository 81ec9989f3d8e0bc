"""Hold what moves through a simulated pipeline: requests in the rows of microbatches, and what is noted of them."""

from dataclasses import dataclass, field
from typing import NamedTuple

from dejavu.measure.records import StepKind

INFINITY = float("inf")


@dataclass(slots=True)
class Job:
    """Follow a request: what its prompt pass has to process, and the tokens it still has to produce."""

    request: int
    context: int
    tokens_left: int
    prompt_left: int
    order: int = 0
    seen_s: float = 0.0  # when stage 0 hears of it
    reserves: bool = False  # holds memory of the token side from the start of its prompt


class Seat(NamedTuple):
    """Say after which token step of its microbatch a request ends."""

    last_step: int
    order: int
    job: Job


class Pass(NamedTuple):
    """Record one pass through one stage, in seconds."""

    stage: int
    microbatch: int
    step: int
    kind: StepKind
    num_rows: int
    num_tokens: int
    start_s: float
    end_s: float


@dataclass(slots=True)
class Microbatch:
    """Hold the rows of one microbatch; `ready_s` is when its pass under way ends, or its next one may start."""

    index: int
    num_rows: int
    ready_s: float = 0.0
    in_line: bool = False  # waits for its turn, or has a pass under way
    passes: int = 0
    steps: int = 0  # token steps done
    context: int = 0  # tokens in the cache, over the active rows
    pending: list[Job] = field(default_factory=list)  # seated, prompt not done
    prompting: list[tuple[Job, int]] = field(default_factory=list)  # in the pass under way, with so many prompt tokens
    active: list[Seat] = field(default_factory=list)  # a heap, the first to end first
    fresh: list[Job] = field(default_factory=list)  # active, and in no token step yet
    stepping: int = 0  # rows that take a token step in the pass under way
    step_s: float = 0.0  # of a token step before number `same_until`
    same_until: int = 0

    def count_free(self) -> int:
        """Count the free rows."""
        return self.num_rows - len(self.pending) - len(self.active)

    def move_on(self, steps: int, seconds: float) -> None:
        """Take `steps` token steps in `seconds`, in which no request ends."""
        self.ready_s += seconds
        self.steps += steps
        self.passes += steps
        self.context += steps * len(self.active)


class Mark(NamedTuple):
    """Remember a pipeline's state when a microbatch took its turn, to see what a whole turn changes."""

    changes: int
    microbatch: Microbatch | None
    num_passes: int
    state: list[float]


class Done(NamedTuple):
    """Report a token that matters: a request's first, or its last; `time_s` is when stage 0 knows of it."""

    time_s: float
    job: Job
