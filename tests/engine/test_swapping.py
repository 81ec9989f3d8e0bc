"""Swap microbatches under passes in any order: what a pass reads is what passes wrote, and only that moves."""

from __future__ import annotations

import hypothesis.strategies as st
import pytest
from hypothesis import settings
from hypothesis.stateful import RuleBasedStateMachine, initialize, precondition, rule

from dejavu.device import num_cuda_devices
from tests.engine.swap_machine import Shape, SwappingRank, pause, run_at_random

SHAPES = st.builds(
    Shape,
    num_microbatches=st.integers(1, 5),
    microbatch_size=st.integers(1, 3),
    resident=st.integers(1, 3),
    block_size=st.sampled_from((1, 3, 4, 12)),
    blocks_per_row=st.integers(1, 3),
)


class Swapping(RuleBasedStateMachine):
    """Admit, end and cancel requests, and take passes, in any order."""

    @initialize(shape=SHAPES, is_queued=st.booleans())
    def start(self, shape, is_queued):
        self.rank = SwappingRank(shape, is_queued)

    def places(self):
        shape = self.rank.shape
        return [(m, r) for m in range(shape.num_microbatches) for r in range(shape.microbatch_size)]

    @precondition(lambda self: len(self.rank.rows) < len(self.places()))
    @rule(data=st.data(), handed_over=st.booleans())
    def admit(self, data, handed_over):
        place = data.draw(st.sampled_from([p for p in self.places() if p not in self.rank.rows]))
        most = self.rank.shape.row_len
        prompt = data.draw(st.integers(1, most))
        output = data.draw(st.integers(2 if handed_over else 1, most - prompt + 2))
        if prompt + output - 1 <= most:
            self.rank.admit(*place, prompt, output, handed_over=handed_over)

    @precondition(lambda self: self.rank.rows)
    @rule(data=st.data())
    def cancel(self, data):
        place = data.draw(st.sampled_from(sorted(self.rank.rows)))
        self.rank.free(place)

    @precondition(lambda self: self.rank.rows)
    @rule(data=st.data(), chunk=st.integers(0, 3))
    def take_pass(self, data, chunk):
        """Prompts, whole or cut, or the steps of all rows; sometimes of some rows only."""
        microbatch = data.draw(st.sampled_from(sorted({m for m, _ in self.rank.rows})))
        rows = {r: row for (m, r), row in self.rank.rows.items() if m == microbatch}
        prompts = {r: row.prompt_left for r, row in rows.items() if row.prompt_left}
        steps = {r: 1 for r in rows if r not in prompts}
        new = {r: min(left, chunk or left) for r, left in prompts.items()} | steps
        if not chunk:
            new = {r: rows[r].prompt_left for r in prompts} or steps
        left_out = data.draw(st.sets(st.sampled_from(sorted(new)))) if data.draw(st.integers(0, 3)) == 0 else set()
        chosen = {r: count for r, count in new.items() if r not in left_out} or new
        self.rank.run(microbatch, chosen)

    @precondition(lambda self: self.rank.rows)
    @rule(turns=st.integers(1, 3))
    def take_turns(self, turns):
        """Round robin, as the scheduler does."""
        for _ in range(turns):
            for microbatch in range(self.rank.shape.num_microbatches):
                rows = {r: row for (m, r), row in self.rank.rows.items() if m == microbatch}
                prompts = {r: row.prompt_left for r, row in rows.items() if row.prompt_left}
                if new := prompts or dict.fromkeys(rows, 1):
                    self.rank.run(microbatch, new)

    @rule()
    def die(self):
        """Look at what a successor would find, while flushes are on their way."""
        self.rank.check_successor()

    def teardown(self):
        if hasattr(self, "rank"):
            try:
                self.rank.check()
                assert self.rank.moved_bytes("flush") == self.rank.new_tokens * self.rank.layout.bytes_per_token
            finally:
                self.rank.close()


def test_row_that_is_seated_waits_for_the_last_pass_of_its_place():
    """A pass of a cancelled request is still under way when the next request's KV is fetched to where it writes."""
    rank = SwappingRank(Shape(3, 1, 2, 4, 4), is_queued=True, late_ms=0.0, compute_ms=0.0)
    rank.admit(0, 0, 5, 6, handed_over=False)
    rank.admit(1, 0, 5, 6, handed_over=False)
    rank.run(0, {0: 5})
    rank.mover.settle()
    pause(rank.stream, 0.05)
    rank.run(0, {0: 1})
    rank.free((0, 0))
    rank.admit(0, 0, 12, 3, handed_over=True)
    rank.run(1, {0: 5})  # carries the news of the seat
    rank.run(0, {0: 1})
    rank.check()
    rank.close()


def test_row_that_was_fetched_in_vain_does_not_land_in_the_next_one():
    """A cancelled request's row is on its way to the device when the next one's prompt is computed in its place."""
    rank = SwappingRank(Shape(3, 1, 2, 4, 4), is_queued=False, late_ms=0.0)
    for microbatch in range(3):
        rank.admit(microbatch, 0, 12, 3, handed_over=False)
        rank.run(microbatch, {0: 12})
    rank.run(0, {0: 1})
    rank.link.most_ms = 100.0
    rank.run(1, {0: 1})  # foresees microbatch 0
    rank.free((0, 0))
    rank.admit(0, 0, 8, 3, handed_over=False)
    rank.run(0, {0: 8})
    rank.run(0, {0: 1})
    rank.check()
    rank.close()


def test_prompt_does_not_wait_for_other_rows():
    """Other rows of its microbatch are on their way to the device: the next step needs them, the prompt does not."""
    rank = SwappingRank(Shape(3, 2, 2, 4, 4), is_queued=False, late_ms=0.0)
    for microbatch in range(3):
        rank.admit(microbatch, 0, 12, 5, handed_over=False)
        rank.run(microbatch, {0: 12})
    rank.run(0, {0: 1})
    rank.run(1, {0: 1})
    rank.mover.settle()
    rank.admit(0, 1, 8, 3, handed_over=False)
    rank.mover.books.rows[0][0].present = 6  # as if a part of it were still missing
    pause(rank.mover.lanes.fetch_stream, 0.2)
    rank.run(2, {0: 1})
    rank.run(0, {1: 8})
    rank.run(0, {0: 1, 1: 1})
    rank.check()
    assert rank.mover.stalls_ms.get((0, 2), 0.0) < 50 < rank.mover.stalls_ms[0, 3]
    rank.close()


def test_stall_is_what_compute_waits_for():
    """With one resident microbatch nothing can be fetched ahead: a step waits for all of its fetch."""
    rank = SwappingRank(Shape(2, 1, 1, 8, 1), is_queued=False, late_ms=0.0)
    for microbatch in (0, 1):
        rank.admit(microbatch, 0, 4, 4, handed_over=False)
        rank.run(microbatch, {0: 4})
    rank.mover.settle()
    pause(rank.mover.lanes.fetch_stream, 0.1)
    rank.run(1, {0: 1})  # not foreseen: microbatch 0 is in by now
    rank.mover.settle()
    rank.run(0, {0: 1})
    rank.check()
    assert 50 < rank.mover.stalls_ms[1, 1] < 2000
    assert rank.mover.stalls_ms[0, 1] < 50
    rank.close()


def test_what_is_resident_is_not_fetched():
    rank = SwappingRank(Shape(2, 2, 2, 4, 2), is_queued=False)
    for microbatch in (0, 1):
        for row in (0, 1):
            rank.admit(microbatch, row, 3, 5, handed_over=False)
        rank.run(microbatch, {0: 3, 1: 3})
    for _ in range(4):
        for microbatch in (0, 1):
            rank.run(microbatch, {0: 1, 1: 1})
    rank.check()
    assert rank.moved_bytes("fetch") == 0
    assert rank.moved_bytes("flush") == 4 * (3 + 4) * rank.layout.bytes_per_token
    rank.close()


@pytest.mark.parametrize("kind", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
@pytest.mark.parametrize(
    "shape", [Shape(4, 3, 2, 4, 3), Shape(3, 2, 1, 12, 1), Shape(5, 1, 3, 3, 2), Shape(2, 2, 2, 1, 9)], ids=str
)
def test_any_schedule(kind, shape):
    if kind == "cuda" and num_cuda_devices() == 0:
        pytest.skip("no CUDA device, or no cuda-python")
    rank = SwappingRank(shape, is_queued=True, kind=kind, late_ms=0.3, compute_ms=0.3)
    run_at_random(rank, seed=3, turns=12 if kind == "cpu" else 150)
    rank.check()
    assert rank.moved_bytes("flush") == rank.new_tokens * rank.layout.bytes_per_token
    rank.close()


TestSwapping = Swapping.TestCase
TestSwapping.settings = settings(max_examples=40, stateful_step_count=25, deadline=None)
