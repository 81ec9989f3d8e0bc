"""The controller's books for both arrangements, driven through random orders of what ranks report."""

from random import Random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dejavu.engine.disaggregated import Disaggregated
from dejavu.engine.messages import Admissions, Expect, Release, Resend, Resume
from dejavu.engine.recovery_point import Restored, join_restored
from dejavu.engine.rows import RowTable
from dejavu.engine.seating import Colocated, Lane
from dejavu.errors import CapacityError
from dejavu.request import Request, SamplingParams

PROMPT_RANKS, TOKEN_RANKS = range(1, 3), range(3, 6)
ACTIONS = ("seat", "first", "move", "end", "cancel", "tell", "listen", "begin", "pass", "step", "fail")


def make_request(serial, prompt=4, output=5):
    return Request(str(serial), tuple(range(prompt)), SamplingParams(max_tokens=output))


class Ranks:
    """Stand in for both pipelines: note who was told what, and what each rank still has to do."""

    def __init__(self):
        self.moves = []  # (rank, serial) still to be reported
        self.prompting = []  # serials whose first token is still to come
        self.inbox = []  # of the token pipeline's head: admissions and releases in their order
        self.generating = {}  # serial -> admission, as far as the head knows
        self.passes = {}  # microbatch -> (step, admissions) under way in the token pipeline
        self.steps = {}  # microbatch -> its next step
        self.expected = {}  # serial -> blocks
        self.order = []

    def send(self, rank, message):
        match message:
            case Expect(serial, _, blocks):
                assert rank in TOKEN_RANKS
                self.check_unused(blocks)
                self.expected[serial] = blocks
                self.moves.append((rank, serial))
            case Admissions(admissions) if rank == PROMPT_RANKS[0]:
                for admission in admissions:
                    self.prompting.append(admission.serial)
                    if admission.handover:
                        assert self.expected[admission.serial] == admission.handover  # the receives come first
                        self.moves += [(r, admission.serial) for r in PROMPT_RANKS]
            case Resend(serial, _, _):
                assert rank in PROMPT_RANKS
                assert serial in self.expected
                self.moves.append((rank, serial))
            case Admissions(admissions):
                assert rank == TOKEN_RANKS[0]
                for admission in admissions:
                    assert not any(serial == admission.serial for _, serial in self.moves), "not all KV is there"
                    if admission.serial in self.expected:
                        assert admission.blocks == self.expected[admission.serial]
                self.inbox += admissions
            case Resume(admissions, _) if rank == PROMPT_RANKS[0]:
                self.send(rank, Admissions(admissions))
            case Resume(admissions, steps):
                self.steps = dict(enumerate(steps))
                for admission in admissions:
                    self.generate(admission)
            case Release(serial):
                assert rank == TOKEN_RANKS[0]
                self.inbox.append(serial)

    def check_unused(self, blocks):
        """See that no pass under way, or yet to come, writes into these blocks."""
        queued = [each for each in self.inbox if not isinstance(each, int)]
        under_way = [each for _, admissions in self.passes.values() for each in admissions]
        for admission in (*queued, *under_way, *self.generating.values()):
            assert not set(blocks) & set(admission.blocks), f"request {admission.serial} may still write"

    def listen(self, lane):
        """Let the head take all messages, and answer."""
        for message in self.inbox:
            if isinstance(message, int):
                gone = self.generating.pop(message, None)
                lane.released(message, self.steps.get(gone.microbatch, 0) if gone else 0)
            else:
                self.generate(message)
        self.inbox = []

    def begin_pass(self, microbatch):
        rows = [admission for admission in self.generating.values() if admission.microbatch == microbatch]
        if rows and microbatch not in self.passes:
            self.passes[microbatch] = self.steps.get(microbatch, 0), rows
            self.steps[microbatch] = self.steps.get(microbatch, 0) + 1

    def end_pass(self, lane, microbatch):
        if microbatch in self.passes:
            lane.passed(microbatch, self.passes.pop(microbatch)[0])

    def rests(self, serial):
        """Tell whether the head knows a request, and no pass of it is under way."""
        flying = [each.serial for _, admissions in self.passes.values() for each in admissions]
        return serial in self.generating and serial not in flying

    def generate(self, admission):
        prompt = len(admission.request.prompt_token_ids)
        assert admission.outputs
        assert admission.num_cached <= prompt + len(admission.outputs) - 1
        self.generating[admission.serial] = admission
        self.order.append(admission.serial)

    def fail(self):
        """Forget all that was under way."""
        self.moves, self.prompting, self.generating, self.expected = [], [], {}, {}
        self.inbox, self.passes = [], {}


def owned(seating):
    prompt, token = (lane.table for lane in seating.lanes)
    prompt_blocks = [b for h in seating.handovers.values() for b in h.kept]
    assert all(h.kept == h.prompt.blocks for h in seating.handovers.values() if h.prompt)
    token_blocks = [b for h in seating.handovers.values() for b in h.blocks]
    token_blocks += [b for each in seating.token.leaving.values() for b in each.admission.blocks]
    for table, blocks in ((prompt, prompt_blocks), (token, token_blocks)):
        assert len(set(blocks)) == len(blocks), "a block has two owners"
        assert set(blocks) | table.blocks.free == set(range(table.num_blocks))
    seats = [h.seat for h in seating.handovers.values() if h.seat]
    assert sorted(seats, key=id) == sorted(token.occupants.values(), key=id)


@settings(max_examples=200, deadline=None)
@given(
    shapes=st.lists(st.tuples(st.integers(1, 9), st.integers(1, 6)), min_size=1, max_size=12),
    rows=st.tuples(st.integers(1, 3), st.integers(1, 3)),
    token_blocks=st.integers(4, 20),
    seed=st.integers(0, 2**32),
)
def test_disaggregated_books_balance_in_any_order(shapes, rows, token_blocks, seed):
    random, ranks = Random(seed), Ranks()
    prompt = Lane(PROMPT_RANKS, RowTable(2, rows[0], 4, 2 * rows[0] * 3, prompts_only=True))
    seating = Disaggregated(prompt, Lane(TOKEN_RANKS, RowTable(3, rows[1], 4, token_blocks)), ranks.send)
    waiting = [make_request(serial, *shape) for serial, shape in enumerate(shapes)]
    serial, running, outputs = 0, set(), {}
    for _ in range(3000):
        action = random.choice(ACTIONS)
        if action == "seat" and waiting and seating.seat(serial, waiting[0]):
            waiting.pop(0)
            running.add(serial)
            outputs[serial] = []
            serial += 1
        elif action == "first" and ranks.prompting:
            first = ranks.prompting.pop(random.randrange(len(ranks.prompting)))
            seating.first_token(first, 7)
            outputs[first] = outputs[first] or [7]
            if shapes[first][1] == 1 and first in running:
                running.discard(first)
                seating.end(first, is_foreseen=True)
        elif action == "move" and ranks.moves:
            seating.moved(*ranks.moves.pop(random.randrange(len(ranks.moves))))
        elif action == "end" and ranks.generating:
            ended = random.choice(sorted(ranks.generating))
            if ended in running and ranks.rests(ended):
                running.discard(ended)
                del ranks.generating[ended]
                seating.end(ended, is_foreseen=True)
        elif action == "cancel" and running and random.random() < 0.05:
            ended = random.choice(sorted(running))
            running.discard(ended)
            seating.end(ended, is_foreseen=False)
        elif action == "tell":
            seating.tell()
        elif action == "listen":
            ranks.listen(seating.token)
        elif action == "begin":
            ranks.begin_pass(random.randrange(3))
        elif action == "pass":
            ranks.end_pass(seating.token, random.randrange(3))
        elif action == "step" and ranks.generating:
            stepping = random.choice(sorted(ranks.generating))
            if stepping in running and len(outputs[stepping]) < shapes[stepping][1] - 1:
                outputs[stepping].append(7)
        elif action == "fail" and random.random() < 0.1:
            ranks.fail()
            intact = random.random() < 0.5
            seating.resume({s: outputs[s] for s in running}, [Restored(True), Restored(intact)])
            seated = {s for s, h in seating.handovers.items() if h.seat and not h.receiving}
            assert set(ranks.generating) == seated
            for lost in () if intact else seated:
                assert ranks.generating[lost].num_cached == 0
        owned(seating)
        if not waiting and not running and seating.is_clean:
            break
    assert not waiting
    assert seating.is_clean
    assert all(len(lane.table.blocks.free) == lane.table.num_blocks for lane in seating.lanes)


def test_what_a_first_failure_lost_is_not_taken_for_there_at_a_second():
    """A request whose prompt is computed again has no KV until its next token has come."""
    told = []
    seating = Colocated([Lane(range(1, 2), RowTable(1, 1, 4, 4))], lambda rank, message: told.append(message))
    seating.seat(0, make_request(0, 4, 9))
    for intact, outputs, num_cached, prompts, tokens in (
        (True, [], 0, 0, 0),  # its prompt was under way
        (True, [5, 6], 5, 0, 0),
        (False, [5, 6, 7], 0, 1, 2),
        (True, [5, 6, 7], 0, 1, 2),
        (True, [5, 6, 7, 8], 7, 0, 0),
    ):
        repeated = seating.resume({0: outputs}, [Restored(intact)])
        (admission,) = told[-1].admissions
        assert (admission.outputs, admission.num_cached) == (tuple(outputs), num_cached)
        assert (repeated.prompts, repeated.tokens, repeated.steps) == (prompts, tokens, tokens)
    repeated = seating.resume({0: [5, 6, 7, 8, 9]}, [Restored(intact=False, tokens={0: 6})])
    assert told[-1].admissions[0].num_cached == 6
    assert (repeated.prompts, repeated.tokens, repeated.steps) == (0, 2, 2)


def test_a_full_token_pipeline_holds_prompts_back():
    ranks = Ranks()
    prompt = Lane(PROMPT_RANKS, RowTable(1, 4, 4, 8, prompts_only=True))
    seating = Disaggregated(prompt, Lane(TOKEN_RANKS, RowTable(1, 1, 4, 4)), ranks.send)
    assert [seating.seat(n, make_request(n)) for n in range(3)] == [True, True, False]
    assert len(prompt.table.occupants) == 2


def test_requests_take_token_rows_in_the_order_in_which_they_are_complete():
    ranks = Ranks()
    prompt = Lane(PROMPT_RANKS, RowTable(1, 4, 4, 8, prompts_only=True))
    seating = Disaggregated(prompt, Lane(TOKEN_RANKS, RowTable(1, 1, 4, 8)), ranks.send)
    for n in range(3):
        seating.seat(n, make_request(n))
    seating.tell()
    for n in (1, 0, 2):
        seating.first_token(n, 9)
        arrived = [seating.moved(rank, n) for rank in (*PROMPT_RANKS, *TOKEN_RANKS)]
        assert arrived == [False] * (len(arrived) - 1) + [True]
        ranks.moves = [move for move in ranks.moves if move[1] != n]
    for ended in (1, 0, 2):
        seating.tell()
        ranks.listen(seating.token)
        assert list(ranks.generating) == [ended]
        seating.end(ended, is_foreseen=True)
        del ranks.generating[ended]
    assert seating.is_clean


def test_a_cancelled_request_keeps_its_blocks_until_its_last_pass_is_through():
    ranks = Ranks()
    prompt = Lane(PROMPT_RANKS, RowTable(1, 4, 4, 8, prompts_only=True))
    token = Lane(TOKEN_RANKS, RowTable(1, 1, 4, 2))
    seating = Disaggregated(prompt, token, ranks.send)
    seating.seat(0, make_request(0))
    seating.tell()
    seating.first_token(0, 9)
    for rank in (*PROMPT_RANKS, *TOKEN_RANKS):
        seating.moved(rank, 0)
    ranks.moves = []
    seating.tell()
    ranks.listen(token)
    ranks.begin_pass(0)
    ranks.end_pass(token, 0)
    ranks.begin_pass(0)
    seating.end(0, is_foreseen=False)
    assert not token.table.is_full  # whoever comes next behind it in the pipeline can have the row
    assert not seating.seat(1, make_request(1))
    ranks.listen(token)
    assert not seating.seat(1, make_request(1))
    assert not seating.is_clean
    ranks.end_pass(token, 0)
    assert seating.is_clean
    assert seating.seat(1, make_request(1))


def test_colocated_pipelines_share_the_requests_evenly():
    told = []
    lanes = [Lane(range(n, n + 1), RowTable(1, 2, 4, 4)) for n in (1, 2)]
    seating = Colocated(lanes, lambda rank, message: told.append((rank, message)))
    assert [seating.seat(n, make_request(n)) for n in range(5)] == [True] * 4 + [False]
    seating.tell()
    assert [(rank, [a.serial for a in m.admissions]) for rank, m in told] == [(1, [0, 2]), (2, [1, 3])]
    seating.end(1, is_foreseen=True)
    assert seating.seat(5, make_request(5))
    seating.end(2, is_foreseen=False)
    assert told[-1] == (1, Release(2))
    assert not seating.seat(6, make_request(6))
    lanes[0].released(2, 0)
    assert seating.seat(6, make_request(6))


def test_a_request_that_no_pool_can_hold_is_refused():
    lane = Lane(range(1, 2), RowTable(1, 1, 4, 2))
    with pytest.raises(CapacityError, match="needs 3 KV blocks of 4 tokens and the pool has 2"):
        lane.check(make_request(0, 8, 3))


def test_a_pipeline_has_what_each_of_its_ranks_has():
    assert join_restored([(True, {}), (True, {})]).intact
    part = join_restored([(True, {}), (False, {1: 5, 2: 3, 3: 9}), (False, {1: 4, 3: 9})])
    assert not part.intact
    assert [part.limit(serial, 7) for serial in range(1, 5)] == [4, 0, 7, 0]
    kept = join_restored([(True, {1: 5, 2: 0}), (True, {1: 6}), (True, {})])
    assert kept.intact
    assert [kept.limit(serial, 7) for serial in range(1, 4)] == [5, 0, 7]
    mixed = join_restored([(True, {1: 5, 2: 3}), (False, {1: 6, 3: 2})])
    assert [mixed.limit(serial, 7) for serial in range(1, 5)] == [5, 0, 2, 0]
    assert join_restored([(False, {})]).limit(1, 7) == 0
