"""Read a GGUF file: its metadata as Python values, its tensors mapped.

Source: the GGUF specification (ggml `docs/gguf.md`), versions 2 and 3. The `gguf` package has a reader too, but takes
seconds for the 100,000 strings of a vocabulary; its dequantisation is used here.
"""

import math
import mmap
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dejavu.errors import ModelError

_SCALARS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
_STRING, _ARRAY = 8, 9


@dataclass(frozen=True, slots=True)
class GGUFTensor:
    """Hold one tensor as it is stored: `data` is uint8 [*shape[:-1], bytes per row], mapped from the file."""

    name: str
    shape: tuple[int, ...]  # slowest dimension first, as numpy has it
    kind: Any  # gguf.GGMLQuantizationType
    data: Any

    def dequantize(self) -> Any:
        """Give the values, float32 [*shape]; raises ModelError for a quantisation that cannot be read."""
        import gguf.quants

        try:
            return gguf.quants.dequantize(self.data, self.kind)
        except NotImplementedError as error:
            raise ModelError(
                f"tensor {self.name!r} has the quantisation {self.kind.name}, which cannot be read: "
                f"give a file with Q4, Q5, Q6 or Q8 quantisation"
            ) from error


@dataclass(frozen=True, slots=True)
class GGUFSource:
    """Hold an opened GGUF file: its metadata, and its tensors by name."""

    metadata: dict[str, Any]
    tensors: dict[str, GGUFTensor]


def open_gguf(path: Path) -> GGUFSource:
    """Open a GGUF file; raises ModelError where it is none, is cut short, or has an unknown version."""
    try:
        with path.open("rb") as file:
            mapped = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        return _parse(mapped)
    except OSError as error:
        raise ModelError(f"cannot read {path} ({error.strerror}): give the path of a GGUF file") from error
    except (struct.error, ValueError, KeyError, OverflowError, RecursionError) as error:
        raise ModelError(f"{path} is no whole GGUF file ({error}): download it again") from error


def _parse(mapped: mmap.mmap) -> GGUFSource:
    """Read the header; the exceptions that `open_gguf` translates mean a malformed file."""
    cursor = _Cursor(mapped)
    magic, version, num_tensors, num_keys = cursor.numbers("IIQQ")
    if magic != int.from_bytes(b"GGUF", "little") or version not in (2, 3):
        raise ValueError("not little-endian GGUF of version 2 or 3")
    metadata = {cursor.string(): cursor.value(cursor.number("I")) for _ in range(num_keys)}
    entries = [_tensor_entry(cursor) for _ in range(num_tensors)]
    alignment = metadata.get("general.alignment", 32)
    if not isinstance(alignment, int) or alignment < 1:
        raise ValueError(f"alignment {alignment!r}")
    start = -(-cursor.place // alignment) * alignment
    return GGUFSource(metadata, {entry[0]: _map_tensor(mapped, start, *entry) for entry in entries})


def _tensor_entry(cursor: "_Cursor") -> tuple[str, tuple[int, ...], int, int]:
    """Read one tensor's name, shape (the file has the fastest dimension first), type and place."""
    name = cursor.string()
    num_dimensions = cursor.number("I")
    if num_dimensions > 4:
        raise ValueError(f"tensor {name!r} has {num_dimensions} dimensions")
    shape = cursor.numbers("Q" * num_dimensions)[::-1]
    return name, shape, cursor.number("I"), cursor.number("Q")


def _map_tensor(mapped: mmap.mmap, start: int, name: str, shape: tuple[int, ...], kind: int, offset: int) -> GGUFTensor:
    """Map one tensor's bytes; raises ValueError where they lie beyond the file's end."""
    import gguf
    import numpy as np

    quantisation = gguf.GGMLQuantizationType(kind)
    values_per_block, bytes_per_block = gguf.GGML_QUANT_SIZES[quantisation]
    if not shape or shape[-1] % values_per_block:
        raise ValueError(f"tensor {name!r} of shape {shape} does not divide into blocks of {values_per_block}")
    stored = (*shape[:-1], shape[-1] // values_per_block * bytes_per_block)
    data = np.frombuffer(mapped, np.uint8, math.prod(stored), start + offset).reshape(stored)
    return GGUFTensor(name, shape, quantisation, data)


@dataclass(slots=True)
class _Cursor:
    """Read little-endian values one after another; struct.error or ValueError at the end of the file."""

    mapped: mmap.mmap
    place: int = 0

    def numbers(self, kinds: str) -> tuple[Any, ...]:
        """Read packed numbers of the given `struct` kinds."""
        values = struct.unpack_from(f"<{kinds}", self.mapped, self.place)
        self.place += struct.calcsize(f"<{kinds}")
        return values

    def number(self, kind: str) -> Any:
        """Read one number."""
        return self.numbers(kind)[0]

    def string(self) -> str:
        """Read a length and as many bytes of UTF-8."""
        length = self.number("Q")
        stop = self.place + length
        if stop > len(self.mapped):
            raise ValueError("a string reaches beyond the end")
        text = self.mapped[self.place : stop].decode()
        self.place = stop
        return text

    def value(self, kind: int) -> Any:
        """Read a metadata value of the specification's type `kind`; an array becomes a list."""
        if kind == _STRING:
            return self.string()
        if kind != _ARRAY:
            return self.number(_SCALARS[kind])
        element, length = self.numbers("IQ")
        if length > len(self.mapped) - self.place:
            raise ValueError("an array reaches beyond the end")
        if element in _SCALARS:
            return list(self.numbers(f"{length}{_SCALARS[element]}"))
        return [self.value(element) for _ in range(length)]
