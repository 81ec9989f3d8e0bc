"""Copies on the CPU by address, as far as possible without holding the interpreter's lock."""

import ctypes
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from dejavu.device.pieces import Pieces

# Many equal short pieces go through numpy's indexing, one call for a chunk of them: 10 times faster than one memmove
# each at 256 bytes, equal at 12 KiB. A chunk's temporary stays in the cache.
_INDEXED_BYTES = 12 * 1024
_INDEXED_PIECES = 128
_CHUNK_BYTES = 256 * 1024
_GRID_DIMENSIONS = 6
_LOOK = 64  # pieces at which a list that is no grid mostly shows it
# Below this, giving the interpreter's lock up and getting it back costs more than the copy.
_SHORT_BYTES = 64 * 1024

_copy_holding_lock = ctypes.PyDLL(None).memmove
_copy_holding_lock.argtypes = (ctypes.c_void_p, ctypes.c_void_p, ctypes.c_size_t)
_copy_holding_lock.restype = None


class _Range:
    """Show numpy a range of memory as an array."""

    __slots__ = ("__array_interface__",)

    def __init__(self, address: int, shape: tuple[int, ...], strides: tuple[int, ...] | None, typestr: str) -> None:
        self.__array_interface__ = {
            "shape": shape,
            "strides": strides,
            "typestr": typestr,
            "data": (address, False),
            "version": 3,
        }


def array_at(
    address: int, shape: tuple[int, ...], strides: tuple[int, ...] | None = None, typestr: str = "|u1"
) -> NDArray[np.uint8]:
    """Give an array over memory that the caller keeps mapped."""
    return np.asarray(_Range(address, shape, strides, typestr))


def copy_bytes(target: int, source: int, nbytes: int) -> None:
    """Copy one contiguous range; the two do not overlap."""
    if nbytes < _SHORT_BYTES:
        _copy_holding_lock(target, source, nbytes)
    else:
        ctypes.memmove(target, source, nbytes)


def copy_rows(target: int, source: int, width: int, height: int, target_pitch: int, source_pitch: int) -> None:
    """Copy `height` runs of `width` bytes whose starts are a pitch apart."""
    shape = (height, width)
    array_at(target, shape, (target_pitch, 1))[...] = array_at(source, shape, (source_pitch, 1))


def fill_bytes(target: int, value: int, nbytes: int) -> None:
    """Set every byte of a range."""
    ctypes.memset(target, value, nbytes)


def copy_pieces(pieces: Pieces) -> None:
    """Copy pieces given by address."""
    if len(pieces) and int(pieces.nbytes.min()) >= _SHORT_BYTES:
        _copy_each(pieces.target, pieces.source, pieces.nbytes)
        return
    if (grid := find_grid(pieces)) is not None:
        _copy_grid(pieces, grid)
        return
    sizes, counts = np.unique(pieces.nbytes, return_counts=True)
    indexed = (sizes > 0) & (sizes <= _INDEXED_BYTES) & (counts >= _INDEXED_PIECES)
    for size in sizes[indexed].tolist():
        chosen = slice(None) if len(sizes) == 1 else np.flatnonzero(pieces.nbytes == size)
        _copy_equal(pieces.target[chosen], pieces.source[chosen], size)
    if not indexed.all():
        rest = ~np.isin(pieces.nbytes, sizes[indexed])
        _copy_each(pieces.target[rest], pieces.source[rest], pieces.nbytes[rest])


@dataclass(frozen=True, slots=True)
class Grid:
    """Hold equal pieces as a grid: `shape` of them, whose neighbours along each axis are a stride apart, in bytes."""

    shape: tuple[int, ...]
    source_strides: tuple[int, ...]
    target_strides: tuple[int, ...]
    nbytes: int


def find_grid(pieces: Pieces) -> Grid | None:
    """Find the grid that equal pieces form in both memories, in their order; None where they do not.

    What rows have in common blocks, or in blocks at regular places, is one: layers x rows x k/v x bytes. The whole of
    it is one call, without the interpreter's lock: two to four times faster than piece by piece.
    """
    size = pieces.uniform_bytes
    if not size or len(pieces) < 2:
        return None
    source, target = pieces.source, pieces.target
    axes: list[tuple[int, int, int]] = []
    while len(source) > 1:
        axis = _find_axis(source[:_LOOK], target[:_LOOK])
        if axis[0] >= _LOOK:
            axis = _find_axis(source, target)
        if len(axes) == _GRID_DIMENSIONS or not (
            _is_axis(source, axis[0], axis[1]) and _is_axis(target, axis[0], axis[2])
        ):
            return None
        axes.insert(0, axis)
        source, target = source[:: axis[0]], target[:: axis[0]]
    shape, source_strides, target_strides = zip(*axes, strict=True)
    return Grid(shape, source_strides, target_strides, size)


def _find_axis(source: NDArray[np.int64], target: NDArray[np.int64]) -> tuple[int, int, int]:
    """Give how many of the first pieces have the same distances, and these."""
    source_step, target_step = int(source[1] - source[0]), int(target[1] - target[0])
    others = np.flatnonzero((np.diff(source) != source_step) | (np.diff(target) != target_step))
    return (int(others[0]) + 1 if len(others) else len(source)), source_step, target_step


def _is_axis(places: NDArray[np.int64], count: int, step: int) -> bool:
    """Tell whether all pieces lie in rows of `count`, a step apart."""
    if len(places) % count:
        return False
    rows = places.reshape(-1, count)
    return all(bool((np.diff(part, axis=1) == step).all()) for part in (rows[:_LOOK], rows[_LOOK:]))


def _copy_grid(pieces: Pieces, grid: Grid) -> None:
    shape = (*grid.shape, grid.nbytes)
    source = array_at(int(pieces.source[0]), shape, (*grid.source_strides, 1))
    array_at(int(pieces.target[0]), shape, (*grid.target_strides, 1))[...] = source


def _copy_each(target: NDArray[np.int64], source: NDArray[np.int64], nbytes: NDArray[np.int64]) -> None:
    for one_target, one_source, one_size in zip(target.tolist(), source.tolist(), nbytes.tolist(), strict=True):
        copy_bytes(one_target, one_source, one_size)


def _copy_equal(target: NDArray[np.int64], source: NDArray[np.int64], size: int) -> None:
    targets, sources = _elements(target, size), _elements(source, size)
    target, source = target - target.min(), source - source.min()
    step = max(1, _CHUNK_BYTES // size)
    for first in range(0, len(target), step):
        chunk = slice(first, first + step)
        targets[target[chunk]] = sources[source[chunk]]


def _elements(addresses: NDArray[np.int64], size: int) -> NDArray[np.uint8]:
    # Element i is the `size` bytes that start i bytes after the lowest address: elements overlap, at any alignment.
    lowest = int(addresses.min())
    return array_at(lowest, (int(addresses.max()) - lowest + 1,), (1,), f"|V{size}")
