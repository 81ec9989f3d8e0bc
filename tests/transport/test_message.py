"""Cutting and joining of messages, against bytes that are moved one by one."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dejavu.device import make_pieces, pieces_from
from dejavu.errors import TransferError
from dejavu.transport.carrier import check_message
from dejavu.transport.message import coalesce, cut_message, in_order, join
from tests.transport.region import rows, scattered


def places(pieces):
    """Give, for every byte of the message, where it lies in memory."""
    table = np.full(pieces.total_bytes, -1)
    for source, target, nbytes in rows(pieces):
        assert (table[target : target + nbytes] == -1).all()
        table[target : target + nbytes] = np.arange(source, source + nbytes)
    return table


messages = st.builds(scattered, st.integers(2, 300), st.integers(1, 60), st.integers(0, 2**32)).map(
    lambda both: both[0]
)


@settings(max_examples=60, deadline=None)
@given(messages, st.integers(1, 320))
def test_chunks_tile_the_message_in_order(pieces, limit):
    chunks = cut_message(pieces, limit)
    assert [chunk.offset for chunk in chunks] == list(range(0, pieces.total_bytes, limit))
    assert all(chunk.nbytes == chunk.pieces.total_bytes <= limit for chunk in chunks)
    assert np.array_equal(np.concatenate([places(chunk.pieces) for chunk in chunks]), places(pieces))


@settings(max_examples=60, deadline=None)
@given(st.integers(2, 300), st.tuples(*4 * [st.integers(1, 60)]))
def test_a_join_leads_every_byte_from_memory_to_memory(nbytes, numbers):
    sender, receiver = scattered(nbytes, *numbers[:2])[0], scattered(nbytes, *numbers[2:])[0]
    joined = join(sender, receiver)
    into = dict(zip(places(sender).tolist(), places(receiver).tolist(), strict=True))
    moved = {s + i: t + i for s, t, n in rows(joined) for i in range(n)}
    assert moved == into
    assert joined.total_bytes == nbytes


def test_a_join_of_touching_pieces_is_one_copy():
    sender = make_pieces([100, 110, 120], [0, 10, 20], 10)
    receiver = make_pieces([7, 12], [0, 5], [5, 25])
    assert list(rows(join(sender, receiver))) == [(100, 7, 30)]


def test_coalescing_keeps_what_touches_on_one_side_only():
    pieces = pieces_from([(0, 0, 4), (4, 8, 4), (8, 12, 4), (20, 16, 4)])
    assert list(rows(coalesce(pieces))) == [(0, 0, 4), (4, 8, 8), (20, 16, 4)]


def test_empty_pieces_and_messages():
    pieces = pieces_from([(5, 4, 3), (9, 4, 0), (1, 0, 4)])
    assert list(rows(in_order(pieces))) == [(1, 0, 4), (5, 4, 3)]
    empty = make_pieces([], [], [])
    assert cut_message(empty, 10) == []
    assert len(join(empty, empty)) == 0


class FakeMemory:
    nbytes = 100


@pytest.mark.parametrize(
    "triples",
    [[(60, 0, 60)], [(-1, 0, 5)], [(0, 0, 20), (20, 10, 20)], [(0, 0, 20), (20, 25, 20)], [(0, 5, 20)]],
    ids=["outside", "negative", "overlap", "gap", "late start"],
)
def test_a_message_is_checked(triples):
    with pytest.raises(TransferError):
        check_message(FakeMemory(), pieces_from(triples))
