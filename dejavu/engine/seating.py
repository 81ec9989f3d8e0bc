"""Which request sits where, from its admission to its end: the controller's side of the pipelines, and pure.

Two arrangements share an interface: colocated pipelines, each of which takes a request from prompt to end, and a prompt
pipeline that hands each request over to a token pipeline (`disaggregated.py`). `send(rank, message)` carries their
decisions out.
"""

from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Protocol

from dejavu.engine.journal import Progress
from dejavu.engine.messages import Admission, Admissions, Release, Resume
from dejavu.engine.recovery_point import Repeated, Restored, tokens_there
from dejavu.engine.rows import RowTable
from dejavu.errors import CapacityError
from dejavu.request import Request

Send = Callable[[int, object], None]


@dataclass(slots=True)
class Leaving:
    """Keep a request's blocks while a pass that writes into them may be under way."""

    admission: Admission
    step: int | None = None  # the first one of its microbatch that is without it; None until the head has said


@dataclass(slots=True)
class Lane:
    """Keep the books of one pipeline: its rows, and the admissions that its head has not been told yet."""

    ranks: Sequence[int]  # the first one leads the first stage
    table: RowTable
    untold: list[Admission] = field(default_factory=list)
    leaving: dict[int, Leaving] = field(default_factory=dict)  # by serial
    steps: list[int] = field(init=False)  # by microbatch: the pass that comes after the last one that is known
    is_replicated: bool = False  # its ranks say which steps their replicas have
    replicated: dict[tuple[int, int], int] = field(default_factory=dict)  # by rank and microbatch: the last such step
    cut_off: Counter[tuple[int, int]] = field(default_factory=Counter)  # recoveries since a replica had anything new
    begun: dict[int, int] = field(default_factory=dict)  # by serial: a step with which all KV before it was there

    def __post_init__(self) -> None:
        self.steps = [0] * self.table.num_microbatches

    def has_replica(self, admission: Admission) -> bool:
        """Tell whether all ranks have said that their replicas have the KV with which a request began here."""
        begun = self.begun.get(admission.serial)
        held = [self.replicated.get((rank, admission.microbatch), -1) for rank in self.ranks]
        return begun is not None and min(held) >= begun

    def acknowledged(self, lost: Sequence[int]) -> tuple[int, ...]:
        """Give by microbatch the last step that the replicas of all these ranks have said they have, or -1."""
        of_all = range(self.table.num_microbatches) if lost else ()
        return tuple(min(self.replicated.get((rank, microbatch), -1) for rank in lost) for microbatch in of_all)

    def most_behind(self, lost: Sequence[int], every: int) -> tuple[int, ...]:
        """Give by microbatch the steps by which these ranks' replicas can be behind, whose copies are made in step.

        Of each `every` steps, and the last pass; a failure that keeps that from being copied makes it as many more.
        """
        of_all = range(self.table.num_microbatches) if lost else ()
        return tuple(every * (1 + max(self.cut_off[rank, microbatch] for rank in lost)) for microbatch in of_all)

    def take_replicated(self, rank: int, steps: Iterable[tuple[int, int]]) -> None:
        """Take note of the steps, by microbatch, that a rank's replica has."""
        for microbatch, step in steps:
            self.replicated[rank, microbatch] = step
            del self.cut_off[rank, microbatch]

    def forget_replicas(self, owners: Iterable[int]) -> None:
        """Take note that the replicas of these ranks are gone, and new ones are empty."""
        gone = set(owners)
        self.replicated = {place: step for place, step in self.replicated.items() if place[0] not in gone}

    def renew(
        self, admission: Admission, outputs: Sequence[int], there: int, num_cached: int, restored: Restored
    ) -> tuple[Admission, int]:
        """Let a request go on with so many tokens of those that were there; give how many it may have lost, too."""
        renewed = self.table.renew(admission, outputs=tuple(outputs), num_cached=num_cached)
        begun, last = self.begun.get(admission.serial), self.steps[admission.microbatch] - 1
        if num_cached < len(admission.request.prompt_token_ids):
            self.begun.pop(admission.serial, None)
        return renewed, restored.excuses(admission.microbatch, begun, last)

    def tell(self, send: Send) -> None:
        """Tell the head of all new admissions at once, so that their prompts can share a pass."""
        if self.untold:
            send(self.ranks[0], Admissions(tuple(self.untold)))
            self.untold = []

    def end(self, admission: Admission, send: Send, *, is_foreseen: bool) -> None:
        """Free a request's row at once, and its blocks when no pass that may write into them is under way.

        At an end that the head foresees, the request's last pass is through. Else the head is told, and may have begun
        a further one.
        """
        self.begun.pop(admission.serial, None)
        if is_foreseen:
            self.table.release(admission)
            return
        self.tell(send)  # an admission has to come before its release
        self.table.vacate(admission)
        self.leaving[admission.serial] = Leaving(admission)
        send(self.ranks[0], Release(admission.serial))

    def released(self, serial: int, step: int) -> None:
        """Take note of the first step that the head makes without a request."""
        if serial in self.leaving:
            self.leaving[serial].step = step
            self.free_left()

    def passed(self, microbatch: int, step: int) -> None:
        """Take note that a pass is through."""
        self.steps[microbatch] = step + 1
        self.free_left()

    def free_left(self) -> None:
        """Free the blocks that no pass under way can write into any more."""
        for serial, each in list(self.leaving.items()):
            if each.step is not None and each.step <= self.steps[each.admission.microbatch]:
                self.table.blocks.give(each.admission.blocks)
                del self.leaving[serial]

    def stop_passes(self) -> None:
        """Take note that all that was under way is void, and that the head knows of no request."""
        self.untold = []
        for each in self.leaving.values():
            self.table.blocks.give(each.admission.blocks)
        self.leaving = {}

    def resume(self, send: Send) -> None:
        """Tell the head of all requests after a failure."""
        self.cut_off.update((rank, number) for rank in self.ranks for number in range(self.table.num_microbatches))
        send(self.ranks[0], Resume(tuple(self.untold), tuple(self.steps)))
        self.untold = []

    def check(self, request: Request) -> None:
        """Raise CapacityError if the pipeline's pool could never hold a request."""
        needed, most = self.table.blocks_needed(request), self.table.blocks_per_row
        if 0 < most < needed:
            raise CapacityError(
                f"request {request.request_id!r} needs {needed} KV blocks of {self.table.block_size} tokens "
                f"and a swapped row has {most}: raise --row-len, or shorten it"
            )
        if needed > self.table.num_blocks:
            raise CapacityError(
                f"request {request.request_id!r} needs {needed} KV blocks of {self.table.block_size} tokens "
                f"and the pool has {self.table.num_blocks}: raise --kv-memory, or shorten it"
            )


class Seating(Protocol):
    """Seat requests, and free what they held."""

    @property
    def lanes(self) -> Sequence[Lane]:
        """Give the books of each pipeline, in the order of their ranks."""

    def seat(self, serial: int, request: Request) -> bool:
        """Let a request begin, or give False while it has to wait."""

    def first_token(self, serial: int, token_id: int) -> None:
        """Take note of a request's first token."""

    def moved(self, rank: int, serial: int) -> bool:
        """Take note that a rank has done its part of a hand-over; tell whether all KV has now arrived."""

    def end(self, serial: int, *, is_foreseen: bool) -> None:
        """Free what a request holds, as soon as nobody uses it any more; see `Lane.end`."""

    def tell(self) -> None:
        """Send what was decided since the last call."""

    def computed(self, serial: int, num_tokens: int) -> None:
        """Take note that the first tokens of a request's prompt have gone through all stages."""

    def adopt(self, progress: Progress) -> None:
        """Let a request have what it had before the controller was lost."""

    def resume(self, outputs: Mapping[int, Sequence[int]], restored: Sequence[Restored]) -> Repeated:
        """Tell everybody again of all requests, after a failure; all that was under way is void.

        `outputs` are the tokens of each live request by its serial, `restored` what is left of each pipeline's KV.
        """

    @property
    def is_clean(self) -> bool:
        """Tell whether nothing is held for any request."""


class Colocated:
    """Seat each request in the pipeline with the fewest."""

    def __init__(self, lanes: Sequence[Lane], send: Send) -> None:
        self.lanes: Sequence[Lane] = lanes
        self.send = send
        self.seats: dict[int, tuple[Lane, Admission]] = {}
        self.chunks: dict[int, int] = {}  # by serial: tokens of prompts that are not through

    def seat(self, serial: int, request: Request) -> bool:
        """Let a request begin in a pipeline that has a row and the memory for it."""
        for lane in sorted(self.lanes, key=lambda lane: len(lane.table.occupants)):
            if admission := lane.table.admit(serial, request):
                lane.untold.append(admission)
                self.seats[serial] = lane, admission
                return True
        return False

    def first_token(self, serial: int, token_id: int) -> None:
        """Forget the parts of its prompt: the request stays where it is."""
        self.chunks.pop(serial, None)

    def moved(self, rank: int, serial: int) -> bool:
        """Nothing is ever handed over."""
        raise AssertionError(f"rank {rank} reports a hand-over of {serial}")

    def end(self, serial: int, *, is_foreseen: bool) -> None:
        """Free a request's row; its pipeline starts no further step for it."""
        lane, admission = self.seats.pop(serial)
        self.chunks.pop(serial, None)
        lane.end(admission, self.send, is_foreseen=is_foreseen)

    def tell(self) -> None:
        """Send the new admissions."""
        for lane in self.lanes:
            lane.tell(self.send)

    def computed(self, serial: int, num_tokens: int) -> None:
        """Note how far a prompt is that goes through in parts."""
        if serial in self.seats:
            self.chunks[serial] = num_tokens

    def adopt(self, progress: Progress) -> None:
        """Give a request its row again."""
        assert progress.seat
        lane, admission = progress.seat
        self.seats[admission.serial] = self.lanes[lane], self.lanes[lane].table.adopt(admission)

    def resume(self, outputs: Mapping[int, Sequence[int]], restored: Sequence[Restored]) -> Repeated:
        """Let every request go on in its row."""
        repeated = Repeated()
        for lane in self.lanes:
            lane.stop_passes()
        for serial, (lane, admission) in self.seats.items():
            left = restored[self.lanes.index(lane)]
            there = tokens_there(admission, outputs[serial], self.chunks.pop(serial, 0))
            renewed, excused = lane.renew(admission, outputs[serial], there, left.limit(serial, there), left)
            repeated.count(renewed, there, excused)
            lane.untold.append(renewed)
            self.seats[serial] = lane, renewed
        for lane in self.lanes:
            lane.resume(self.send)
        return repeated

    @property
    def is_clean(self) -> bool:
        """Tell whether no request is seated."""
        return not self.seats and not any(lane.leaving for lane in self.lanes)


def peak_blocks(lanes: Iterable[Lane]) -> list[int]:
    """Give the most blocks of each pipeline that were taken at once."""
    return [lane.table.blocks.peak for lane in lanes]
