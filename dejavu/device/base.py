"""The interface of a device: streams, events, memory, copies, flags and graphs, the same on CPU and CUDA.

The order of work is CUDA's: each stream runs what it is given first in, first out; streams run beside each other; an
event orders one after another. Every call with a `stream` only queues its work and returns. The caller keeps the
memory and the tensors of a call alive and unchanged until the stream has passed it.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from enum import StrEnum
from types import TracebackType
from typing import TYPE_CHECKING, Self

from dejavu.device.pieces import Pieces
from dejavu.errors import CapacityError
from dejavu.errors import DeviceError as DeviceError

if TYPE_CHECKING:
    import torch

FLAG_BYTES = 4
IPC_HANDLE_BYTES = 64
DEFAULT_DEADLINE_S = 60.0
_ADDRESSES = 1 << 62  # more than any address


class Location(StrEnum):
    """Say which side of the bus memory lies on; on a CPU device both are the host's."""

    DEVICE = "device"
    HOST = "host"


class Closing(ABC):
    """Give `with` to what has a `close`."""

    __slots__ = ()

    @abstractmethod
    def close(self) -> None:
        """Give back what this object owns; a second call does nothing."""

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.close()


class Memory(Closing):
    """Own one allocation or mapping; `Buffer` is what callers hold."""

    __slots__ = ("address", "location", "nbytes")

    def __init__(self, address: int, nbytes: int, location: Location) -> None:
        self.address = address
        self.nbytes = nbytes
        self.location = location

    @abstractmethod
    def tensor(self, address: int, nbytes: int) -> "torch.Tensor":
        """Give a uint8 tensor of shape [nbytes] over part of this memory, without a copy."""

    @abstractmethod
    def export_fd(self) -> int:
        """Give a new file descriptor of this memory, which the caller owns and closes.

        The contents live as long as any process holds a descriptor or a mapping. DeviceError where the memory was not
        made exportable.
        """

    @abstractmethod
    def ipc_handle(self) -> bytes:
        """Give 64 bytes with which another process of the host opens this memory while this process lives."""


class Buffer(Closing):
    """Refer to a range of memory: `address` (valid on the device and, for host memory, on the host) and `nbytes`.

    The buffer that an allocating, importing or registering call returned owns the memory, and its `close` frees it:
    at once on CUDA (no tensor over it may be used afterwards, and its streams must have passed it); on CPU when the
    last tensor over it is gone. A `view` owns nothing and holds the memory object, not its contents.
    """

    __slots__ = ("_owner", "address", "device", "memory", "nbytes")

    def __init__(self, device: "Device", memory: Memory, address: int, nbytes: int, *, owner: bool) -> None:
        self.device = device
        self.memory = memory
        self.address = address
        self.nbytes = nbytes
        self._owner = owner

    def __repr__(self) -> str:
        return f"Buffer({self.address:#x}, {self.nbytes} bytes, {self.location} memory of {self.device})"

    @property
    def location(self) -> Location:
        """Give the side of the bus that the memory lies on."""
        return self.memory.location

    def view(self, offset: int, nbytes: int) -> "Buffer":
        """Give a part of this buffer, which owns nothing."""
        assert 0 <= offset <= offset + nbytes <= self.nbytes, (offset, nbytes, self.nbytes)
        return Buffer(self.device, self.memory, self.address + offset, nbytes, owner=False)

    def tensor(self, dtype: "torch.dtype | None" = None, shape: tuple[int, ...] | None = None) -> "torch.Tensor":
        """Give a tensor over these bytes, without a copy: uint8 [nbytes], or of the `dtype` and `shape` asked for."""
        flat = self.memory.tensor(self.address, self.nbytes)
        typed = flat if dtype is None else flat.view(dtype)
        return typed if shape is None else typed.view(shape)

    def export_fd(self) -> int:
        """Give a file descriptor of the whole memory; the caller closes it. DeviceError if it is not exportable."""
        return self.memory.export_fd()

    def ipc_handle(self) -> bytes:
        """Give 64 bytes that open the whole memory in another process of this host, while this process lives."""
        return self.memory.ipc_handle()

    def close(self) -> None:
        """Free or unmap the memory; on CUDA this waits for the work of the whole device, as the driver does."""
        assert self._owner, "a view owns no memory: close the buffer that it was taken from"
        self.device.prepare_free()
        self.memory.close()


class Event(Closing):
    """Mark a point in a stream. Waiting for an event that was never recorded returns at once, as in CUDA."""

    __slots__ = ()

    @abstractmethod
    def record(self, stream: "Stream") -> None:
        """Mark the point after all work that `stream` has now; replaces an earlier mark."""

    @abstractmethod
    def wait(self, stream: "Stream") -> None:
        """Make later work of `stream` wait for the mark made last; the host does not wait."""

    @abstractmethod
    def query(self) -> bool:
        """Say whether the mark has been reached; raises the stream's error, if it had one."""

    @abstractmethod
    def synchronize(self, deadline_s: float | None = None) -> None:
        """Block until the mark is reached; raises the stream's error, or DeadlineError after `deadline_s` seconds."""

    @abstractmethod
    def elapsed_ms(self, start: "Event") -> float:
        """Give the milliseconds between `start`'s mark and this one; both were made with `timing` and are reached."""

    @abstractmethod
    def ipc_handle(self) -> bytes:
        """Give 64 bytes for `Device.open_event` in another process; the event was made with `interprocess`."""


class Stream(Closing):
    """Run work first in, first out.

    An error in a stream surfaces as the original exception at its next `synchronize` and at waits for its events; the
    stream does none of its later work. A new stream is the way on.
    """

    __slots__ = ("device",)

    device: "Device"

    @property
    @abstractmethod
    def handle(self) -> int:
        """Give the CUDA stream as an integer, for torch and NCCL; 0 on CPU."""

    @abstractmethod
    def query(self) -> bool:
        """Say whether all work is done; raises the stream's error, if it had one."""

    @abstractmethod
    def synchronize(self, deadline_s: float | None = None) -> None:
        """Block until all work is done; raises the stream's error, or DeadlineError after `deadline_s` seconds."""

    def together(self) -> AbstractContextManager[None]:
        """Queue at the end what is posted within: a CPU stream wakes its thread once for all of it."""
        return nullcontext()

    @abstractmethod
    def cancel(self, error: Exception) -> None:
        """End the flag waits that this stream hangs in and give it `error`: for a peer that is known to be dead.

        Callable from any thread. On CUDA the awaited flags are overwritten with the awaited value, and queued copies
        still run: discard what they deliver.
        """

    @abstractmethod
    def renew(self) -> None:
        """Finish the work that is queued, and forget the error: for a stream that outlives what failed on it."""

    @abstractmethod
    def close(self) -> None:
        """Finish the work that is queued, then give the stream back; errors that nobody asked for are dropped."""

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        if isinstance(error, Exception):
            self.cancel(error)
        self.close()


class Graph(Closing):
    """Hold captured work that is launched as one."""

    __slots__ = ()

    @abstractmethod
    def replay(self, *, stream: Stream) -> None:
        """Queue the captured work on `stream`."""


@dataclass(frozen=True, slots=True)
class DeviceProperties:
    """Describe a device: for run records, capacity checks and kernels."""

    name: str
    kind: str  # "cpu" or "cuda"
    index: int
    total_bytes: int
    num_multiprocessors: int  # cores, on CPU
    architecture: str  # "sm_90", or the machine's name on CPU
    bus_id: str  # PCI address; equal in all processes, whatever their CUDA_VISIBLE_DEVICES; empty on CPU


class Device(Closing):
    """Open the way to one device; made by `open_device`, closed after all that came from it.

    On CUDA it uses the device's primary context, as torch does, and makes it current in the calling thread.
    """

    properties: DeviceProperties

    def __str__(self) -> str:
        return f"{self.properties.kind}:{self.properties.index}"

    @property
    @abstractmethod
    def torch_device(self) -> "torch.device":
        """Give torch's name of this device."""

    @abstractmethod
    def free_bytes(self) -> int:
        """Give the memory that is free now."""

    @abstractmethod
    def num_devices(self) -> int:
        """Give the number of devices of this kind that this process sees; 1 on CPU."""

    @abstractmethod
    def can_access(self, index: int) -> bool:
        """Say whether device `index` of this kind is this one, or one whose memory it reads and writes directly."""

    @abstractmethod
    def enable_peer(self, index: int) -> None:
        """Let this device touch device `index`'s plain allocations; DeviceError where the hardware cannot."""

    @abstractmethod
    def synchronize(self) -> None:
        """Block until every stream of this device is done."""

    @abstractmethod
    def prepare_free(self) -> None:
        """Make sure that freeing memory cannot hang; for `Buffer.close`."""

    # Streams, events, graphs

    @abstractmethod
    def create_stream(self, name: str = "stream") -> Stream:
        """Make a stream that runs beside all others; `name` is for traces and messages."""

    @property
    @abstractmethod
    def compute_stream(self) -> Stream:
        """Give the stream on which torch computes in the calling thread: CUDA's current one; on CPU the thread itself.

        On CPU a call with this stream does its work before it returns, and raises its errors at once.
        """

    @abstractmethod
    def create_event(self, *, timing: bool = False, interprocess: bool = False) -> Event:
        """Make an event; `timing` allows elapsed_ms, `interprocess` allows ipc_handle, and not both."""

    @abstractmethod
    def open_event(self, handle: bytes) -> Event:
        """Open an event of another process of this host; only its maker records it."""

    @abstractmethod
    def capture(self, work: Callable[[], None], *, stream: Stream) -> Graph:
        """Capture what `work` queues on `stream`, torch operations included, without doing it yet.

        `work` must depend on nothing that changes between replays but the contents of memory. On CPU a replay calls
        it again. `pack` with new pieces cannot be captured: its table is uploaded per call.
        """

    # Memory

    @abstractmethod
    def allocate(self, nbytes: int) -> Buffer:
        """Allocate device memory, contents undefined; CapacityError where it does not fit. Has an `ipc_handle`."""

    @abstractmethod
    def allocate_exportable(self, nbytes: int) -> Buffer:
        """Allocate device memory that outlives this process while a descriptor from `export_fd` is held anywhere."""

    @abstractmethod
    def import_fd(self, fd: int, nbytes: int) -> Buffer:
        """Map exported device memory of any process on this host; `nbytes` as it was allocated.

        `fd` stays the caller's and may be closed afterwards. The exporter need not be alive.
        """

    @abstractmethod
    def allocate_host(self, nbytes: int) -> Buffer:
        """Allocate pinned host memory, which this device reads and writes directly."""

    @abstractmethod
    def allocate_host_exportable(self, nbytes: int) -> Buffer:
        """Allocate pinned host memory in a memfd; other processes map it with `import_host_fd`. Zeroed."""

    @abstractmethod
    def import_host_fd(self, fd: int, nbytes: int) -> Buffer:
        """Map and pin exported host memory; `fd` stays the caller's and may be closed afterwards."""

    @abstractmethod
    def register_host(self, tensor: "torch.Tensor") -> Buffer:
        """Pin the host memory under a contiguous CPU tensor (an MPI shared window, say); `close` unpins it.

        The buffer keeps the tensor alive.
        """

    @abstractmethod
    def open_ipc(self, handle: bytes, nbytes: int) -> Buffer:
        """Open another process's memory from its `ipc_handle`; its owner must live as long as this buffer is used."""

    # Copies

    @abstractmethod
    def copy(self, target: "Buffer | torch.Tensor", source: "Buffer | torch.Tensor", *, stream: Stream) -> None:
        """Copy all bytes of `source` to `target`, of equal size: one contiguous copy in any direction."""

    @abstractmethod
    def copy_2d(
        self,
        target: "Buffer | torch.Tensor",
        source: "Buffer | torch.Tensor",
        *,
        width: int,
        height: int,
        target_pitch: int,
        source_pitch: int,
        stream: Stream,
    ) -> None:
        """Copy `height` runs of `width` bytes, whose starts lie `pitch` bytes apart on either side: one copy."""

    @abstractmethod
    def copy_batch(
        self,
        target: "Buffer | torch.Tensor | None",
        source: "Buffer | torch.Tensor | None",
        pieces: Pieces,
        *,
        stream: Stream,
    ) -> None:
        """Copy each piece by the copy engine, all in one call; offsets are addresses on a side that is None."""

    @abstractmethod
    def pack(
        self,
        target: "Buffer | torch.Tensor | None",
        source: "Buffer | torch.Tensor | None",
        pieces: Pieces,
        *,
        stream: Stream,
    ) -> None:
        """Copy each piece by one kernel; offsets are addresses on a side that is None.

        Either side may be device memory, pinned host memory, or mapped memory of a peer, so this is the gather into
        staging, the scatter out of it, and the direct store to where the pieces belong. TransferError where a piece
        leaves its memory.
        """

    def unpack(
        self,
        target: "Buffer | torch.Tensor | None",
        source: "Buffer | torch.Tensor | None",
        pieces: Pieces,
        *,
        stream: Stream,
    ) -> None:
        """Move pieces back: `pack` with the list turned round, so that one list serves both directions."""
        self.pack(target, source, pieces.inverse, stream=stream)

    @abstractmethod
    def fill(self, target: "Buffer | torch.Tensor", value: int, *, stream: Stream) -> None:
        """Set every byte to `value` (0 to 255)."""

    # Flags: aligned 32-bit words in memory that both sides have mapped. Values compare cyclically, as CUDA's GEQ.

    @abstractmethod
    def write_flag(self, flag: "Buffer | torch.Tensor", value: int, *, stream: Stream) -> None:
        """Write the flag after all earlier work of the stream, whose effects are visible to who sees the value."""

    @abstractmethod
    def wait_flag(
        self,
        flag: "Buffer | torch.Tensor",
        value: int,
        *,
        stream: Stream,
        deadline_s: float | None = DEFAULT_DEADLINE_S,
    ) -> None:
        """Hold back later work of the stream until the flag is at least `value`.

        After `deadline_s` seconds (None: never) the stream fails with DeadlineError; they count from when the stream
        reaches the wait, and on CUDA, where the hardware waits and a watching thread ends it, from this call. On CUDA
        whoever posts more than about 1000 operations behind a wait is blocked until it ends.
        """


def span(place: "Buffer | torch.Tensor") -> tuple[int, int]:
    """Give the address and the size in bytes of a buffer or a contiguous tensor."""
    if isinstance(place, Buffer):
        return place.address, place.nbytes
    assert place.is_contiguous(), "copies take contiguous tensors: give the pieces of any other"
    return place.data_ptr(), place.numel() * place.element_size()


def check_fits(nbytes: int, free_bytes: int, device: str) -> None:
    """Raise CapacityError where an allocation is larger than what is free."""
    assert nbytes > 0, "memory has at least one byte"
    if nbytes > free_bytes:
        raise CapacityError(f"{nbytes} bytes do not fit into the {free_bytes} free bytes of {device}: ask for less")


def checked_bases(
    target: "Buffer | torch.Tensor | None", source: "Buffer | torch.Tensor | None", pieces: Pieces
) -> tuple[int, int]:
    """Check pieces against their memory and give what to add to their sources and targets; 0 where that is None."""
    source_base, source_bytes = (0, _ADDRESSES) if source is None else span(source)
    target_base, target_bytes = (0, _ADDRESSES) if target is None else span(target)
    pieces.check(source_bytes, target_bytes)
    return source_base, target_base
