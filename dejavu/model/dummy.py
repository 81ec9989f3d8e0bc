"""Make random weights that every split of a model over ranks agrees on, without making a whole tensor anywhere.

Each number is a hash of (tensor name, row, column) in the checkpoint's own coordinates, so a rank computes just the
windows that it holds.
"""

from __future__ import annotations

from collections.abc import Iterator
from math import sqrt
from zlib import crc32

import torch
from torch import Tensor

from dejavu.model.parameters import Parameter, Piece, Range

STANDARD_DEVIATION = 0.02
_CHUNK_ELEMENTS = 1 << 18  # of int32: stays in a core's cache between the passes over it
_DEVICE_CHUNK_ELEMENTS = 1 << 26  # bounds what making numbers needs beside them
# Multipliers of Chris Wellons' "lowbias32" hash, as signed 32-bit numbers.
_MULTIPLY = (0x7FEB352D, 0x846CA68B - (1 << 32))


def _mix(values: Tensor) -> Tensor:
    """Scramble int32 values in place; shifts keep the sign, which is as good a bijection for this purpose."""
    values.bitwise_xor_(values >> 16)
    values.mul_(_MULTIPLY[0])
    values.bitwise_xor_(values >> 15)
    return values.mul_(_MULTIPLY[1])


def _lane(name: str, axis: str, bounds: Range, device: torch.device) -> Tensor:
    """Hash the indices [start, stop) of one axis of a tensor."""
    seed = crc32(f"{axis}:{name}".encode()) - (1 << 31)
    return _mix(torch.arange(*bounds, dtype=torch.int32, device=device).add_(seed))


def _row_chunks(num_rows: int, num_columns: int, device: torch.device) -> Iterator[Range]:
    elements = _CHUNK_ELEMENTS if device.type == "cpu" else _DEVICE_CHUNK_ELEMENTS
    chunk = max(1, elements // num_columns)
    for start in range(0, num_rows, chunk):
        yield start, min(num_rows, start + chunk)


def fill_piece(piece: Piece, target: Tensor) -> None:
    """Write a piece's numbers into `target`, its part of a parameter, in [out, in] order; any dtype and device.

    Uniform, mean 0, standard deviation 0.02 before rounding to the dtype.
    """
    windows = piece.window if len(piece.window) == 2 else (*piece.window, (0, 1))
    if piece.transposed:
        target = target.t()
    target = target.view(-1, 1) if target.dim() == 1 else target
    rows, columns = (_lane(piece.name, axis, w, target.device) for axis, w in zip("rc", windows, strict=True))
    scale = STANDARD_DEVIATION * sqrt(3) / (1 << 31)
    for start, stop in _row_chunks(len(rows), len(columns), target.device):
        values = _mix(rows[start:stop, None] + columns)
        target[start:stop].copy_(values.to(torch.float32).mul_(scale))


def fill_parameter(parameter: Parameter, target: Tensor) -> None:
    """Write a parameter's dummy numbers into `target`: scales of normalisations are 1, all else is random."""
    if parameter.is_scale:
        target.fill_(1.0)
        return
    row = 0
    for piece in parameter.pieces:
        start, stop = piece.window[-1 if piece.transposed else 0]
        fill_piece(piece, target[row : row + stop - start])
        row += stop - start
