"""The controller's books for both arrangements, driven through random orders of what ranks report."""

from random import Random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dejavu.engine.messages import Admissions, Expect, Release
from dejavu.engine.rows import RowTable
from dejavu.engine.seating import Colocated, Disaggregated, Lane
from dejavu.errors import CapacityError
from dejavu.request import Request, SamplingParams

PROMPT_RANKS, TOKEN_RANKS = range(1, 3), range(3, 6)


def make_request(serial, prompt=4, output=5):
    return Request(str(serial), tuple(range(prompt)), SamplingParams(max_tokens=output))


class Ranks:
    """Stand in for both pipelines: note who was told what, and what each rank still has to do."""

    def __init__(self):
        self.moves = []  # (rank, serial) still to be reported
        self.prompting = []  # serials whose first token is still to come
        self.generating = {}  # serial -> admission in the token pipeline
        self.expected = {}  # serial -> blocks
        self.order = []

    def send(self, rank, message):
        match message:
            case Expect(serial, _, blocks):
                assert rank in TOKEN_RANKS
                self.expected[serial] = blocks
                self.moves.append((rank, serial))
            case Admissions(admissions) if rank == PROMPT_RANKS[0]:
                for admission in admissions:
                    self.prompting.append(admission.serial)
                    if admission.handover:
                        assert self.expected[admission.serial] == admission.handover  # the receives come first
                        self.moves += [(r, admission.serial) for r in PROMPT_RANKS]
            case Admissions(admissions):
                assert rank == TOKEN_RANKS[0]
                for admission in admissions:
                    assert not any(serial == admission.serial for _, serial in self.moves), "not all KV is there"
                    assert admission.blocks == self.expected[admission.serial]
                    assert admission.first_token is not None
                    self.generating[admission.serial] = admission
                    self.order.append(admission.serial)
            case Release(serial):
                assert serial in self.generating or rank == TOKEN_RANKS[0]
                self.generating.pop(serial, None)


def owned(seating):
    prompt, token = (lane.table for lane in seating.lanes)
    prompt_blocks = [b for a in prompt.occupants.values() for b in a.blocks]
    token_blocks = [b for h in seating.handovers.values() for b in h.blocks]
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
    serial, running = 0, set()
    for _ in range(3000):
        action = random.choice(["seat", "first", "move", "end", "cancel", "tell"])
        if action == "seat" and waiting and seating.seat(serial, waiting[0]):
            waiting.pop(0)
            running.add(serial)
            serial += 1
        elif action == "first" and ranks.prompting:
            first = ranks.prompting.pop(random.randrange(len(ranks.prompting)))
            seating.first_token(first, 7)
            if shapes[first][1] == 1 and first in running:
                running.discard(first)
                seating.end(first)
        elif action == "move" and ranks.moves:
            seating.moved(*ranks.moves.pop(random.randrange(len(ranks.moves))))
        elif action == "end" and ranks.generating:
            ended = random.choice(sorted(ranks.generating))
            running.discard(ended)
            seating.end(ended)
        elif action == "cancel" and running and random.random() < 0.05:
            ended = random.choice(sorted(running))
            running.discard(ended)
            seating.end(ended)
        elif action == "tell":
            seating.tell()
        owned(seating)
        if not waiting and not running and seating.is_clean:
            break
    assert not waiting
    assert seating.is_clean
    assert all(len(lane.table.blocks.free) == lane.table.num_blocks for lane in seating.lanes)


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
        assert list(ranks.generating) == [ended]
        seating.end(ended)
    assert seating.is_clean


def test_colocated_pipelines_share_the_requests_evenly():
    told = []
    lanes = [Lane(range(n, n + 1), RowTable(1, 2, 4, 4)) for n in (1, 2)]
    seating = Colocated(lanes, lambda rank, message: told.append((rank, message)))
    assert [seating.seat(n, make_request(n)) for n in range(5)] == [True] * 4 + [False]
    seating.tell()
    assert [(rank, [a.serial for a in m.admissions]) for rank, m in told] == [(1, [0, 2]), (2, [1, 3])]
    seating.end(1)
    assert told[-1] == (2, Release(1))
    assert seating.seat(5, make_request(5))


def test_a_request_that_no_pool_can_hold_is_refused():
    lane = Lane(range(1, 2), RowTable(1, 1, 4, 2))
    with pytest.raises(CapacityError, match="needs 3 KV blocks of 4 tokens and the pool has 2"):
        lane.check(make_request(0, 8, 3))
