"""Lists of pieces: splitting keeps every byte, and what leaves its memory is found."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from dejavu.device import make_pieces, pieces_from
from dejavu.errors import TransferError

triples = st.lists(st.tuples(st.integers(0, 1000), st.integers(0, 1000), st.integers(0, 300)), max_size=20)


def byte_pairs(pieces):
    """List every (source byte, target byte) that a list moves, in order."""
    rows = zip(pieces.source.tolist(), pieces.target.tolist(), pieces.nbytes.tolist(), strict=True)
    return [(source + i, target + i) for source, target, nbytes in rows for i in range(nbytes)]


@given(triples, st.integers(1, 400))
def test_split_moves_the_same_bytes_in_shorter_pieces(rows, limit):
    pieces = pieces_from(rows)
    parts = pieces.split(limit)
    assert byte_pairs(parts) == byte_pairs(pieces)
    assert (parts.nbytes <= limit).all()
    assert parts.total_bytes == sum(row[2] for row in rows)
    if len(parts) != len(pieces):
        assert (parts.nbytes > 0).all()


@given(triples, st.integers(0, 1300), st.integers(0, 1300))
def test_check_accepts_exactly_what_lies_inside(rows, source_bytes, target_bytes):
    inside = all(s + n <= source_bytes and t + n <= target_bytes for s, t, n in rows)
    pieces = pieces_from(rows)
    if inside:
        pieces.check(source_bytes, target_bytes)
    else:
        with pytest.raises(TransferError, match="piece"):
            pieces.check(source_bytes, target_bytes)


def test_check_is_not_fooled_by_sums_that_overflow():
    for triple in ((2**63 - 10, 0, 100), (0, 2**63 - 10, 100), (0, 0, 2**63 - 1)):
        with pytest.raises(TransferError):
            pieces_from([triple]).check(1000, 1000)


def test_inverse_and_shift():
    pieces = make_pieces([1, 2], [30, 40], 5)
    assert byte_pairs(pieces.inverse) == [(t, s) for s, t in byte_pairs(pieces)]
    assert byte_pairs(pieces.shifted(100, 200)) == [(s + 100, t + 200) for s, t in byte_pairs(pieces)]


def test_one_length_for_all():
    assert make_pieces([0, 9], [0, 9], 4).uniform_bytes == 4
    assert make_pieces([0, 9], [0, 9], [4, 5]).uniform_bytes is None
    assert make_pieces([], [], []).uniform_bytes is None
    assert make_pieces(np.arange(3), np.arange(3), 1).nbytes.tolist() == [1, 1, 1]
