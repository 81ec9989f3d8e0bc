"""A worker that queues token steps before their tokens are seen gives the tokens of one that waits for each."""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass, field
from random import Random

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dejavu.engine.flight import Flights
from dejavu.engine.handover import NoMover
from dejavu.engine.inlet import NoInlet
from dejavu.engine.logits import OneRank
from dejavu.engine.messages import Admission, Admissions, Release, Sampled, Stop
from dejavu.engine.rows import RowTable
from dejavu.engine.scheduler import Scheduler
from dejavu.engine.sink import Sampling
from dejavu.engine.source import Scheduled
from dejavu.engine.unseen import UnseenTokens
from dejavu.engine.worker import GivenBlocks, Worker
from dejavu.model.decoder import StageModel
from dejavu.model.spec import ModelSpec, Shard
from dejavu.model.weights import dummy_stage
from dejavu.request import Request, SamplingParams, finish_reason

EOS = 5
SPEC = ModelSpec(
    "llama", 2, 16, 2, 1, 8, 32, 24, 64, "rope", "rmsnorm", "silu", gated_ffn=True, qkv_bias=False, out_bias=False,
    ffn_bias=False, eos_token_ids=(EOS,),
)  # fmt: skip
BLOCK_SIZE, ROWS = 4, 3


def make_stage() -> StageModel:
    """Make a model whose tokens vary."""
    shard = Shard(0, SPEC.num_layers, SPEC.num_layers)
    weights = dummy_stage(SPEC, shard, torch.float32, torch.device("cpu"))
    return StageModel(SPEC, shard, {n: w * 20 if w.dim() == 2 else w for n, w in weights.items()})


@dataclass
class Lateness:
    """Be a time line, and a mark of it that is reached when so many moments have passed; each look takes one."""

    random: Random | None
    moment: int = 0
    due: int = 0

    def mark(self) -> Later:
        if self.random:  # a GPU comes to a mark after it has come to those before
            self.due = max(self.due, self.moment) + self.random.randint(0, 4)
        return Later(self, self.due)

    def now_s(self) -> float:
        self.moment += 1
        return float(self.moment)


@dataclass(frozen=True)
class Later:
    """Be a mark."""

    timeline: Lateness
    due: int

    @property
    def reached(self) -> bool:
        return self.timeline.moment >= self.due

    def settle(self) -> float:
        assert self.reached
        return float(self.due)


@dataclass
class Books:
    """Play the controller at the other end of a channel: seat requests, take tokens, end and cancel."""

    waiting: deque[Request]
    cancels: dict[str, int]  # request → the number of tokens after which it is cancelled
    timeline: Lateness
    table: RowTable = field(default_factory=lambda: RowTable(1, ROWS, BLOCK_SIZE, 3 * ROWS))
    messages: deque[object] = field(default_factory=deque)
    running: dict[int, Admission] = field(default_factory=dict)
    outputs: dict[str, list[int]] = field(default_factory=dict)
    passes: int = 0

    def seat(self):
        seats = []
        while self.waiting and (seat := self.table.admit(self.passes * 100 + len(seats), self.waiting[0])):
            self.running[seat.serial] = seat
            self.outputs[self.waiting.popleft().request_id] = []
            seats.append(seat)
        if seats:
            self.messages.append(Admissions(tuple(seats)))
        elif not self.running:
            self.messages.append(Stop())

    def take(self, sampled: Sampled):
        self.passes += 1
        for token in sampled.tokens:
            if (seat := self.running.get(token.serial)) is None:
                continue
            request_id, params = seat.request.request_id, seat.request.sampling
            output = self.outputs[request_id]
            assert token.index == len(output)
            output.append(token.token_id)
            is_cancelled = len(output) == self.cancels.get(request_id)
            if is_cancelled:
                self.messages.append(Release(token.serial))
            if is_cancelled or finish_reason(params, SPEC.eos_token_ids, len(output), token.token_id):
                self.table.release(self.running.pop(token.serial))
        self.seat()

    def poll(self):
        return (0, self.messages.popleft()) if self.messages else None

    def send(self, rank: int, message: object) -> None:
        """Need no news of the last step of a request: its blocks are given out again behind it."""

    def patience(self, what: str, deadline_s: float | None):
        return self

    def pause(self, at_most_s: float) -> None:
        self.timeline.moment += 1


def serve(requests, cancels, stage, seed):
    """Serve some requests; a `seed` lets the device be late, and the scheduler look ahead. Counts unseen passes."""
    timeline = Lateness(None if seed is None else Random(seed))
    books, unseen, taken = Books(deque(requests), cancels, timeline), UnseenTokens(), []
    scheduler = Scheduler(1, 0, 12, SPEC.eos_token_ids, looks_ahead=seed is not None)
    flights = Flights(1, (0, 0), timeline.now_s)

    def tell(sampled):
        scheduler.sampled(sampled)
        flights.later.append(lambda: books.take(sampled))

    pool = torch.full((3 * ROWS, SPEC.num_layers, 2, BLOCK_SIZE, SPEC.num_kv_heads, SPEC.head_dim), 1e4)
    worker = Worker(
        books, stage, pool, GivenBlocks(), NoInlet(), Scheduled(books, NoMover(), flights, scheduler, timeline.now_s),
        Sampling(SPEC, OneRank(), timeline.now_s, tell, unseen, stage.likeliest), NoMover(), flights, timeline, unseen,
        followers=[], peers=[],
    )  # fmt: skip
    step = worker.step
    worker.step = lambda work: (taken.append(not work.token_ids), step(work))
    books.seat()
    worker.run()
    assert not scheduler.places
    assert len(books.table.blocks.free) == books.table.num_blocks
    return books.outputs, sum(taken)


@pytest.fixture(autouse=True)
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


STAGE = make_stage()
sampling = st.builds(
    SamplingParams,
    max_tokens=st.integers(1, 9),
    min_tokens=st.sampled_from([0, 0, 3]),
    temperature=st.sampled_from([0.0, 0.7, 1.5]),
    top_k=st.sampled_from([0, 6]),
    top_p=st.sampled_from([1.0, 0.8]),
    repetition_penalty=st.sampled_from([1.0, 1.0, 1.0, 1.3]),
    bad_words_ids=st.sampled_from([(), (), ((3,),), ((3, 4),)]),
    stop_token_ids=st.sampled_from([(), (7, 11)]),
    ignore_eos=st.booleans(),
    seed=st.integers(0, 9),
)
workloads = st.lists(
    st.tuples(st.lists(st.integers(0, 23), min_size=1, max_size=4), sampling, st.sampled_from([0, 0, 0, 1, 2, 4])),
    min_size=1,
    max_size=8,
)


@settings(max_examples=30, deadline=None)
@given(workload=workloads, seed=st.integers(0, 2**32))
def test_tokens_are_the_same(workload, seed):
    requests = [Request(str(n), tuple(prompt), params) for n, (prompt, params, _) in enumerate(workload)]
    cancels = {str(n): after for n, (_, _, after) in enumerate(workload) if after}
    expected, _ = serve(requests, cancels, STAGE, None)
    found, _ = serve(requests, cancels, STAGE, seed)
    assert found == expected


def test_token_steps_are_queued_before_their_tokens_are_seen():
    params = SamplingParams(max_tokens=9, ignore_eos=True, temperature=1.0)
    outputs, num_unseen = serve([Request("0", (1, 2, 3), params)], {}, STAGE, 0)
    assert num_unseen > 4
    assert len(set(outputs["0"])) > 2, "a text that says little"
