"""What each failure of a run cost, as rows of failures.csv."""

from dataclasses import dataclass
from math import isnan, nan
from typing import Literal


@dataclass(slots=True)
class FailureRecord:
    """Time one rank's failure and the recovery from it.

    Seconds after the run's start, negative where ranks were still loading; NaN for what never happened.
    """

    failure_id: int
    target: str  # what the rank did, in words
    rank: int
    kind: Literal["death", "hang"]
    injected_s: float = nan  # where it was caused on purpose
    detected_s: float = nan  # when the controller knew
    rebuilt_s: float = nan  # when the survivors had agreed on who is left
    restored_s: float = nan  # when everybody was ready to go on
    resumed_s: float = nan  # when every request that had to wait had its next token
    recovery_s: float = nan  # from the failure to then, or from its detection where it was not caused on purpose
    steps_lost: int = 0  # that a microbatch was set back behind its last complete one
    tokens_replayed: int = 0
    prompts_recomputed: int = 0
    bytes_restored: int = 0
    prompts_handed_over: int = 0  # again, from the prompt pipeline
    prompts_avoidable: int = 0  # of those recomputed: there was a copy that should have served
    steps_beyond: int = 0  # of those lost: the recovery point was behind them

    def shift(self, seconds: float) -> None:
        """Add to all times so far."""
        self.injected_s += seconds
        self.detected_s += seconds
        self.rebuilt_s += seconds
        self.restored_s += seconds

    def resume(self, time_s: float) -> None:
        """Note that nobody waits any more."""
        self.resumed_s = time_s
        self.recovery_s = time_s - (self.detected_s if isnan(self.injected_s) else self.injected_s)
