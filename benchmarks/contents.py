"""What transfers are checked with: fresh random bytes, targets that hold the opposite, and a count of what differs."""

from typing import TYPE_CHECKING

import numpy as np

from dejavu.device import Buffer, Device, Pieces

if TYPE_CHECKING:
    from torch import Tensor

CHUNK_BYTES = 256 << 20
PERIOD_BYTES = 4_194_319  # of long contents: no multiple of any block's size, so that no block equals another one


def random_bytes(device: Device, nbytes: int, seed: int) -> "Tensor":
    """Give uint8 [nbytes] on the device; the same for the same seed on every rank with such a device."""
    import torch

    generator = torch.Generator(device.torch_device).manual_seed(seed)
    length = min(nbytes, PERIOD_BYTES)
    words = torch.empty(-(-length // 8), dtype=torch.int64, device=device.torch_device)
    period = words.random_(generator=generator).view(torch.uint8)[:length]
    return period.repeat(-(-nbytes // length))[:nbytes]


def move_reference(target: "Tensor", source: "Tensor", pieces: Pieces) -> None:
    """Copy pieces by torch's indexing: the reference, which shares nothing with what is measured."""
    import torch

    if len(pieces) == 1:
        start, to, nbytes = int(pieces.source[0]), int(pieces.target[0]), int(pieces.nbytes[0])
        target[to : to + nbytes] = source[start : start + nbytes]
        return
    unit = int(np.gcd.reduce(np.concatenate([pieces.source, pieces.target, pieces.nbytes])))
    places, starts = (torch.from_numpy(_units(side, pieces, unit)) for side in (pieces.target, pieces.source))
    _in_units(target, unit)[places.to(target.device)] = _in_units(source, unit)[starts.to(source.device)]


def _units(offsets: "np.ndarray", pieces: Pieces, unit: int) -> "np.ndarray":
    counts = pieces.nbytes // unit
    first = np.repeat(np.cumsum(counts) - counts, counts)
    return np.repeat(offsets // unit, counts) + np.arange(len(first)) - first


def _in_units(tensor: "Tensor", unit: int) -> "Tensor":
    return tensor[: len(tensor) // unit * unit].view(-1, unit)


def count_differing(one: "Tensor", other: "Tensor") -> int:
    """Count the bytes that differ."""
    import torch

    return 0 if torch.equal(one, other) else int(torch.count_nonzero(one != other))


class Check:
    """Hold what a target must contain after a transfer: `pairs` lead from the source's memory into the target's."""

    def __init__(self, device: Device, pairs: Pieces, source_bytes: int, target_bytes: int) -> None:
        self.device = device
        self.pairs = pairs
        self.source_bytes = source_bytes
        self.target_bytes = target_bytes
        self._wanted: Tensor | None = None

    def fill(self, source: Buffer, seed: int) -> None:
        """Write fresh random bytes over the source."""
        self._copy(source, random_bytes(self.device, self.source_bytes, seed))

    def poison(self, target: Buffer, seed: int) -> None:
        """Write random bytes over the target, and where the pieces belong the opposite of what must arrive."""
        self._wanted = random_bytes(self.device, self.target_bytes, seed + 1)
        source = random_bytes(self.device, self.source_bytes, seed)
        move_reference(self._wanted, source, self.pairs)
        poison = self._wanted.clone()
        move_reference(poison, source.bitwise_not_(), self.pairs)
        self._copy(target, poison)

    def count_wrong(self, target: Buffer) -> int:
        """Count the bytes that are not what they must be, those beside the pieces included."""
        assert self._wanted is not None, "poison the target first"
        import torch

        arrived = torch.empty_like(self._wanted)
        self._copy(arrived, target)
        parts = zip(torch.split(arrived, CHUNK_BYTES), torch.split(self._wanted, CHUNK_BYTES), strict=True)
        return sum(count_differing(here, wanted) for here, wanted in parts)

    def _copy(self, target: "Buffer | Tensor", source: "Buffer | Tensor") -> None:
        """Copy behind torch's work, and wait."""
        stream = self.device.compute_stream
        self.device.copy(target, source, stream=stream)
        stream.synchronize()
