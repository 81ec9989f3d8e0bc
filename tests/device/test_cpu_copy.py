"""Equal pieces at regular places, which the CPU copies by one call."""

import numpy as np
import pytest

from dejavu.device import cpu_copy, make_pieces
from dejavu.device.cpu_copy import find_grid


def places(shape, strides):
    """Give the offsets of a grid, in C order."""
    axes = np.meshgrid(
        *(np.arange(count) * stride for count, stride in zip(shape, strides, strict=True)), indexing="ij"
    )
    return sum(axes).ravel()


@pytest.mark.parametrize(
    ("shape", "source", "target"),
    [
        ((5,), (100,), (7,)),
        ((3, 4, 2), (5000, 900, 70), (56, 14, 7)),
        ((2, 3), (1000, -40), (21, 7)),  # rows whose blocks come backwards
        ((4, 100), (0, 50), (700, 7)),  # one row to several places
        ((2, 2, 2, 2, 2, 2), (9000, 4100, 1900, 800, 300, 90), (224, 112, 56, 28, 14, 7)),
    ],
)
def test_a_grid_is_found_and_copied(shape, source, target):
    memory = np.random.default_rng(1).integers(0, 256, 30_000, dtype=np.uint8)
    start, to = 500 + places(shape, source), places(shape, target)
    grid = find_grid(make_pieces(start, to, 7))
    assert grid is not None
    assert (np.prod(grid.shape), grid.nbytes) == (len(start), 7)
    arrived = np.zeros(to.max() + 7, dtype=np.uint8)
    cpu_copy.copy_pieces(make_pieces(start + memory.ctypes.data, to + arrived.ctypes.data, 7))
    assert all((arrived[b : b + 7] == memory[a : a + 7]).all() for a, b in zip(start, to, strict=True))
    assert np.count_nonzero(arrived) <= 7 * len(start)


@pytest.mark.parametrize(
    ("source", "target", "nbytes"),
    [
        ([0], [0], 8),
        ([0, 20, 40], [0, 8, 16], [8, 8, 7]),
        ([0, 20, 50], [0, 8, 16], 8),
        ([0, 20, 40, 60], [0, 8, 32, 40], [8, 8, 8, 9]),
        ([0, 20, 100, 120, 200, 230], [0, 8, 16, 24, 32, 40], 8),
        ([*range(0, 4000, 20), 4001], range(0, 1608, 8), 8),
        ([], [], 8),
    ],
)
def test_what_is_no_grid_is_not_taken_for_one(source, target, nbytes):
    assert find_grid(make_pieces(source, target, nbytes)) is None


def test_too_many_axes_are_no_grid():
    strides = [3**i * 10 for i in range(7)]
    assert find_grid(make_pieces(places([2] * 7, strides[::-1]), np.arange(128) * 8, 8)) is None
