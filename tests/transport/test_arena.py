"""The store's space, against a plain set of bytes."""

import random

import pytest

from dejavu.errors import CapacityError
from dejavu.transport.arena import ALIGNMENT, Arena


def test_ranges_never_overlap_and_all_space_comes_back():
    arena, taken, draw = Arena(64 * ALIGNMENT), {}, random.Random(3)
    for _ in range(2000):
        nbytes = draw.randint(1, 12 * ALIGNMENT)
        try:
            begin = arena.take(nbytes)
        except CapacityError:
            offset = draw.choice(list(taken))
            arena.give(offset, taken.pop(offset))
            continue
        assert begin % ALIGNMENT == 0
        assert begin + nbytes <= arena.capacity_bytes
        assert all(begin >= other + length or other >= begin + nbytes for other, length in taken.items())
        taken[begin] = nbytes
    for offset, nbytes in taken.items():
        arena.give(offset, nbytes)
    assert arena.free_bytes == arena.capacity_bytes
    assert arena.take(64 * ALIGNMENT) == 0  # one gap again


def test_what_does_not_fit_names_the_largest_gap():
    arena = Arena(10 * ALIGNMENT)
    first, second = arena.take(4 * ALIGNMENT), arena.take(4 * ALIGNMENT)
    arena.give(first, 4 * ALIGNMENT)
    assert second == 4 * ALIGNMENT
    with pytest.raises(CapacityError, match=f"largest gap is {4 * ALIGNMENT} bytes"):
        arena.take(5 * ALIGNMENT)
    assert arena.take(0) == 0  # an empty message takes no space
