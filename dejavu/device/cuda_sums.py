"""Launch the kernels that sum over a tensor group: `kernels/all_reduce.cu`."""

import ctypes
from collections.abc import Sequence
from typing import Any

from cuda.bindings import driver

from dejavu.device.base import Buffer, Device
from dejavu.device.cuda import CudaDevice
from dejavu.device.cuda_driver import call
from dejavu.device.cuda_kernels import load_kernel

MAX_RANKS = 8
DTYPES = ("float32", "float16", "bfloat16")
STOP_BYTES = 8  # pinned: stop, late


class Group(ctypes.Structure):
    """Be the kernels' first argument, in the order of `struct Group`."""

    _fields_ = (
        ("memory", ctypes.c_uint64 * MAX_RANKS),
        ("host", ctypes.c_uint64),
        *((name, ctypes.c_uint64) for name in ("lines", "line_stride", "slot_stride")),
        *((name, ctypes.c_uint64) for name in ("parts", "results", "share_stride")),
        ("deadline_ns", ctypes.c_uint64),
        ("rank", ctypes.c_uint32),
        ("size", ctypes.c_uint32),
    )


class SumKernels:
    """Hold the kernels of a device and the memories of one group; called from one thread at a time."""

    def __init__(self, device: Device, rank: int, memories: Sequence[Buffer], **offsets: int) -> None:
        """Take every rank's memory as mapped here, in the order of ranks, and the offsets of `SumPlan`."""
        assert isinstance(device, CudaDevice)
        assert len(memories) <= MAX_RANKS
        device.activate()
        architecture = device.properties.architecture
        self._device = device
        self._functions = {
            (shots, dtype): load_kernel("all_reduce", f"{shots}_{dtype}", architecture)
            for shots in ("one_shot", "two_shot")
            for dtype in DTYPES
        }
        self._stop = device.allocate_host(STOP_BYTES)
        self._words = (ctypes.c_uint32 * 2).from_address(self._stop.address)
        self._words[:] = [0, 0]
        addresses = (ctypes.c_uint64 * MAX_RANKS)(*(memory.address for memory in memories))
        self._group = Group(addresses, self._stop.address, rank=rank, size=len(memories), **offsets)
        self._data = ctypes.c_uint64()
        self._count, self._share = ctypes.c_uint32(), ctypes.c_uint32()
        places = (self._group, self._data, self._count, self._share)
        self._pointers = (ctypes.c_void_p * 4)(*(ctypes.addressof(place) for place in places))

    def one_shot(self, dtype: str, address: int, nbytes: int, grid: tuple[int, int], stream: int) -> None:
        """Queue the one-shot sum of `nbytes` bytes, a multiple of 8, at an address aligned to 8."""
        self._launch(self._functions["one_shot", dtype], address, nbytes // 8, 0, grid, stream)

    def two_shot(self, dtype: str, address: int, nbytes: int, share: int, grid: tuple[int, int], stream: int) -> None:
        """Queue the two-shot sum of `nbytes` bytes, a multiple of 16, at an address aligned to 16."""
        self._launch(self._functions["two_shot", dtype], address, nbytes // 16, share, grid, stream)

    def stop(self) -> None:
        """Let every kernel of this rank that waits, now or later, end without a result."""
        self._words[0] = 1

    @property
    def is_late(self) -> bool:
        """Say whether a kernel gave up at its deadline."""
        return bool(self._words[1])

    def close(self) -> None:
        """Free the host's words; no kernel is queued any more."""
        self._stop.close()

    def _launch(self, function: Any, address: int, count: int, share: int, grid: tuple[int, int], stream: int) -> None:
        self._data.value, self._count.value, self._share.value = address, count, share
        self._device.activate()
        pointers = ctypes.addressof(self._pointers)
        call(driver.cuLaunchKernel, function, grid[0], 1, 1, grid[1], 1, 1, 0, stream, pointers, 0)
