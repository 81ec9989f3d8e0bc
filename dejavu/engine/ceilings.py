"""What plain copies between a device and its host reach, beside which a run's own transfers are shown."""

import statistics
import time
from collections.abc import Collection, Mapping

from dejavu.device.base import Buffer, Device, Stream
from dejavu.measure.records import CeilingRecord

MOST_BYTES = 64 << 20  # of one copy
TURN_BYTES = 32 << 20  # about so many in a turn, and one copy at least
MOST_COPIES = 8
TURNS = 3


def measure_ceilings(
    device: Device, sizes: Mapping[tuple[str, str], Collection[int]], rank: int
) -> list[CeilingRecord]:
    """Time plain copies of as many bytes as the median of each kind of transfer between the device and its host has.

    `sizes` has the bytes of transfers by kind and carrier. Those that end elsewhere have no ceiling, nor is there one
    where the device has no memory left for it.
    """
    own = {kind: found for (kind, transport), found in sizes.items() if transport == "local" and found}
    medians = {kind: min(int(statistics.median(found)), MOST_BYTES) for kind, found in own.items()}
    return [
        CeilingRecord(rank, kind, "local", nbytes, copy_gbps(device, nbytes, outward=kind != "fetch"))
        for kind, nbytes in medians.items()
        if device.free_bytes() > 4 * nbytes
    ]


def copy_gbps(device: Device, nbytes: int, *, outward: bool) -> float:
    """Give the GB/s of one contiguous copy out of the device's memory, or into it: the best of a few turns."""
    copies = max(1, min(MOST_COPIES, TURN_BYTES // nbytes))
    with device.allocate(nbytes) as here, device.allocate_host(nbytes) as host, device.create_stream("ceiling") as lane:
        target, source = (host, here) if outward else (here, host)
        device.copy(target, source, stream=lane)  # touches all pages
        lane.synchronize()
        fastest_s = min(timed(device, target, source, copies, lane) for _ in range(TURNS))
    return copies * nbytes / fastest_s / 1e9


def timed(device: Device, target: Buffer, source: Buffer, copies: int, stream: Stream) -> float:
    """Give the seconds that so many copies take, one behind the other."""
    start_s = time.perf_counter()
    for _ in range(copies):
        device.copy(target, source, stream=stream)
    stream.synchronize()
    return time.perf_counter() - start_s
