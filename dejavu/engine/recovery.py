"""What a failure does to the requests, and how long it takes: the controller's side of a recovery."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from math import isnan, nan
from typing import Literal, Protocol

from dejavu.engine.recovery_point import Repeated, Restored
from dejavu.errors import PeerLostError
from dejavu.measure.failures import FailureRecord


@dataclass(frozen=True, slots=True)
class Death:
    """Say which process died, what it did, and which one does that now."""

    target: str  # in words, such as "token stage 1"
    process: int
    successor: int | None  # None where a spare died
    kind: Literal["death", "hang"] = "death"
    injected_s: float = nan  # where it was caused on purpose


@dataclass(frozen=True, slots=True)
class Gathered:
    """Say what everybody has when all are ready to go on."""

    restored: Sequence[Restored]  # by pipeline
    restored_bytes: int = 0
    kept_bytes: int = 0


class Company(Protocol):
    """Keep the ranks together that serve: the controller's view of all others."""

    def reform(self, error: PeerLostError) -> Sequence[Death]:
        """Find out who is left, and let spares take the places of the dead; raise the error where that cannot be."""

    def gather(self) -> Gathered:
        """Wait until everybody is ready to go on, and share the clock."""

    def refill(self) -> None:
        """See to it that there is a spare for the next loss; called again and again."""

    def dismiss(self) -> None:
        """End what was started for a loss that has not come."""


@dataclass(slots=True)
class Outage:
    """Follow one failure until every request that it stalled has its next token."""

    records: list[FailureRecord]  # one for each rank that died
    stalled: set[int] = field(default_factory=set)  # serials
    successors: tuple[int | None, ...] = ()
    kept_bytes: int = 0
    is_restart: bool = False

    def describe(self) -> list[str]:
        """Say what happened in words."""
        pairs = zip(self.records, self.successors, strict=True)
        return [describe(record, successor, self.kept_bytes, is_restart=self.is_restart) for record, successor in pairs]


def describe(record: FailureRecord, successor: int | None, kept_bytes: int, *, is_restart: bool = False) -> str:
    """Say in one line who died, who takes over, what was restored, and how long it took."""
    seen = f"at {record.detected_s:.2f} s" if record.detected_s >= 0 else f"{-record.detected_s:.2f} s before serving"
    who = f"{who_died(record.target, record.rank, record.kind)}, seen {seen}"
    if successor is None and not is_restart:
        whose = "nobody needs to take over" if record.target == "spare" else "its place is taken"
        return f"{who}: {whose}, serving went on after {1e3 * record.recovery_s:.0f} ms"
    how = "all ranks were started again" if is_restart else f"rank {successor} takes over"
    said = [how, *restoration(record, kept_bytes)]
    return f"{who}: {'; '.join(said)}; serving again after {1e3 * record.recovery_s:.0f} ms"


def who_died(target: str, process: int, kind: Literal["death", "hang"]) -> str:
    """Say who is lost, and how: `target` says in words what it did."""
    return f"{target} (rank {process}) {'died' if kind == 'death' else 'stood still and was ended'}"


def restoration(record: FailureRecord, kept_bytes: int) -> list[str]:
    """Say what was restored from where, and what has to be computed again."""
    said = []
    if kept_bytes:
        said.append(f"{megabytes(kept_bytes)} of KV kept on the host")
    if record.bytes_restored:
        said.append(f"{megabytes(record.bytes_restored)} of KV restored from replicas")
    if record.prompts_handed_over:
        said.append(f"{record.prompts_handed_over} prompts handed over again")
    if record.prompts_recomputed:
        said.append(f"{record.prompts_recomputed} prompts computed again")
    elif record.tokens_replayed:
        said.append(f"{record.tokens_replayed} tokens passed again")
    else:
        said.append("nothing recomputed")
    return said


def megabytes(num_bytes: int) -> str:
    """Write a number of bytes."""
    return f"{num_bytes / 2**20:.{0 if num_bytes >= 10 * 2**20 else 2}f} MiB"


class FailureBook:
    """Keep account of every failure of a run."""

    def __init__(self) -> None:
        self.records: list[FailureRecord] = []
        self.open: list[Outage] = []

    def begin(self, deaths: Sequence[Death], detected_s: float, rebuilt_s: float, stalled: set[int]) -> Outage:
        """Note who was lost."""
        first = len(self.records)
        records = [
            FailureRecord(first + n, death.target, death.process, death.kind, death.injected_s, detected_s, rebuilt_s)
            for n, death in enumerate(deaths)
        ]
        outage = Outage(records, stalled, tuple(death.successor for death in deaths))
        self.records += records
        self.open.append(outage)
        return outage

    def adopt(self, records: Sequence[FailureRecord], stalled: set[int]) -> None:
        """Take over the account of a controller that was lost; what was not over for it ends with the next tokens."""
        self.records += records
        unfinished = [record for record in records if isnan(record.resumed_s)]
        self.open += [Outage([record], set(stalled), (None,)) for record in unfinished]

    def restart(self, rebuilt_s: float, stalled: set[int]) -> Outage:
        """Go on with all ranks started again; what was not over for those before ends with the next tokens."""
        records = [record for outage in self.open for record in outage.records]
        for record in records:
            record.rebuilt_s = rebuilt_s
        outage = Outage(records, stalled, (None,) * len(records), is_restart=True)
        self.open = [outage]
        return outage

    def shift(self, seconds: float) -> None:
        """Count from another start of the run on, by which all times so far are so much later."""
        for record in self.records:
            record.shift(seconds)

    def resume(self, outage: Outage, gathered: Gathered, repeated: Repeated, restored_s: float) -> None:
        """Note what it takes to go on."""
        outage.kept_bytes = gathered.kept_bytes
        for record in (record for each in self.open for record in each.records):
            if isnan(record.restored_s):  # so are those whose own recovery was interrupted by this failure
                record.restored_s = restored_s
        for record in outage.records[:1]:
            record.bytes_restored = gathered.restored_bytes
            record.prompts_recomputed, record.tokens_replayed = repeated.prompts, repeated.tokens
            record.steps_lost, record.steps_beyond = repeated.steps, repeated.steps_beyond
            record.prompts_handed_over = repeated.prompts_handed_over
            record.prompts_avoidable = repeated.prompts_avoidable

    def token(self, serial: int, time_s: float) -> list[str]:
        """Note that a request goes on; give what is to be said of failures that are over with it."""
        for outage in self.open:
            outage.stalled.discard(serial)
        return self.close_finished(time_s)

    def close_finished(self, time_s: float) -> list[str]:
        """Close the failures that no request waits for any more, and say what happened."""
        finished = [outage for outage in self.open if not outage.stalled]
        self.open = [outage for outage in self.open if outage.stalled]
        for record in [record for outage in finished for record in outage.records]:
            record.resume(time_s)
        return [line for outage in finished for line in outage.describe()]
