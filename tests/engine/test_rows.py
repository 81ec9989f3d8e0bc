"""The controller's books: rows and blocks are exclusive, come back, and are given first come first served."""

from hypothesis import given
from hypothesis import strategies as st

from dejavu.engine.rows import BlockAllocator, RowTable
from dejavu.request import Request, SamplingParams


def make_request(number, prompt, output):
    return Request(str(number), tuple(range(prompt)), SamplingParams(max_tokens=output))


@given(
    num_microbatches=st.integers(1, 4),
    microbatch_size=st.integers(1, 4),
    block_size=st.integers(1, 9),
    num_blocks=st.integers(1, 40),
    actions=st.lists(st.tuples(st.integers(1, 12), st.integers(1, 12), st.randoms(use_true_random=False)), max_size=60),
)
def test_no_block_or_row_has_two_owners(num_microbatches, microbatch_size, block_size, num_blocks, actions):
    table = RowTable(num_microbatches, microbatch_size, block_size, num_blocks)
    live = []
    for number, (prompt, output, random) in enumerate(actions):
        admission = table.admit(number, make_request(number, prompt, output))
        if admission:
            live.append(admission)
            assert len(admission.blocks) * block_size >= prompt + output - 1
            assert (len(admission.blocks) - 1) * block_size < max(1, prompt + output - 1)
        elif live:
            table.release(live.pop(random.randrange(len(live))))
        owned = [block for a in live for block in a.blocks]
        assert len(set(owned)) == len(owned)
        assert set(owned) | table.blocks.free == set(range(num_blocks))
        assert len({(a.microbatch, a.row) for a in live}) == len(live)
        assert all(0 <= a.microbatch < num_microbatches and 0 <= a.row < microbatch_size for a in live)
    for admission in live:
        table.release(admission)
    assert table.blocks.free == set(range(num_blocks))


def test_waits_only_for_a_row_or_for_memory():
    table = RowTable(num_microbatches=2, microbatch_size=1, block_size=4, num_blocks=3)
    assert table.admit(0, make_request(0, 4, 5)).blocks == (0, 1)  # 8 cached tokens
    assert table.admit(1, make_request(1, 4, 5)) is None  # a row is free, two blocks are not
    assert table.admit(2, make_request(2, 2, 3)).blocks == (2,)
    assert table.admit(3, make_request(3, 1, 1)) is None


def test_fills_the_emptiest_microbatch_first():
    table = RowTable(num_microbatches=3, microbatch_size=2, block_size=8, num_blocks=6)
    seats = [table.admit(n, make_request(n, 2, 2)) for n in range(5)]
    assert [(a.microbatch, a.row) for a in seats] == [(0, 0), (1, 0), (2, 0), (0, 1), (1, 1)]
    table.release(seats[1])
    assert table.admit(9, make_request(9, 2, 2)).microbatch == 1


def test_rows_keep_their_blocks_side_by_side():
    table = RowTable(num_microbatches=2, microbatch_size=2, block_size=8, num_blocks=8)
    seats = [table.admit(n, make_request(n, 8, 8)) for n in range(4)]
    assert [a.blocks for a in sorted(seats, key=lambda a: (a.microbatch, a.row))] == [(0, 1), (2, 3), (4, 5), (6, 7)]


def test_allocator_gives_the_lowest_when_home_is_taken():
    blocks = BlockAllocator(6)
    assert blocks.take(2, home=2) == (2, 3)
    assert blocks.take(2, home=3) == (0, 1)
    blocks.give((2, 3))
    assert blocks.take(3, home=5) == (2, 3, 4)
    assert blocks.peak == 5


def test_one_token_prompt_with_one_output_still_needs_a_block():
    assert RowTable(1, 1, 16, 1).blocks_needed(make_request(0, 1, 1)) == 1
