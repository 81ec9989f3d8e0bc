"""Which request sits where, from its admission to its end: the controller's side of the pipelines, and pure.

Two arrangements share an interface: colocated pipelines, each of which takes a request from prompt to end, and a prompt
pipeline that hands each request over to a token pipeline. `send(rank, message)` carries their decisions out.
"""

from collections import deque
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Protocol

from dejavu.engine.messages import Admission, Admissions, Expect, Release
from dejavu.engine.rows import RowTable
from dejavu.errors import CapacityError
from dejavu.request import Request

Send = Callable[[int, object], None]


@dataclass(slots=True)
class Lane:
    """Keep the books of one pipeline: its rows, and the admissions that its head has not been told yet."""

    ranks: Sequence[int]  # the first one leads the first stage
    table: RowTable
    untold: list[Admission] = field(default_factory=list)

    def tell(self, send: Send) -> None:
        """Tell the head of all new admissions at once, so that their prompts can share a pass."""
        if self.untold:
            send(self.ranks[0], Admissions(tuple(self.untold)))
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

    def end(self, serial: int) -> None:
        """Free what a request holds, as soon as nobody uses it any more."""

    def tell(self) -> None:
        """Send what was decided since the last call."""

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

    def end(self, serial: int) -> None:
        """Free a request's row; its pipeline starts no further step for it."""
        lane, admission = self.seats.pop(serial)
        lane.tell(self.send)  # an admission has to come before its release
        lane.table.release(admission)
        self.send(lane.ranks[0], Release(serial))

    def tell(self) -> None:
        """Send the new admissions."""
        for lane in self.lanes:
            lane.tell(self.send)

    @property
    def is_clean(self) -> bool:
        """Tell whether no request is seated."""
        return not self.seats


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
    seat: Admission | None = None  # in the token pipeline
    ended: bool = False


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
        sending, receiving = (set(self.prompt.ranks), set(self.token.ranks)) if moves else (set(), set())
        self.handovers[serial] = Handover(request, admission, blocks, sending, receiving)
        self.prompt.untold.append(admission)
        if moves:
            self.expected.append(Expect(serial, len(request.prompt_token_ids), blocks))
        return True

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

    def end(self, serial: int) -> None:
        """Free a request's token row, or let its hand-over run out first."""
        handover = self.handovers[serial]
        handover.ended = True
        if handover.seat:
            self.token.tell(self.send)
            self.token.table.release(handover.seat)
            self.send(self.token.ranks[0], Release(serial))
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
            self.ready.append(serial)
        elif serial not in self.ready:
            self.token.table.blocks.give(handover.blocks)
            del self.handovers[serial]

    def tell(self) -> None:
        """Give token rows to who waits for one, and send all decisions; receives are announced before prompts."""
        self.fill_rows()
        for expect in self.expected:
            for rank in self.token.ranks:
                self.send(rank, expect)
        self.expected = []
        for lane in self.lanes:
            lane.tell(self.send)

    def fill_rows(self) -> None:
        """Seat waiting requests in free token rows; drop those that were cancelled while they waited."""
        while self.ready:
            serial = self.ready[0]
            handover = self.handovers[serial]
            if not handover.ended:
                assert handover.first_token is not None
                seat = self.token.table.seat(serial, handover.request, handover.blocks, handover.first_token)
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
        return not self.handovers


def peak_blocks(lanes: Iterable[Lane]) -> list[int]:
    """Give the most blocks of each pipeline that were taken at once."""
    return [lane.table.blocks.peak for lane in lanes]
