"""Say how long a stage takes for a pass: what a simulated pipeline asks in place of computing."""

from dataclasses import dataclass
from typing import NamedTuple, Protocol, runtime_checkable

from dejavu.errors import UsageError


class StageTimes(Protocol):
    """Give the time of one pass through one stage, in seconds."""

    @property
    def context_step(self) -> int:
        """Give the span of context (tokens) over which `token_s` is taken to be constant; 0 if it always is."""

    @property
    def steps_alike(self) -> bool:
        """Tell whether every token step takes the same time, whatever its rows and context."""

    def prompt_s(self, num_tokens: int, num_rows: int, share: float = 1.0) -> float:
        """Give the time of a pass with `num_tokens` prompt tokens of `num_rows` requests, a share of their prompts."""

    def token_s(self, num_rows: int, context: float) -> float:
        """Give the time of a token step of `num_rows` requests with a mean of `context` tokens in the cache."""


class Line(NamedTuple):
    """Give times of a pass with so many rows, at (mean tokens of a row, seconds) in order: straight in between."""

    batch: float
    points: tuple[tuple[float, float], ...]


def constant(seconds: float) -> tuple[Line, ...]:
    """Give the lines of a time that never changes."""
    return (Line(1.0, ((1.0, seconds),)),)


@dataclass(frozen=True, slots=True)
class TimeTable:
    """Give a stage's times as lines, by rows: between two of them, and beyond their ends, see `profile.interpolate`.

    A token step takes the same over a `span` of context (0: over any), as in its middle. With `by_share` a prompt pass
    takes its share of the time; `overhead_s` comes on top.
    """

    prompt: tuple[Line, ...]
    token: tuple[Line, ...]
    span: int = 0
    by_share: bool = False
    overhead_s: float = 0.0


@runtime_checkable
class Tabled(Protocol):
    """Be times that a table can give, so that machine code can simulate with them."""

    def table(self) -> TimeTable:
        """Give the table."""


@dataclass(frozen=True, slots=True)
class FixedTimes:
    """Take the same time for every pass of a kind, as `dejavu serve --synthetic` does; of a chunk, its share.

    `prompt_overhead` comes on top of a pass with prompts, whatever its share.
    """

    prompt: float
    token: float
    prompt_overhead: float = 0.0

    def __post_init__(self) -> None:
        check_times(prompt_ms=1e3 * self.prompt, token_ms=1e3 * self.token, overhead_ms=1e3 * self.prompt_overhead)

    @property
    def context_step(self) -> int:
        """Give 0: the time never changes."""
        return 0

    @property
    def steps_alike(self) -> bool:
        """Tell that every token step takes the same time."""
        return True

    def prompt_s(self, num_tokens: int, num_rows: int, share: float = 1.0) -> float:
        """Give the time of any pass with a prompt in it."""
        return self.prompt * share + self.prompt_overhead

    def token_s(self, num_rows: int, context: float) -> float:
        """Give the time of any token step."""
        return self.token

    def table(self) -> TimeTable:
        """Give the two times."""
        return TimeTable(constant(self.prompt), constant(self.token), 0, True, self.prompt_overhead)


def check_times(**values: float) -> None:
    """Raise UsageError for a time or a rate that is below 0 or not finite."""
    for name, value in values.items():
        if not 0 <= value < float("inf"):
            raise UsageError(f"{name} {value:g} is impossible: give a finite number, 0 or more")
