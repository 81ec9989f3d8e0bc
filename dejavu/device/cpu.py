"""The CPU device: worker threads as streams, memfds as memory."""

import os
import platform
import weakref
from collections.abc import Callable
from typing import TYPE_CHECKING

from dejavu.device import cpu_copy
from dejavu.device.base import (
    DEFAULT_DEADLINE_S,
    Buffer,
    Device,
    DeviceError,
    DeviceProperties,
    Event,
    Graph,
    Location,
    Memory,
    Stream,
    check_fits,
    checked_bases,
    span,
)
from dejavu.device.cpu_memory import BorrowedMemory, SharedMemory, create_memory, map_fd, open_handle
from dejavu.device.cpu_stream import CpuEvent, CpuStream, InlineStream, SharedEvent, ThreadStream
from dejavu.device.flags import Flag
from dejavu.device.host_memory import available_bytes, meminfo
from dejavu.device.pieces import Pieces

if TYPE_CHECKING:
    import torch

_EVENT_BYTES = 8  # two flags: recorded, reached


class CpuDevice(Device):
    """Be a device made of the host's memory and threads."""

    def __init__(self) -> None:
        self.properties = _properties()
        self._streams: weakref.WeakSet[ThreadStream] = weakref.WeakSet()
        self._inline = InlineStream("compute")
        self._inline.device = self

    @property
    def torch_device(self) -> "torch.device":
        """Give torch's CPU."""
        import torch

        return torch.device("cpu")

    def free_bytes(self) -> int:
        """Give the memory that the kernel calls available, within this process's control group."""
        return available_bytes()

    def num_devices(self) -> int:
        """Give 1."""
        return 1

    def can_access(self, index: int) -> bool:
        """Say that there is but one."""
        return index == 0

    def enable_peer(self, index: int) -> None:
        """Accept the only device."""
        if index != 0:
            raise DeviceError(f"device cpu:{index} does not exist: a host has one CPU device, cpu:0")

    def synchronize(self) -> None:
        """Block until every stream is done."""
        for stream in list(self._streams):
            stream.synchronize()

    def prepare_free(self) -> None:
        """Do nothing: memory goes when the last work over it is done."""

    def close(self) -> None:
        """Close the streams that are still open."""
        for stream in list(self._streams):
            stream.close()

    # Streams, events, graphs

    def create_stream(self, name: str = "stream") -> Stream:
        """Make a stream; its thread starts with its first job."""
        stream = ThreadStream(name, self._streams.discard)
        stream.device = self
        self._streams.add(stream)
        return stream

    @property
    def compute_stream(self) -> Stream:
        """Give the calling thread as a stream."""
        return self._inline

    def create_event(self, *, timing: bool = False, interprocess: bool = False) -> Event:
        """Make an event."""
        assert not (timing and interprocess), "an interprocess event keeps no time"
        if interprocess:
            return SharedEvent(create_memory(_EVENT_BYTES))
        return CpuEvent(timing=timing)

    def open_event(self, handle: bytes) -> Event:
        """Map the counters of an event of another process."""
        return SharedEvent(open_handle(handle))

    def capture(self, work: Callable[[], None], *, stream: Stream) -> Graph:
        """Keep the work for its replays."""
        return CpuGraph(work, stream)

    # Memory

    def allocate(self, nbytes: int) -> Buffer:
        """Make shared memory, as all memory of this device is."""
        return self._create(nbytes, Location.DEVICE)

    def allocate_exportable(self, nbytes: int) -> Buffer:
        """Make shared memory."""
        return self._create(nbytes, Location.DEVICE)

    def import_fd(self, fd: int, nbytes: int) -> Buffer:
        """Map another process's memfd."""
        return self._own(map_fd(fd, nbytes, Location.DEVICE))

    def allocate_host(self, nbytes: int) -> Buffer:
        """Make shared memory."""
        return self._create(nbytes, Location.HOST)

    def allocate_host_exportable(self, nbytes: int) -> Buffer:
        """Make shared memory."""
        return self._create(nbytes, Location.HOST)

    def import_host_fd(self, fd: int, nbytes: int) -> Buffer:
        """Map another process's memfd."""
        return self._own(map_fd(fd, nbytes, Location.HOST))

    def register_host(self, tensor: "torch.Tensor") -> Buffer:
        """Refer to the tensor's memory: nothing needs pinning here."""
        return self._own(BorrowedMemory(tensor))

    def open_ipc(self, handle: bytes, nbytes: int) -> Buffer:
        """Map the memfd that the handle names."""
        return self._own(open_handle(handle, nbytes))

    def _create(self, nbytes: int, location: Location) -> Buffer:
        check_fits(nbytes, self.free_bytes(), str(self))
        return self._own(create_memory(nbytes, location))

    def _own(self, memory: Memory) -> Buffer:
        return Buffer(self, memory, memory.address, memory.nbytes, owner=True)

    # Copies: each job holds the mappings whose addresses it uses

    def copy(self, target: "Buffer | torch.Tensor", source: "Buffer | torch.Tensor", *, stream: Stream) -> None:
        """Queue a memmove."""
        (to, to_bytes), (start, nbytes) = span(target), span(source)
        assert to_bytes == nbytes, f"a copy of {nbytes} bytes into {to_bytes}"
        _submit(stream, lambda: cpu_copy.copy_bytes(to, start, nbytes), target, source)

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
        """Queue a strided numpy assignment."""
        (to, to_bytes), (start, nbytes) = span(target), span(source)
        assert (height - 1) * target_pitch + width <= to_bytes
        assert (height - 1) * source_pitch + width <= nbytes
        _submit(
            stream,
            lambda: cpu_copy.copy_rows(to, start, width, height, target_pitch, source_pitch),
            target,
            source,
        )

    def copy_batch(
        self,
        target: "Buffer | torch.Tensor | None",
        source: "Buffer | torch.Tensor | None",
        pieces: Pieces,
        *,
        stream: Stream,
    ) -> None:
        """Queue the pieces as one job: the CPU has one way to copy them."""
        self.pack(target, source, pieces, stream=stream)

    def pack(
        self,
        target: "Buffer | torch.Tensor | None",
        source: "Buffer | torch.Tensor | None",
        pieces: Pieces,
        *,
        stream: Stream,
    ) -> None:
        """Queue the pieces as one job."""
        resolved = pieces.shifted(*checked_bases(target, source, pieces))
        _submit(stream, lambda: cpu_copy.copy_pieces(resolved), target, source)

    def fill(self, target: "Buffer | torch.Tensor", value: int, *, stream: Stream) -> None:
        """Queue a memset."""
        to, nbytes = span(target)
        _submit(stream, lambda: cpu_copy.fill_bytes(to, value, nbytes), target)

    def write_flag(self, flag: "Buffer | torch.Tensor", value: int, *, stream: Stream) -> None:
        """Queue a store and a wake-up."""
        word = Flag(span(flag)[0])
        _submit(stream, lambda: word.write(value), flag)

    def wait_flag(
        self,
        flag: "Buffer | torch.Tensor",
        value: int,
        *,
        stream: Stream,
        deadline_s: float | None = DEFAULT_DEADLINE_S,
    ) -> None:
        """Queue a wait that sleeps in the kernel."""
        word = Flag(span(flag)[0])
        assert isinstance(stream, CpuStream)
        _submit(stream, lambda: word.wait(value, deadline_s, stream.check), flag)


class CpuGraph(Graph):
    """Keep work, and do it again at each replay."""

    __slots__ = ("_stream", "_work")

    def __init__(self, work: Callable[[], None], stream: Stream) -> None:
        self._work: Callable[[], None] | None = work
        self._stream = stream

    def replay(self, *, stream: Stream) -> None:
        """Call the work, which queues on the stream of the capture."""
        assert self._work is not None, "the graph was closed"
        self._work()

    def close(self) -> None:
        """Forget the work."""
        self._work = None


def _submit(stream: Stream, job: Callable[[], None], *places: "Buffer | torch.Tensor | None") -> None:
    assert isinstance(stream, CpuStream), f"{stream} is no stream of the CPU device"
    stream.submit(job, tuple(_held(place) for place in places))


def _held(place: "Buffer | torch.Tensor | None") -> object:
    if not isinstance(place, Buffer):
        return place
    assert isinstance(place.memory, (SharedMemory, BorrowedMemory)), f"{place} is no memory of the CPU device"
    return place.memory.held


def _properties() -> DeviceProperties:
    return DeviceProperties(
        name=_processor_name(),
        kind="cpu",
        index=0,
        total_bytes=meminfo("MemTotal"),
        num_multiprocessors=len(os.sched_getaffinity(0)),
        architecture=platform.machine(),
        bus_id="",
    )


def _processor_name() -> str:
    with open("/proc/cpuinfo") as lines:
        for line in lines:
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    return platform.machine()
