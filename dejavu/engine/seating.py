"""Which request sits where, from its admission to its end: the controller's side of the pipelines, and pure.

Two arrangements share an interface: colocated pipelines, each of which takes a request from prompt to end, and a prompt
pipeline that hands each request over to a token pipeline. `send(rank, message)` carries their decisions out.
"""

from collections import deque
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Protocol

from dejavu.engine.messages import Admission, Admissions, Expect, Release, Resume
from dejavu.engine.rows import RowTable
from dejavu.errors import CapacityError
from dejavu.request import Request

Send = Callable[[int, object], None]
ALL_TOKENS = 1 << 62  # more than any request has


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

    def __post_init__(self) -> None:
        self.steps = [0] * self.table.num_microbatches

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


@dataclass(frozen=True, slots=True)
class Restored:
    """Say what a failure has left of one pipeline's KV: the first so many tokens of these requests, by their serials.

    Of all others everything is there where it is `intact`, and else nothing.
    """

    intact: bool
    tokens: Mapping[int, int] = field(default_factory=dict)

    def num_cached(self, admission: Admission, outputs: Sequence[int]) -> int:
        """Give the tokens with which a request can go on: at most all but the last, which is to be passed again."""
        if len(outputs) > len(admission.outputs):  # all before the last one has gone through every stage
            there = len(admission.request.prompt_token_ids) + len(outputs) - 1
        else:  # what the request was to begin with was under way, or is still: its prompt, or the last recovery
            there = admission.num_cached
        return self.limit(admission.serial, there)

    def limit(self, serial: int, there: int) -> int:
        """Give how many of the `there` tokens of a request are left."""
        return min(there, self.tokens.get(serial, there if self.intact else 0))


def join_restored(parts: Iterable[tuple[bool, Mapping[int, int]]]) -> Restored:
    """Say what a pipeline's ranks have together, of each of which it is told as `Restored` tells of all."""
    ranks = [Restored(keeps_kv, tokens) for keeps_kv, tokens in parts]
    named = set[int]().union(*(rank.tokens for rank in ranks))
    left = {serial: min(rank.limit(serial, ALL_TOKENS) for rank in ranks) for serial in named}
    return Restored(all(rank.intact for rank in ranks), left)


@dataclass(slots=True)
class Repeated:
    """Count what has to be computed again after a failure.

    `steps` are those of the microbatch that is set back the furthest: each passes one token of each of its rows.
    """

    prompts: int = 0
    tokens: int = 0
    steps: int = 0

    def count(self, admission: Admission) -> None:
        """Count one request that goes on."""
        if not admission.outputs:
            return
        prompt = len(admission.request.prompt_token_ids)
        self.prompts += admission.num_cached < prompt
        tokens = prompt + len(admission.outputs) - 1 - max(admission.num_cached, prompt)
        self.tokens += tokens
        self.steps = max(self.steps, tokens)


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

    def adopt(self, lane: int, admission: Admission) -> None:
        """Let a request have the row that it had before the controller was lost."""

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

    def seat(self, serial: int, request: Request) -> bool:
        """Let a request begin in a pipeline that has a row and the memory for it."""
        for lane in sorted(self.lanes, key=lambda lane: len(lane.table.occupants)):
            if admission := lane.table.admit(serial, request):
                lane.untold.append(admission)
                self.seats[serial] = lane, admission
                return True
        return False

    def first_token(self, serial: int, token_id: int) -> None:
        """Do nothing: the request stays where it is."""

    def moved(self, rank: int, serial: int) -> bool:
        """Nothing is ever handed over."""
        raise AssertionError(f"rank {rank} reports a hand-over of {serial}")

    def end(self, serial: int, *, is_foreseen: bool) -> None:
        """Free a request's row; its pipeline starts no further step for it."""
        lane, admission = self.seats.pop(serial)
        lane.end(admission, self.send, is_foreseen=is_foreseen)

    def tell(self) -> None:
        """Send the new admissions."""
        for lane in self.lanes:
            lane.tell(self.send)

    def adopt(self, lane: int, admission: Admission) -> None:
        """Give a request its row again."""
        self.seats[admission.serial] = self.lanes[lane], self.lanes[lane].table.adopt(admission)

    def resume(self, outputs: Mapping[int, Sequence[int]], restored: Sequence[Restored]) -> Repeated:
        """Let every request go on in its row."""
        repeated = Repeated()
        for lane in self.lanes:
            lane.stop_passes()
        for serial, (lane, admission) in self.seats.items():
            num_cached = restored[self.lanes.index(lane)].num_cached(admission, outputs[serial])
            renewed = lane.table.renew(admission, outputs=tuple(outputs[serial]), num_cached=num_cached)
            repeated.count(renewed)
            lane.untold.append(renewed)
            self.seats[serial] = lane, renewed
        for lane in self.lanes:
            lane.resume(self.send)
        return repeated

    @property
    def is_clean(self) -> bool:
        """Tell whether no request is seated."""
        return not self.seats and not any(lane.leaving for lane in self.lanes)


@dataclass(slots=True)
class Handover:
    """Follow a request from its prompt to its end.

    Its token blocks are reserved from the start, so that its KV always has somewhere to go, and the pipelines cannot
    wait for each other. It holds its prompt row until every prompt rank has sent its part.
    """

    request: Request
    prompt: Admission | None
    blocks: tuple[int, ...]  # of the token pipeline
    sending: set[int]  # prompt ranks that have not sent all yet
    receiving: set[int]  # token ranks that do not have all yet
    first_token: int | None = None
    num_cached: int = 0  # of the tokens in those blocks
    seat: Admission | None = None  # in the token pipeline
    ended: bool = False

    @property
    def has_moved(self) -> bool:
        """Tell whether the token pipeline has all that it needs."""
        return self.first_token is not None and not self.receiving


class Disaggregated:
    """Process prompts in one pipeline and generate tokens in another.

    A request begins when the prompt pipeline has a row and the token pipeline has the memory: a token pipeline that is
    full holds the prompts back. It gets a token row when its first token is known and its KV is complete, first come
    first served. A request that ends before that frees its memory when the last piece has moved.
    """

    def __init__(self, prompt: Lane, token: Lane, send: Send) -> None:
        self.prompt = prompt
        self.token = token
        self.lanes: Sequence[Lane] = (prompt, token)
        self.send = send
        self.handovers: dict[int, Handover] = {}
        self.ready: deque[int] = deque()  # serials that need nothing but a token row
        self.expected: list[Expect] = []

    def seat(self, serial: int, request: Request) -> bool:
        """Let a prompt begin whose KV has a place to go; one that ends with its first token needs none."""
        moves = request.sampling.max_tokens > 1
        blocks = self.token.table.reserve(request) if moves else ()
        if blocks is None:
            return False
        admission = self.prompt.table.admit(serial, request, blocks)
        if admission is None:
            self.token.table.blocks.give(blocks)
            return False
        self.handovers[serial] = Handover(request, admission, blocks, set(), set())
        self.begin(serial)
        return True

    def begin(self, serial: int) -> None:
        """Let a prompt be processed, and sent on if more than its first token is wanted."""
        handover = self.handovers[serial]
        assert handover.prompt
        self.prompt.untold.append(handover.prompt)
        handover.first_token = None
        if handover.blocks:
            handover.sending, handover.receiving = set(self.prompt.ranks), set(self.token.ranks)
            self.expected.append(Expect(serial, len(handover.request.prompt_token_ids), handover.blocks))

    def first_token(self, serial: int, token_id: int) -> None:
        """Note the token with which the token pipeline will go on."""
        self.handovers[serial].first_token = token_id
        self.advance(serial)

    def moved(self, rank: int, serial: int) -> bool:
        """Note that a rank has sent, or has, all its part; tell whether that was the last piece to arrive."""
        handover = self.handovers[serial]
        is_last = handover.receiving == {rank}
        handover.sending.discard(rank)
        handover.receiving.discard(rank)
        self.advance(serial)
        return is_last

    def end(self, serial: int, *, is_foreseen: bool) -> None:
        """Free a request's token row, or let its hand-over run out first."""
        handover = self.handovers[serial]
        handover.ended = True
        if handover.seat:
            self.token.end(handover.seat, self.send, is_foreseen=is_foreseen)
            del self.handovers[serial]
        else:
            self.advance(serial)

    def advance(self, serial: int) -> None:
        """Free the prompt row when it is sent; queue for a token row, or free all, when all is here."""
        handover = self.handovers[serial]
        if handover.prompt and not handover.sending and handover.first_token is not None:
            self.prompt.table.release(handover.prompt)
            handover.prompt = None
        if handover.prompt or handover.receiving:
            return
        if not handover.ended:
            handover.num_cached = len(handover.request.prompt_token_ids)
            self.ready.append(serial)
        elif serial not in self.ready:
            self.token.table.blocks.give(handover.blocks)
            del self.handovers[serial]

    def tell(self) -> None:
        """Give token rows to who waits for one, and send all decisions; receives are announced before prompts."""
        self.fill_rows()
        self.tell_expected()
        for lane in self.lanes:
            lane.tell(self.send)

    def tell_expected(self) -> None:
        """Announce the prompts that have begun to those who will have their KV."""
        for expect in self.expected:
            for rank in self.token.ranks:
                self.send(rank, expect)
        self.expected = []

    def adopt(self, lane: int, admission: Admission) -> None:
        """Give a request its token row again."""
        seat = self.lanes[lane].table.adopt(admission)
        handover = Handover(admission.request, None, admission.blocks, set(), set(), admission.outputs[0], seat=seat)
        self.handovers[admission.serial] = handover

    def resume(self, outputs: Mapping[int, Sequence[int]], restored: Sequence[Restored]) -> Repeated:
        """Let requests in token rows go on there; hand-overs that were not complete begin again with the prompt."""
        repeated = Repeated()
        self.expected = []
        for lane in self.lanes:
            lane.stop_passes()
        for serial in list(self.handovers):
            if self.handovers[serial].ended:
                self.drop(serial)
            else:
                self.resume_one(serial, outputs[serial], restored[1], repeated)
        self.fill_rows()
        self.tell_expected()
        for lane in self.lanes:
            lane.resume(self.send)
        return repeated

    def resume_one(self, serial: int, outputs: Sequence[int], restored: Restored, repeated: Repeated) -> None:
        """Find out where a request stands, and what it needs again."""
        handover = self.handovers[serial]
        if handover.seat:
            num_cached = restored.num_cached(handover.seat, outputs)
            handover.seat = self.token.table.renew(handover.seat, outputs=tuple(outputs), num_cached=num_cached)
            repeated.count(handover.seat)
            self.token.untold.append(handover.seat)
        elif handover.prompt and not handover.has_moved:
            repeated.prompts += bool(outputs)
            self.begin(serial)
        else:
            self.keep_moved(serial, outputs, restored, repeated)

    def keep_moved(self, serial: int, outputs: Sequence[int], restored: Restored, repeated: Repeated) -> None:
        """Let a request wait for a token row; what has not come of its KV is computed there."""
        handover = self.handovers[serial]
        prompt = len(handover.request.prompt_token_ids)
        there = handover.num_cached if serial in self.ready else prompt
        handover.num_cached = restored.limit(serial, there) if handover.has_moved else 0
        repeated.prompts += handover.num_cached < prompt
        handover.receiving.clear()
        handover.sending.clear()
        if handover.prompt:
            self.prompt.table.release(handover.prompt)
            handover.prompt = None
        if serial not in self.ready:
            self.ready.append(serial)

    def drop(self, serial: int) -> None:
        """Free all that a request holds which has ended before it had a token row; nothing moves any more."""
        handover = self.handovers.pop(serial)
        if handover.prompt:
            self.prompt.table.release(handover.prompt)
        self.token.table.blocks.give(handover.blocks)
        self.ready = deque(other for other in self.ready if other != serial)

    def fill_rows(self) -> None:
        """Seat waiting requests in free token rows; drop those that were cancelled while they waited."""
        while self.ready:
            serial = self.ready[0]
            handover = self.handovers[serial]
            if not handover.ended:
                assert handover.first_token is not None
                outputs = (handover.first_token,)
                seat = self.token.table.seat(serial, handover.request, handover.blocks, outputs, handover.num_cached)
                if seat is None:
                    return
                handover.seat = seat
                self.token.untold.append(seat)
            self.ready.popleft()
            if handover.ended:
                self.token.table.blocks.give(handover.blocks)
                del self.handovers[serial]

    @property
    def is_clean(self) -> bool:
        """Tell whether no request holds anything."""
        return not self.handovers and not self.token.leaving


def peak_blocks(lanes: Iterable[Lane]) -> list[int]:
    """Give the most blocks of each pipeline that were taken at once."""
    return [lane.table.blocks.peak for lane in lanes]
