"""Who sits where while prompts are processed in one pipeline and tokens generated in another: the controller's books.

A prompt's KV is on the prompt side from its pass on, on the token side when it has been handed over, and in the replica
of the token side when the first pass there has been copied. Its blocks on the prompt side are kept meanwhile: whenever
the token side turns out to lack the prompt, it is handed over again, to the row and the blocks that the request has.
"""

from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from dejavu.engine.journal import NoJournal, Progress
from dejavu.engine.messages import Admission, Expect, Resend
from dejavu.engine.recovery_point import Repeated, Restored, tokens_there
from dejavu.engine.seating import Lane, Send
from dejavu.request import Request

TOKEN_LANE = 1


@dataclass(slots=True)
class Handover:
    """Follow a request from its prompt to its end.

    Its token blocks are reserved from the start, so that its KV always has somewhere to go, and the pipelines cannot
    wait for each other. It holds its prompt row until every prompt rank has sent its part, its prompt blocks longer.
    """

    request: Request
    prompt: Admission | None  # while it has a row in the prompt pipeline
    kept: tuple[int, ...]  # blocks of the prompt pipeline
    blocks: tuple[int, ...]  # of the token pipeline
    sending: set[int]  # prompt ranks that have not sent all yet
    receiving: set[int]  # token ranks that do not have all yet
    first_token: int | None = None
    num_cached: int = 0  # of the tokens in the token pipeline's blocks
    seat: Admission | None = None  # in the token pipeline
    ended: bool = False

    @property
    def num_prompt(self) -> int:
        """Count the tokens of the prompt."""
        return len(self.request.prompt_token_ids)

    @property
    def is_moving(self) -> bool:
        """Tell whether the token pipeline lacks anything, or a prompt rank has not sent all."""
        return self.first_token is None or bool(self.sending or self.receiving)

    def num_there(self, outputs: Sequence[int], *, is_ready: bool) -> int:
        """Count the tokens that the token pipeline had before a failure."""
        if self.receiving:
            return 0
        if self.seat:
            return tokens_there(self.seat, outputs)
        return self.num_cached if is_ready else self.num_prompt


class Disaggregated:
    """Process prompts in one pipeline and generate tokens in another.

    A request begins when the prompt pipeline has a row and the token pipeline has the memory: a token pipeline that is
    full holds the prompts back. It gets a token row when its first token is known and its KV is complete, first come
    first served. A request that ends before that frees its memory when the last piece has moved.

    The prompt side's blocks of requests that generate tokens are given up, the oldest first, when a new prompt needs
    them: with replicas only those of requests that the replicas have, so that a prompt waits until then.
    """

    def __init__(self, prompt: Lane, token: Lane, send: Send, journal: NoJournal | None = None) -> None:
        self.prompt = prompt
        self.token = token
        self.lanes: Sequence[Lane] = (prompt, token)
        self.send = send
        self.journal = journal or NoJournal()
        self.handovers: dict[int, Handover] = {}
        self.ready: deque[int] = deque()  # serials that need nothing but a token row
        self.expected: list[Expect] = []
        self.resent: list[Resend] = []

    def seat(self, serial: int, request: Request) -> bool:
        """Let a prompt begin whose KV has a place to go; one that ends with its first token needs none."""
        moves = request.sampling.max_tokens > 1
        blocks = self.token.table.reserve(request) if moves else ()
        if blocks is None:
            return False
        self.make_room(request)
        admission = self.prompt.table.admit(serial, request, blocks)
        if admission is None:
            self.token.table.blocks.give(blocks)
            return False
        self.handovers[serial] = Handover(request, admission, admission.blocks, blocks, set(), set())
        self.begin(serial)
        return True

    def make_room(self, request: Request) -> None:
        """Give up blocks of the prompt pipeline that are only kept, as many as a prompt lacks."""
        table = self.prompt.table
        needed = table.blocks_needed(request)
        if table.is_full or needed <= len(table.blocks.free):
            return
        for serial, handover in self.handovers.items():
            if handover.kept and self.is_safe(serial):
                self.give_up(handover)
                self.journal.note("given_up", serial)
                if needed <= len(table.blocks.free):
                    return

    def is_safe(self, serial: int) -> bool:
        """Tell whether the token side has all of a prompt, and has it twice where there are replicas."""
        handover = self.handovers[serial]
        if handover.is_moving or handover.ended or handover.prompt:
            return False
        return not self.token.is_replicated or bool(handover.seat and self.token.has_replica(handover.seat))

    def give_up(self, handover: Handover) -> None:
        """Free the blocks of the prompt pipeline that a request has, if any, and its row there."""
        if handover.prompt:
            self.prompt.table.vacate(handover.prompt)
            handover.prompt = None
        self.prompt.table.blocks.give(handover.kept)
        handover.kept = ()

    def begin(self, serial: int) -> None:
        """Let a prompt be processed, and sent on if more than its first token is wanted."""
        handover = self.handovers[serial]
        assert handover.prompt
        self.prompt.untold.append(handover.prompt)
        handover.first_token = None
        if handover.blocks:
            self.expect(serial)

    def expect(self, serial: int) -> None:
        """Let the prompt ranks' KV of a request come to the token ranks."""
        handover = self.handovers[serial]
        handover.sending, handover.receiving = set(self.prompt.ranks), set(self.token.ranks)
        self.expected.append(Expect(serial, handover.num_prompt, handover.blocks))

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
        if handover.seat and not handover.is_moving:
            self.token.end(handover.seat, self.send, is_foreseen=is_foreseen)
            self.give_up(self.handovers.pop(serial))
        elif serial not in self.ready:
            self.advance(serial)

    def advance(self, serial: int) -> None:
        """Free the prompt row when it is sent; queue for a token row, or free all, when all is here."""
        handover = self.handovers[serial]
        if handover.prompt and not handover.sending and handover.first_token is not None:
            self.prompt.table.vacate(handover.prompt)
            handover.prompt = None
        if handover.is_moving:
            return
        if handover.ended:
            self.drop(serial)
        elif handover.seat:
            self.token.untold.append(handover.seat)
        else:
            self.queue(serial, handover.num_prompt)

    def queue(self, serial: int, num_cached: int) -> None:
        """Let a request wait for a token row, with so many tokens on the token side."""
        self.handovers[serial].num_cached = num_cached
        self.journal.note("moved", serial, num_cached)
        if serial not in self.ready:
            self.ready.append(serial)

    def tell(self) -> None:
        """Give token rows to who waits for one, and send all decisions; receives are announced before prompts."""
        self.fill_rows()
        self.tell_moves()
        for lane in self.lanes:
            lane.tell(self.send)

    def tell_moves(self) -> None:
        """Announce the KV that is coming to those who will have it, and then ask for what is to come again."""
        for expect in self.expected:
            for rank in self.token.ranks:
                self.send(rank, expect)
        for resend in self.resent:
            for rank in self.prompt.ranks:
                self.send(rank, resend)
        self.expected, self.resent = [], []

    def computed(self, serial: int, num_tokens: int) -> None:
        """Prompts go through whole."""
        raise AssertionError(f"{num_tokens} tokens of the prompt of {serial} are through by themselves")

    def adopt(self, progress: Progress) -> None:
        """Give a request what it had again; a hand-over that may have been under way is taken for one that was."""
        prompt, tokens, seat = progress.prompt, progress.completion.token_ids, None
        kept = prompt.blocks if prompt and progress.keeps_prompt else ()
        if progress.seat:
            seat = self.token.table.adopt(progress.seat[1])
            blocks = seat.blocks
        else:
            assert prompt
            blocks = prompt.handover
            self.token.table.blocks.claim(blocks)
        handover = Handover(progress.completion.request, None, kept, blocks, set(), set(), seat=seat)
        self.handovers[progress.serial] = handover
        if tokens:
            handover.first_token = tokens[0]
            self.prompt.table.blocks.claim(kept)
        elif prompt:
            handover.prompt = self.prompt.table.adopt(prompt)
        if not seat and progress.num_moved is None:
            handover.receiving = set(self.token.ranks)
        elif not seat:
            self.queue(progress.serial, progress.num_moved or 0)

    def resume(self, outputs: Mapping[int, Sequence[int]], restored: Sequence[Restored]) -> Repeated:
        """Let requests go on where they are; what the token pipeline lacks of prompts is handed over again."""
        repeated = Repeated()
        self.expected, self.resent = [], []
        for lane in self.lanes:
            lane.stop_passes()
        for serial in list(self.handovers):
            if self.handovers[serial].ended:
                self.drop(serial)
            elif self.handovers[serial].first_token is None:
                repeated.prompts += bool(outputs[serial])
                self.begin(serial)
            else:
                self.resume_one(serial, outputs[serial], restored, repeated)
        self.fill_rows()
        self.journal.note_seats(TOKEN_LANE, self.token.untold)  # before anybody writes into what is lost
        self.tell_moves()
        for lane in self.lanes:
            lane.resume(self.send)
        return repeated

    def resume_one(self, serial: int, outputs: Sequence[int], restored: Sequence[Restored], repeated: Repeated) -> None:
        """Find out where a request stands whose prompt is through, and what it needs again."""
        handover = self.handovers[serial]
        there = handover.num_there(outputs, is_ready=serial in self.ready)
        left = restored[TOKEN_LANE].limit(serial, there)
        has_copy = bool(handover.kept) and restored[0].limit(serial, handover.num_prompt) == handover.num_prompt
        if handover.prompt:  # its pass is through
            self.prompt.table.vacate(handover.prompt)
            handover.prompt = None
        if handover.kept and not has_copy:
            self.give_up(handover)
            self.journal.note("given_up", serial)
        handover.sending, handover.receiving = set(), set()
        if left < handover.num_prompt and has_copy:
            self.hand_over_again(serial)
            left = handover.num_prompt
            repeated.prompts_handed_over += 1
        self.go_on(serial, outputs, there, left, restored[TOKEN_LANE], repeated)

    def hand_over_again(self, serial: int) -> None:
        """Bring a prompt's KV from the prompt pipeline once more."""
        handover = self.handovers[serial]
        self.expect(serial)
        self.resent.append(Resend(serial, handover.num_prompt, handover.kept))
        self.journal.note("moved", serial, None)
        if serial in self.ready:
            self.ready.remove(serial)

    def go_on(
        self, serial: int, outputs: Sequence[int], there: int, left: int, restored: Restored, repeated: Repeated
    ) -> None:
        """Let a request whose prompt is through go on with what is left, or will have come again, of its KV.

        What has not come of it, and is nowhere else, is computed in the token pipeline.
        """
        handover = self.handovers[serial]
        if handover.seat:
            handover.seat, excused = self.token.renew(handover.seat, outputs, there, left, restored)
            repeated.count(handover.seat, there, excused)
            if handover.receiving:
                self.token.begun.pop(serial, None)
                self.journal.note_seats(TOKEN_LANE, [replace(handover.seat, num_cached=0)])
            else:
                self.token.untold.append(handover.seat)
        elif not handover.receiving:
            if left < handover.num_prompt:
                repeated.count_prompt(is_avoidable=there > left and not restored.acknowledged)
            self.queue(serial, left)

    def drop(self, serial: int) -> None:
        """Free all that a request holds which has ended; nothing moves any more."""
        handover = self.handovers.pop(serial)
        self.token.begun.pop(serial, None)
        self.give_up(handover)
        if handover.seat:
            self.token.table.release(handover.seat)
        else:
            self.token.table.blocks.give(handover.blocks)
        if serial in self.ready:
            self.ready.remove(serial)

    def fill_rows(self) -> None:
        """Seat waiting requests in free token rows; drop those that were cancelled while they waited."""
        while self.ready:
            serial = self.ready[0]
            handover = self.handovers[serial]
            if handover.ended:
                self.drop(serial)
                continue
            assert handover.first_token is not None
            outputs = (handover.first_token,)
            seat = self.token.table.seat(serial, handover.request, handover.blocks, outputs, handover.num_cached)
            if seat is None:
                return
            self.ready.popleft()
            handover.seat = seat
            self.token.untold.append(seat)

    @property
    def is_clean(self) -> bool:
        """Tell whether no request holds anything."""
        return not self.handovers and not self.token.leaving
