"""The sums' protocol, as `kernels/all_reduce.cu` has it, on ranks whose steps come in any order: a model, no kernel.

Each call of a rank is a generator whose steps are single stores and looks; a rank begins its next call when the one
before has ended, as kernels of a stream do. Every value that is read is checked to be the one of its own epoch.
"""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

ONE, TWO = "one-shot", "two-shot"


class Rank:
    def __init__(self, size, num_slots):
        self.lines = [[(0, None)] * size for _ in range(num_slots)]  # (epoch, value) from each source
        self.flags = [[0] * size for _ in range(2)]
        self.parts, self.results = [None] * size, [None] * size
        self.epoch = 0
        self.totals = []


def part(rank, epoch):
    return (rank + 1) * 1000 + epoch


def others(ranks, me):
    return [peer for peer in range(len(ranks)) if peer != me]


def one_shot(ranks, me, epoch):
    """Store lines into the others' slot of this epoch, then take theirs."""
    mine = ranks[me]
    slot = epoch % len(mine.lines)
    for peer in others(ranks, me):
        ranks[peer].lines[slot][me] = epoch, part(me, epoch)
        yield
    total = part(me, epoch)
    for source in others(ranks, me):
        while mine.lines[slot][source][0] != epoch:
            yield "waits"
        assert mine.lines[slot][source][1] == part(source, epoch)
        total += mine.lines[slot][source][1]
        yield
    return total


def wait_flags(ranks, me, phase, epoch):
    for source in others(ranks, me):
        while ranks[me].flags[phase][source] != epoch:
            assert ranks[me].flags[phase][source] < epoch, "a flag has gone past this epoch"
            yield "waits"


def two_shot(ranks, me, epoch):
    """Store the others' parts and say so; add up the own share, store the results and say so; take the others'."""
    mine = ranks[me]
    for phase, kind in enumerate(("parts", "results")):
        for peer in others(ranks, me):
            getattr(ranks[peer], kind)[me] = epoch, part(me, epoch)
            yield
        for peer in others(ranks, me):
            ranks[peer].flags[phase][me] = epoch
            yield
        yield from wait_flags(ranks, me, phase, epoch)
        for source in others(ranks, me):
            assert getattr(mine, kind)[source] == (epoch, part(source, epoch))
            yield
    return sum(part(rank, epoch) for rank in range(len(ranks)))


def stream(ranks, me, kinds):
    """Do the calls one after the other."""
    for kind in kinds:
        epoch = ranks[me].epoch + 1
        total = yield from (one_shot if kind is ONE else two_shot)(ranks, me, epoch)
        ranks[me].totals.append(total)
        ranks[me].epoch = epoch


def play(size, kinds, choose, num_slots=2):
    """Run all ranks' streams, the next step always of the rank that `choose` names; gives the ranks."""
    ranks = [Rank(size, num_slots) for _ in range(size)]
    streams = {me: stream(ranks, me, kinds) for me in range(size)}
    idle = 0
    while streams:
        names = sorted(streams)
        me = names[choose(len(names))]
        try:
            idle = idle + 1 if next(streams[me]) == "waits" else 0
        except StopIteration:
            del streams[me]
            idle = 0
        if idle > 50 * size:  # whoever was chosen waits: let every rank look
            assert any(next(streams[name], "ended") != "waits" for name in names), "all wait for each other"
            idle = 0
    return ranks


@settings(max_examples=60, deadline=None)
@given(st.integers(2, 4), st.lists(st.sampled_from([ONE, TWO]), max_size=7), st.randoms(use_true_random=False))
def test_every_order_of_steps_gives_every_rank_every_sum(size, kinds, random):
    ranks = play(size, kinds, random.randrange)
    expected = [sum(part(rank, epoch) for rank in range(size)) for epoch in range(1, len(kinds) + 1)]
    assert all(rank.totals == expected for rank in ranks)


def greedy(count):
    """Let the first rank go as far as it can, as long as it can."""
    greedy.calls += 1
    return 0 if greedy.calls % 40 else count - 1


def test_one_slot_is_not_enough_for_lines():
    """The model sees what goes wrong: a fast rank overwrites what a slow one has not read, which then waits for it."""
    greedy.calls = 0
    with pytest.raises(AssertionError, match="wait for each other"):
        play(3, [ONE] * 4, greedy, num_slots=1)
    greedy.calls = 0
    assert play(3, [ONE] * 4, greedy)[0].epoch == 4
