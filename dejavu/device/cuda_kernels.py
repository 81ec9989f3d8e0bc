"""Kernels of the CUDA device: compiled at run time, kept on disk; and the tables that the pack kernel reads."""

import ctypes
import hashlib
import os
import threading
from collections import deque
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import numpy as np

from dejavu.assets import cache_dir, data_path
from dejavu.device.base import DeviceError
from dejavu.device.cuda_driver import call
from dejavu.device.cuda_memory import PinnedMemory, PlainMemory
from dejavu.device.pieces import Pieces

if TYPE_CHECKING:
    from pathlib import Path

_ROW_BYTES = 32  # struct Piece: source, target, nbytes, unused
_THREADS, _WARPS = 256, 8
_PART_BYTES = 4096  # what one warp copies: two rounds of its loads
_PIECE_BYTES = 32 * 1024  # longer pieces become several rows, so that no warp works long
_RING_BYTES = 32 << 20
_ROWS_PER_LAUNCH = _RING_BYTES // _ROW_BYTES // 4
# Rows that a warp reads over the bus cost little while there are few; more are first copied to the device.
_UPLOAD_ROWS = 4096


def load_kernel(name: str, function: str, architecture: str) -> int:
    """Give a kernel of `kernels/<name>.cu` in the current context; compiles it unless the cache holds it."""
    from cuda.bindings import driver

    source = data_path("kernels", f"{name}.cu").read_text()
    path = cache_dir() / "kernels" / f"{name}-{_key(source, architecture)}.cubin"
    if not path.exists():
        _store(path, _compile(name, source, architecture))
    module = call(driver.cuModuleLoadData, path.read_bytes())
    return int(call(driver.cuModuleGetFunction, module, function.encode()))


def _key(source: str, architecture: str) -> str:
    import cuda.core
    from cuda.bindings import nvrtc

    _, major, minor = nvrtc.nvrtcVersion()
    parts = (source, architecture, cuda.core.__version__, f"{major}.{minor}")
    return hashlib.sha256("\0".join(parts).encode()).hexdigest()[:24]


def _compile(name: str, source: str, architecture: str) -> bytes:
    from cuda.core import Program, ProgramOptions

    options = ProgramOptions(arch=architecture, std="c++17", name=f"{name}.cu")
    try:
        return bytes(Program(source, "c++", options).compile("cubin").code)
    except Exception as error:  # NVRTC's log is the message
        raise DeviceError(f"kernel {name}.cu does not compile for {architecture}: {error}") from error


def _store(path: "Path", code: bytes) -> None:
    # Ranks of one host may compile at the same time: each writes its own file, and the last rename wins.
    path.parent.mkdir(parents=True, exist_ok=True)
    draft = path.with_suffix(f".{os.getpid()}.{threading.get_ident()}")
    draft.write_bytes(code)
    draft.replace(path)


class TableRing:
    """Hold the tables of launches in flight, in pinned host memory with a twin on the device.

    A region is used again when the event behind its launch has passed, so posting a launch waits for the device only
    when tables of `_RING_BYTES` are in flight.
    """

    def __init__(self, passed: Callable[[Any], None]) -> None:
        """`passed` blocks until an event is reached, and raises where its stream hangs past a deadline."""
        self._host = PinnedMemory(_RING_BYTES)
        self._device = PlainMemory(_RING_BYTES)
        self._rows = self._host.tensor(self._host.address, _RING_BYTES).numpy().view(np.int64).reshape(-1, 4)
        self._passed = passed
        self._in_flight: deque[tuple[int, Any]] = deque()  # (end, event), oldest first
        self._idle_events: list[Any] = []
        self._begin = self._end = 0  # bytes taken since the start; [begin, end) is in flight

    def write(self, pieces: Pieces) -> int:
        """Copy a table into the ring and give its offset."""
        nbytes = len(pieces) * _ROW_BYTES
        self._reserve(nbytes)
        offset = self._end % _RING_BYTES
        rows = self._rows[offset // _ROW_BYTES :][: len(pieces)]
        rows[:, 0], rows[:, 1], rows[:, 2] = pieces.source, pieces.target, pieces.nbytes
        self._end += nbytes
        return offset

    def host_address(self, offset: int) -> int:
        """Give where the table lies in pinned memory."""
        return self._host.address + offset

    def upload(self, offset: int, nbytes: int, stream: int) -> int:
        """Queue the table's copy to the device and give where it will lie."""
        from cuda.bindings import driver

        target = self._device.address + offset
        call(driver.cuMemcpyHtoDAsync, target, self._host.address + offset, nbytes, stream)
        return target

    def retire(self, stream: int) -> None:
        """Mark what was written last as free once the stream has passed this point."""
        from cuda.bindings import driver

        flags = driver.CUevent_flags.CU_EVENT_DISABLE_TIMING
        event = self._idle_events.pop() if self._idle_events else call(driver.cuEventCreate, flags)
        call(driver.cuEventRecord, event, stream)
        self._in_flight.append((self._end, event))

    def close(self) -> None:
        """Free the memory; the device is idle."""
        from cuda.bindings import driver

        for event in self._idle_events + [event for _, event in self._in_flight]:
            call(driver.cuEventDestroy, event)
        self._in_flight.clear()
        self._idle_events.clear()
        self._host.close()
        self._device.close()

    def _reserve(self, nbytes: int) -> None:
        room = _RING_BYTES - self._end % _RING_BYTES
        if nbytes > room:  # a table is contiguous: the rest of this round stays unused
            self._end += room
        while self._end + nbytes - self._begin > _RING_BYTES:
            end, event = self._in_flight.popleft()
            self._passed(event)
            self._idle_events.append(event)
            self._begin = end


class PackKernel:
    """Launch `copy_pieces`; callable from any thread."""

    def __init__(self, architecture: str, passed: Callable[[Any], None]) -> None:
        self._function = load_kernel("pack", "copy_pieces", architecture)
        self._ring = TableRing(passed)
        self._lock = threading.Lock()
        self.upload_rows = _UPLOAD_ROWS

    def launch(self, pieces: Pieces, stream: int) -> None:
        """Copy pieces given by address."""
        rows = pieces.split(_PIECE_BYTES)
        with self._lock:
            for first in range(0, len(rows), _ROWS_PER_LAUNCH):
                part = slice(first, first + _ROWS_PER_LAUNCH)
                self._launch(Pieces(rows.source[part], rows.target[part], rows.nbytes[part]), stream)

    def close(self) -> None:
        """Free the tables."""
        self._ring.close()

    def _launch(self, rows: Pieces, stream: int) -> None:
        offset = self._ring.write(rows)
        if len(rows) >= self.upload_rows:
            table = self._ring.upload(offset, len(rows) * _ROW_BYTES, stream)
        else:
            table = self._ring.host_address(offset)
        splits = max(1, -(-rows.total_bytes // (len(rows) * _PART_BYTES)))
        self._start(table, len(rows), splits, stream)
        self._ring.retire(stream)

    def _start(self, table: int, count: int, splits: int, stream: int) -> None:
        from cuda.bindings import driver

        blocks = -(-count * splits // _WARPS)
        values = (table, count, splits)
        types = (ctypes.c_void_p, ctypes.c_uint64, ctypes.c_uint32)
        call(driver.cuLaunchKernel, self._function, blocks, 1, 1, _THREADS, 1, 1, 0, stream, (values, types), 0)
