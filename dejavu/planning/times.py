"""Say how long a stage takes for a pass: what a simulated pipeline asks in place of computing."""

from dataclasses import dataclass
from typing import Protocol

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


def check_times(**values: float) -> None:
    """Raise UsageError for a time or a rate that is below 0 or not finite."""
    for name, value in values.items():
        if not 0 <= value < float("inf"):
            raise UsageError(f"{name} {value:g} is impossible: give a finite number, 0 or more")
