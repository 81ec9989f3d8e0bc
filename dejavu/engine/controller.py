"""The controller: takes requests at any time, seats them in rows, and gives out their tokens as they come."""

import heapq
import queue
import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from itertools import count

from dejavu.engine.activity import Activity
from dejavu.engine.journal import NoJournal, Past
from dejavu.engine.messages import (
    Busy,
    Moved,
    Ready,
    RecordChunk,
    Released,
    Replicated,
    Report,
    Sampled,
    SampledToken,
    Stop,
)
from dejavu.engine.recovery import Company, Death, FailureBook, Outage
from dejavu.engine.recovery_point import Repeated
from dejavu.engine.seating import Lane, Seating
from dejavu.engine.text import StreamFactory, TextWatch
from dejavu.errors import PeerLostError
from dejavu.measure.clock import RunClock
from dejavu.request import Completion, FinishReason, Request, TokenLogprobs, finish_reason
from dejavu.transport.mpi import Channel


@dataclass(frozen=True, slots=True)
class TokenEvent:
    """Tell that a request has a further token, or has ended; `text` is what can now be shown."""

    request_id: str
    token_id: int | None  # None when the request was cancelled
    text: str
    logprobs: TokenLogprobs | None
    finish_reason: FinishReason | None
    time_s: float


@dataclass(slots=True)
class Running:
    """Hold a request that is being served."""

    serial: int  # unique in the run, so that nobody takes a late message for one about the row's next request
    completion: Completion
    watch: TextWatch | None


@dataclass(slots=True)
class Counts:
    """Count the controller's requests and tokens, for the progress display."""

    submitted: int = 0
    done: int = 0
    tokens: int = 0


@dataclass(slots=True)
class Inbox:
    """Hold what other threads asked for until the controller looks."""

    requests: queue.SimpleQueue[Request] = field(default_factory=queue.SimpleQueue)
    cancels: queue.SimpleQueue[str] = field(default_factory=queue.SimpleQueue)
    lock: threading.Lock = field(default_factory=threading.Lock)  # of the count of requests


class Controller:
    """Drive the pipelines from rank 0. `submit` and `cancel` may be called from any thread, all else from one.

    Requests are seated in the order of their arrival; one that has to wait for memory lets none pass.
    """

    def __init__(
        self,
        channel: Channel,
        seating: Seating,
        eos_token_ids: tuple[int, ...],
        make_stream: StreamFactory | None = None,
        stall_timeout_s: float = 60.0,
    ) -> None:
        """Drive the pipelines that `seating` keeps the books of; without `make_stream` there is no text.

        `clock` starts anew when the workers are ready: request arrivals count from then.
        """
        self.channel = channel
        self.seating = seating
        self.company: Company | None = None  # without one, the loss of a rank is an error
        self.failures = FailureBook()
        self.journal = NoJournal()
        self.announce: Callable[[str], None] = lambda line: None
        self.keep_chunk: Callable[[RecordChunk], None] = lambda chunk: None
        self.news: list[tuple[TokenEvent, Completion]] = []  # taken, and not given out yet
        self.eos_token_ids = eos_token_ids
        self.clock = RunClock.start()
        self.make_stream = make_stream
        self.stall_timeout_s = stall_timeout_s
        self.inbox = Inbox()
        self.future: list[tuple[float, int, Request]] = []  # a heap of requests that have not arrived yet
        self.order = count()
        self.next_serial = 0
        self.waiting: deque[Completion] = deque()  # arrived, first come first
        self.running: dict[int, Running] = {}  # by serial
        self.counts = Counts()
        self.reports: dict[int, Report] = {}
        self.ready: dict[int, Ready] = {}
        self.activity = Activity()

    def submit(self, request: Request) -> None:
        """Take a request; raise CapacityError if a pool could never hold it."""
        for lane in self.seating.lanes:
            lane.check(request)
        self.journal.note_request(request)
        with self.inbox.lock:
            self.counts.submitted += 1
        self.inbox.requests.put(request)

    def cancel(self, request_id: str) -> None:
        """End a request early; nothing happens if it has ended already."""
        self.inbox.cancels.put(request_id)

    @property
    def replicated(self) -> dict[tuple[int, int], int]:
        """Give by rank and microbatch the last step that its replica has."""
        return {place: step for lane in self.seating.lanes for place, step in lane.replicated.items()}

    @property
    def is_idle(self) -> bool:
        """Tell whether no request is left."""
        return self.counts.done == self.counts.submitted

    def generate(self, requests: Iterable[Request]) -> list[Completion]:
        """Serve requests to their end and give what they produced, in their order."""
        results: dict[str, Completion] = {}
        order = []
        for request in requests:
            order.append(request.request_id)
            self.submit(request)
        for _, completion in self.events():
            if completion.finish_reason:
                results[completion.request.request_id] = completion
        return [results[request_id] for request_id in order]

    def events(self, tick: Callable[[], None] = lambda: None) -> Iterator[tuple[TokenEvent, Completion]]:
        """Give each token as it comes, until no request is left; raise DeadlineError when the pipeline stalls.

        `tick` is called again and again meanwhile, for what has to be done by the clock.
        """
        patience = self.channel.patience("the next token", self.stall_timeout_s)
        while not self.is_idle or self.news:
            epoch = self.channel.membership.epoch
            self.enduring(self.poll)
            events, self.news = self.news, []
            yield from events
            tick()
            if events or not self.running or epoch != self.channel.membership.epoch:
                patience = self.channel.patience("the next token", self.stall_timeout_s)
            if not events:
                patience.pause(at_most_s=self.until_next_arrival_s())

    def poll(self) -> None:
        """Do all that can be done now, without waiting; what has come is in `news`."""
        cancelled_ids = self.cancelled_ids()
        self.take_inbox()  # only now: whoever cancels a request has submitted it before
        self.take_cancels(cancelled_ids)
        self.listen()
        self.seat()
        self.journal.flush()

    def listen(self) -> None:
        """Take all messages that have come."""
        while item := self.channel.poll():
            rank, message = item
            match message:
                case Sampled():
                    self.take_tokens(rank, message)
                case Moved(serial):
                    self.take_moved(rank, serial)
                case Released(serial, step):
                    self.lane_of(rank).released(serial, step)
                case Replicated():
                    self.lane_of(message.rank).take_replicated(message.rank, message.steps)
                case Busy():
                    self.activity.take(rank, message, self.clock.now_s())
                case RecordChunk():
                    self.keep_chunk(message)
                case Report():
                    self.reports[rank] = message
                case Ready():
                    self.ready[rank] = message
                case other:
                    raise AssertionError(f"unexpected message {other!r}")

    def enduring(self, action: Callable[[], None]) -> None:
        """Do something to its end, from the start again after each loss of a rank that can be made good."""
        while True:
            try:
                return action()
            except PeerLostError as error:
                self.recover(error)

    def recover(self, error: PeerLostError) -> None:
        """Let all go on that was under way when a rank was lost; a further loss meanwhile begins this anew."""
        while True:
            if self.company is None:
                raise error
            detected_s = self.clock.now_s()
            deaths = self.company.reform(error)
            outage = self.failures.begin(deaths, detected_s, self.clock.now_s(), set(self.running))
            self.note_failures()
            self.journal.flush()
            try:
                self.resume(outage)
            except PeerLostError as again:
                error = again
            else:
                return

    def resume(self, outage: Outage) -> Repeated:
        """Gather everybody, and tell them where to go on; give what has to be computed again."""
        assert self.company
        self.ready.clear()
        self.reports.clear()
        gathered = self.company.gather()
        known = [serial for left in gathered.restored for serial in left.tokens]
        self.next_serial = max([self.next_serial, *(serial + 1 for serial in known)])  # a disk may know more of them
        outputs = {serial: running.completion.token_ids for serial, running in self.running.items()}
        repeated = self.seating.resume(outputs, gathered.restored)
        self.failures.resume(outage, gathered, repeated, self.clock.now_s())
        self.say(self.failures.close_finished(self.clock.now_s()))
        return repeated

    def start_clock(self) -> None:
        """Begin to count the run's seconds; failures so far came before."""
        clock = RunClock.start()
        self.failures.shift(self.clock.origin_s - clock.origin_s)
        self.clock = clock

    def say(self, lines: Iterable[str]) -> None:
        """Tell the user of failures that are over."""
        for line in lines:
            self.announce(line)
            self.note_failures()

    def note_failures(self) -> None:
        """Put all failures into the journal, over and not yet over."""
        self.journal.note("failures", [asdict(record) for record in self.failures.records])

    def take_moved(self, rank: int, serial: int) -> None:
        """Take note that a rank has done its part of a hand-over, and when the last piece was there."""
        if self.seating.moved(rank, serial) and serial in self.running:
            self.running[serial].completion.kv_arrived_s = self.clock.now_s()

    def until_next_arrival_s(self) -> float:
        """Give the time until the next scheduled request, at least a little."""
        return max(1e-4, self.future[0][0] - self.clock.now_s()) if self.future else float("inf")

    def take_inbox(self) -> None:
        """Put new requests in the order of arrival."""
        while not self.inbox.requests.empty():
            request = self.inbox.requests.get()
            heapq.heappush(self.future, (request.arrival_s, next(self.order), request))

    def seat(self) -> None:
        """Let arrived requests take rows, first come first served."""
        while self.future and self.future[0][0] <= self.clock.now_s():
            self.waiting.append(Completion(heapq.heappop(self.future)[2]))
        while self.waiting and self.seating.seat(self.next_serial, self.waiting[0].request):
            completion = self.waiting.popleft()
            completion.admitted_s = self.clock.now_s()
            self.journal.note("admitted", self.next_serial, completion.request.request_id, completion.admitted_s)
            self.run(self.next_serial, completion)
            self.next_serial += 1
        self.seating.tell()

    def run(self, serial: int, completion: Completion) -> None:
        """Follow a request that has begun; its text is brought to where its tokens are."""
        watch = None
        if self.make_stream:
            watch = TextWatch(self.make_stream(), completion.request.sampling.stop)
            for number, token_id in enumerate(completion.token_ids, 1):
                watch.push(token_id, number >= completion.request.sampling.min_tokens)
        self.running[serial] = Running(serial, completion, watch)

    def adopt(self, past: Past) -> None:
        """Take over what the journal says: requests in their rows, and those that wait or have not come yet."""
        self.clock = past.clock()
        self.counts.submitted = len(past.requests) + past.num_ended
        self.counts.done = self.counts.submitted - len(past.unfinished)
        tokens = [len(progress.completion.token_ids) for progress in past.requests.values()]
        self.counts.tokens = sum(tokens) + past.ended_tokens
        self.next_serial = past.next_serial
        for lane, steps in zip(self.seating.lanes, past.steps, strict=False):
            lane.steps = steps
        for progress in past.unfinished:
            if progress.seat or progress.prompt:
                self.seating.adopt(progress)
                self.run(progress.serial, progress.completion)
            elif progress.completion.request.arrival_s <= self.clock.now_s():
                self.waiting.append(progress.completion)
            else:
                self.inbox.requests.put(progress.completion.request)
        self.failures.adopt(past.failures, set(self.running))

    def take_over(self, deaths: Sequence[Death], detected_s: float) -> None:
        """Go on where the controller was lost, whose journal was adopted."""
        rebuilt_s, stalled = self.clock.now_s(), set(self.running)
        if deaths:
            outage = self.failures.begin(deaths, detected_s, rebuilt_s, stalled)
        else:  # nobody is left of those before
            outage = self.failures.restart(rebuilt_s, stalled)
        self.note_failures()
        try:
            repeated = self.resume(outage)
        except PeerLostError as error:
            self.recover(error)
            return
        if not deaths:  # all ranks were lost, and with them who would have said what it costs
            again = f"{repeated.prompts} prompts computed again, {repeated.tokens} tokens passed again"
            self.announce(f"{len(self.running)} requests go on where they were: {again}")

    def take_tokens(self, rank: int, result: Sampled) -> None:
        """Take the tokens of one pass; those of requests that have ended meanwhile are dropped."""
        lane = self.lane_of(rank)
        lane.passed(result.microbatch, result.step)
        for serial, num_tokens in result.chunks:
            if serial in self.running:
                self.seating.computed(serial, num_tokens)
                self.journal.note("computed", serial, num_tokens)
        for token in result.tokens:
            if token.index == 0:
                self.seating.first_token(token.serial, token.token_id)
            running = self.running.get(token.serial)
            if running is None:
                continue
            if not lane.table.prompts_only:
                lane.begun.setdefault(token.serial, result.step)
            self.say(self.failures.token(token.serial, result.time_s))
            if token.index == len(running.completion.token_ids):  # else it came before a failure already
                self.journal.note_token(token, result.time_s, result.start_s)
                self.take_token(running, token, result)
        self.journal.note("steps", [lane.steps for lane in self.seating.lanes])

    def lane_of(self, rank: int) -> Lane:
        """Give the books of a rank's pipeline."""
        return next(lane for lane in self.seating.lanes if rank in lane.ranks)

    def take_token(self, running: Running, token: SampledToken, result: Sampled) -> None:
        """Take one token, and end the request if it was its last."""
        completion, time_s = running.completion, result.time_s
        if token.index == 0:
            completion.first_token_s = time_s
        elif token.index == 1:
            completion.token_start_s = result.start_s
        completion.token_ids.append(token.token_id)
        if token.logprobs:
            completion.logprobs.append(token.logprobs)
        self.counts.tokens += 1
        params = completion.request.sampling
        reason = finish_reason(params, self.eos_token_ids, len(completion.token_ids), token.token_id)
        text, is_foreseen = "", reason is not None
        if running.watch:
            text, stopped = running.watch.push(token.token_id, len(completion.token_ids) >= params.min_tokens)
            reason = FinishReason.STOP if stopped else reason
        if reason:
            text += self.end(running, reason, time_s, is_foreseen=is_foreseen)
        event = TokenEvent(completion.request.request_id, token.token_id, text, token.logprobs, reason, time_s)
        self.news.append((event, completion))

    def end(self, running: Running, reason: FinishReason, time_s: float, *, is_foreseen: bool = False) -> str:
        """End a request that is being served, and free what it holds; give the rest of its text.

        `is_foreseen` says that its pipeline ends it by itself, for its last token or their number.
        """
        completion = running.completion
        completion.finish_reason = reason
        completion.finish_s = time_s
        rest = ""
        if running.watch:
            rest = running.watch.finish()
            completion.text = running.watch.text
        self.journal.note_end(completion)
        del self.running[running.serial]
        self.say(self.failures.token(running.serial, time_s))
        self.seating.end(running.serial, is_foreseen=is_foreseen)
        self.counts.done += 1
        return rest

    def cancelled_ids(self) -> set[str]:
        """Give the requests that were to be cancelled since the last look."""
        ids = set()
        while not self.inbox.cancels.empty():
            ids.add(self.inbox.cancels.get())
        return ids

    def take_cancels(self, ids: set[str]) -> None:
        """End some requests, wherever they are."""
        if not ids:
            return
        now_s = self.clock.now_s()
        for running in [r for r in self.running.values() if r.completion.request.request_id in ids]:
            text = self.end(running, FinishReason.CANCELLED, now_s)
            self.news.append(cancelled(running.completion, text, now_s))
        self.news += [cancelled(completion, "", now_s) for completion in self.drop_unseated(ids, now_s)]

    def drop_unseated(self, ids: set[str], now_s: float) -> list[Completion]:
        """Forget requests that have no row yet."""
        dropped = [c for c in self.waiting if c.request.request_id in ids]
        self.waiting = deque(c for c in self.waiting if c.request.request_id not in ids)
        dropped += [Completion(request) for _, _, request in self.future if request.request_id in ids]
        self.future = [entry for entry in self.future if entry[2].request_id not in ids]
        heapq.heapify(self.future)
        for completion in dropped:
            completion.finish_reason, completion.finish_s = FinishReason.CANCELLED, now_s
            self.journal.note_end(completion)
        self.counts.done += len(dropped)
        return dropped

    def wait_ready(self, workers: Sequence[int], deadline_s: float) -> dict[int, Ready]:
        """Wait until every worker has loaded its weights."""
        self.wait_for(self.ready, workers, "the workers to load", deadline_s)
        return self.ready

    def wait_clean(self) -> None:
        """Wait until nothing is held for requests that have ended: hand-overs run out first."""
        patience = self.channel.patience("the last hand-overs", self.stall_timeout_s)
        while not self.seating.is_clean:
            self.poll()
            patience.pause()

    def stop(self, workers: Sequence[int]) -> dict[int, Report]:
        """End the run when nothing is held for any request any more, and collect what each worker recorded."""
        self.enduring(lambda: self.end_run(workers))
        if self.company:
            self.company.dismiss()
        return self.reports

    def end_run(self, workers: Sequence[int]) -> None:
        """Tell the workers that no more work will come, and take their reports."""
        self.wait_clean()
        for lane in self.seating.lanes:
            self.channel.send(lane.ranks[0], Stop())
        self.wait_for(self.reports, workers, "the workers' reports", self.stall_timeout_s)

    def wait_for(
        self, answers: dict[int, Ready] | dict[int, Report], workers: Sequence[int], what: str, deadline_s: float
    ) -> None:
        """Listen until every worker has answered."""
        patience = self.channel.patience(what, deadline_s)
        self.listen()
        while any(rank not in answers for rank in workers):
            patience.pause()
            self.listen()


def cancelled(completion: Completion, text: str, time_s: float) -> tuple[TokenEvent, Completion]:
    """Make the event of a cancelled request."""
    event = TokenEvent(completion.request.request_id, None, text, None, FinishReason.CANCELLED, time_s)
    return event, completion
