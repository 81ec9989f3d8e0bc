"""Keep on disk how matrices are multiplied fastest, so that every rank of a host, and every run, does it alike.

Two ways to multiply round differently. A worker that takes another's place has to compute what that one would have.
"""

from __future__ import annotations

import hashlib
import json
import os
import tempfile
from dataclasses import asdict, dataclass
from pathlib import Path

from dejavu.assets import cache_dir

NORM_CHUNK = 256  # channels: a divisor of the input's, where the kernel normalises it
_PAD = 32  # elements between rows of the normalised input
_TURN_BYTES = 512 * 4  # of shared memory, of 16 output channels, a warp and turn


@dataclass(frozen=True, slots=True)
class Variant:
    """Name one shape of skinny.cu's kernel: a block's part, how deep it copies ahead, and blocks per part."""

    blocks_m: int
    warps_m: int
    warps_k: int
    stages: int
    splits: int = 1
    normed: bool = False  # takes its input's normalisation along

    @property
    def function(self) -> str:
        """Give the kernel's name."""
        shape = f"skinny_{self.blocks_m}_{self.warps_m}_{self.warps_k}_{self.stages}"
        return f"{shape}_normed" if self.normed else shape

    @property
    def source(self) -> str:
        """Give the line that makes the kernel, and for few rows its twin that normalises."""
        return f"VARIANT({self.function}, {self.blocks_m}, {self.warps_m}, {self.warps_k}, {self.stages})"

    @property
    def num_threads(self) -> int:
        """Count the threads of a block."""
        return 32 * self.warps_m * self.warps_k

    @property
    def queue_bytes(self) -> int:
        """Give the bytes of shared memory that hold weights copied ahead."""
        return self.warps_m * self.warps_k * self.stages * self.blocks_m * _TURN_BYTES

    def shared_bytes(self, num_rows: int, num_in: int, itemsize: int) -> int:
        """Give the bytes of shared memory of a block: the queue and, where it normalises, its input and sums."""
        if not self.normed:
            return self.queue_bytes
        return self.queue_bytes + num_rows * ((num_in + _PAD) * itemsize + 8 * num_in // NORM_CHUNK)

    @property
    def channels(self) -> int:
        """Count the matrix rows that a block takes."""
        return 16 * self.blocks_m * self.warps_m


def agree(key: tuple[object, ...], found: Variant | None) -> Variant | None:
    """Keep `found` (None: cuBLAS) as the choice for a key, unless there is one; give the one that counts."""
    path = _path(key)
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.NamedTemporaryFile("w", dir=path.parent) as draft:
        json.dump(asdict(found) if found else None, draft)
        draft.flush()
        try:
            os.link(draft.name, path)  # of several ranks, the first wins
        except FileExistsError:
            return recall(key)
    return found


def recall(key: tuple[object, ...]) -> Variant | None:
    """Give the choice that is kept for a key; KeyError where there is none."""
    try:
        kept = json.loads(_path(key).read_text())
    except FileNotFoundError:
        raise KeyError(key) from None
    return Variant(**kept) if kept else None


def _path(key: tuple[object, ...]) -> Path:
    return cache_dir() / "products" / f"{hashlib.sha256(repr(key).encode()).hexdigest()[:24]}.json"
