"""How sums are cut: regions apart, every vector in one share, and a way for every size."""

import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dejavu.assets import data_path
from dejavu.transport.carrier import UnavailableError
from dejavu.transport.reduction import Place, choose_plan
from dejavu.transport.sum_plan import FLAGS_BYTES, MAX_BLOCKS, MAX_RANKS, SumPlan, Way

plans = st.builds(
    SumPlan,
    size=st.integers(2, 8),
    one_shot_bytes=st.integers(0, 1 << 20),
    two_shot_bytes=st.integers(16, 8 << 20).map(lambda nbytes: nbytes // 16 * 16),
    threads=st.sampled_from([64, 128, 512, 1024]),
    one_shot_blocks=st.integers(1, MAX_BLOCKS),
    two_shot_blocks=st.integers(1, MAX_BLOCKS),
)


@given(plans)
def test_regions_lie_apart_in_the_memory(plan):
    ends = [
        (0, FLAGS_BYTES),
        *((plan.lines_offset + slot * plan.slot_stride, plan.slot_stride) for slot in (0, 1)),
        (plan.parts_offset, plan.size * plan.share_stride),
        (plan.results_offset, plan.size * plan.share_stride),
    ]
    for (begin, nbytes), (following, _) in zip(ends, [*ends[1:], (plan.nbytes, 0)], strict=True):
        assert begin + nbytes == following or nbytes == 0
        assert begin % 16 == 0


@given(plans, st.data())
def test_two_shots_add_up_every_vector_once_and_fit_their_memory(plan, data):
    vectors = data.draw(st.integers(1, plan.two_shot_bytes // 16))
    grid = plan.two_shot_grid(vectors * 16)
    assert 1 <= grid.blocks <= plan.two_shot_blocks
    covered = 0
    for number in range(grid.blocks * plan.size):  # block number // size, rank number % size: as in the kernel
        begin, end = min(number * grid.share, vectors), min((number + 1) * grid.share, vectors)
        assert begin in (covered, end)
        covered = max(covered, end)
        if begin < end:
            assert ((number // plan.size) * grid.share + end - begin) * 16 <= plan.share_stride
    assert covered == vectors


@given(plans, st.integers(2, 1 << 17))
def test_one_shot_has_a_thread_for_each_line_until_there_are_too_many(plan, lines):
    grid = plan.one_shot_grid(8 * lines)
    assert 1 <= grid.blocks <= plan.one_shot_blocks
    assert grid.blocks * grid.threads >= lines or grid.blocks == plan.one_shot_blocks


def test_small_messages_go_in_one_shot_and_larger_ones_in_two_or_all_by_nccl():
    plan = SumPlan(2, 1000, 2000)
    assert [plan.way(n) for n in (1, 1000)] == [Way.ONE_SHOT] * 2
    assert [plan.way(n) for n in (1001, 2001, 1 << 30)] == [Way.TWO_SHOT] * 3
    assert SumPlan(2, 0, 0).way(1) is Way.NCCL


def places(*pairs, without=None):
    return [Place(host, gpu, without) for host, gpu in pairs]


def test_the_plan_follows_where_the_ranks_are():
    apart = choose_plan(places(("a", "0"), ("a", "1")))
    assert apart.way(16) is Way.ONE_SHOT
    between = choose_plan(places(("a", "0"), ("b", "0")))
    assert between.way(16) is Way.NCCL
    shared = choose_plan(places(("a", "0"), ("a", "0")))
    assert shared.one_shot_bytes > apart.one_shot_bytes  # a second wait would cost a second time slice
    assert shared.way(1 << 30) is Way.TWO_SHOT
    without = choose_plan(places(("a", "0"), ("a", "1"), without="it is not installed"))
    assert without.way(1 << 30) is Way.TWO_SHOT


def test_the_kernels_have_the_same_limits():
    source = data_path("kernels", "all_reduce.cu").read_text()
    found = {name: int(value) for name, value in re.findall(r"\b([A-Z_]+) = (\d+)", source)}
    assert (found["MAX_RANKS"], found["MAX_BLOCKS"]) == (MAX_RANKS, MAX_BLOCKS)
    assert 4 * (found["FLAGS_WORD"] + 2 * MAX_BLOCKS * MAX_RANKS) == FLAGS_BYTES


def test_groups_that_cannot_sum_say_why():
    with pytest.raises(UnavailableError, match="sums by NCCL: it is not installed"):
        choose_plan(places(("a", "0"), ("b", "0"), without="it is not installed"))
    with pytest.raises(UnavailableError, match="share a GPU"):
        choose_plan(places(("a", "0"), ("a", "0"), ("b", "0")))
    with pytest.raises(UnavailableError, match="at most 8 ranks"):
        choose_plan(places(*(("a", str(gpu)) for gpu in range(9))))
