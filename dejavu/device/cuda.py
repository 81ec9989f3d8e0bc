"""The CUDA device: the driver's API behind the device interface."""

import ctypes
import weakref
from collections.abc import Callable
from functools import cached_property
from typing import TYPE_CHECKING, Any

import numpy as np
from cuda.bindings import driver

from dejavu.device import cuda_memory
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
from dejavu.device.cpu_memory import BorrowedMemory, create_memory, map_fd
from dejavu.device.cuda_driver import call, check, count_devices
from dejavu.device.cuda_kernels import PackKernel
from dejavu.device.cuda_stream import (
    AwaitedFlag,
    CudaGraph,
    CudaStream,
    FlagWatch,
    create_event,
    open_event,
    poll,
    reached,
)
from dejavu.device.pieces import Pieces

if TYPE_CHECKING:
    import torch

_LARGEST_PIECE = 1 << 62


class CudaDevice(Device):
    """Be one CUDA device, through its primary context."""

    def __init__(self, index: int) -> None:
        self._device = call(driver.cuDeviceGet, index)
        self._context: Any = call(driver.cuDevicePrimaryCtxRetain, self._device)
        self._retained: list[Any] = [self._device]  # whose primary contexts this object holds
        self.activate()
        self.properties = _properties(self._device, index)
        # Loading a kernel or making a stream may wait for the whole device: before any stream can wait for a flag.
        self._kernel = PackKernel(self.properties.architecture, self._wait_event)
        self.watch = FlagWatch(self.activate)
        self.captured_waits: list[AwaitedFlag] | None = None  # of the capture that is under way
        self._streams: weakref.WeakSet[CudaStream] = weakref.WeakSet()
        self._torch_streams: dict[int, CudaStream] = {}

    def activate(self) -> None:
        """Make this device's context current in the calling thread."""
        call(driver.cuCtxSetCurrent, self._context)

    @cached_property
    def torch_device(self) -> "torch.device":
        """Give torch's name."""
        import torch

        return torch.device("cuda", self.properties.index)

    def free_bytes(self) -> int:
        """Ask the driver."""
        self.activate()
        return int(call(driver.cuMemGetInfo)[0])

    def num_devices(self) -> int:
        """Ask the driver."""
        return count_devices()

    def can_access(self, index: int) -> bool:
        """Ask the driver."""
        if index == self.properties.index:
            return True
        return bool(call(driver.cuDeviceCanAccessPeer, self._device, call(driver.cuDeviceGet, index)))

    def enable_peer(self, index: int) -> None:
        """Enable peer access in this context; twice is once."""
        if index == self.properties.index:
            return
        if not self.can_access(index):
            raise DeviceError(f"{self} cannot reach cuda:{index} directly: use a carrier through host memory")
        self.activate()
        device = call(driver.cuDeviceGet, index)
        peer = call(driver.cuDevicePrimaryCtxRetain, device)
        self._retained.append(device)
        code = driver.cuCtxEnablePeerAccess(peer, 0)[0]
        if code != driver.CUresult.CUDA_ERROR_PEER_ACCESS_ALREADY_ENABLED:
            check("cuCtxEnablePeerAccess", code)

    def synchronize(self) -> None:
        """Wait for each stream in turn, so that a hanging flag wait meets its deadline, then for torch's work."""
        self.activate()
        for stream in list(self._streams):
            stream.synchronize()
        call(driver.cuCtxSynchronize)

    def prepare_free(self) -> None:
        """Let the flag waits in flight end, by their flags or deadlines: cuMemFree waits for every stream."""
        self.activate()
        poll(self.watch.settled, None, "a flag wait")

    def close(self) -> None:
        """Close streams and tables, and give the context back."""
        if self._context is None:
            return
        self.activate()
        for stream in list(self._streams):
            stream.close()
        self._kernel.close()
        self.watch.close()
        for device in self._retained:
            call(driver.cuDevicePrimaryCtxRelease, device)
        self._context = None

    def forget(self, stream: CudaStream) -> None:
        """Drop a stream that was closed."""
        self._streams.discard(stream)

    # Streams, events, graphs

    def create_stream(self, name: str = "stream") -> Stream:
        """Make a stream that does not wait for the default one."""
        self.activate()
        handle = call(driver.cuStreamCreate, driver.CUstream_flags.CU_STREAM_NON_BLOCKING)
        stream = CudaStream(self, int(handle), name, owner=True)
        self._streams.add(stream)
        return stream

    @property
    def compute_stream(self) -> Stream:
        """Give torch's current stream."""
        import torch

        handle = torch._C._cuda_getCurrentRawStream(self.properties.index)  # a tenth of current_stream's time
        if handle not in self._torch_streams:
            self._torch_streams[handle] = CudaStream(self, handle, "compute", owner=False)
        return self._torch_streams[handle]

    def create_event(self, *, timing: bool = False, interprocess: bool = False) -> Event:
        """Make an event."""
        assert not (timing and interprocess), "an interprocess event keeps no time"
        self.activate()
        return create_event(self, timing=timing, interprocess=interprocess)

    def open_event(self, handle: bytes) -> Event:
        """Open an event of another process."""
        self.activate()
        return open_event(self, handle)

    def capture(self, work: Callable[[], None], *, stream: Stream) -> Graph:
        """Capture a graph."""
        assert isinstance(stream, CudaStream)
        self.activate()
        return CudaGraph(work, stream)

    # Memory

    def allocate(self, nbytes: int) -> Buffer:
        """Allocate with cuMemAlloc."""
        check_fits(nbytes, self.free_bytes(), str(self))
        return self._own(cuda_memory.PlainMemory(nbytes, self.properties.index))

    def allocate_exportable(self, nbytes: int) -> Buffer:
        """Allocate with cuMemCreate; the size is rounded up to whole pages of 2 MiB."""
        check_fits(nbytes, self.free_bytes(), str(self))
        return self._own(cuda_memory.create_exportable(nbytes, self.properties.index))

    def import_fd(self, fd: int, nbytes: int) -> Buffer:
        """Map a descriptor."""
        self.activate()
        return self._own(cuda_memory.import_exportable(fd, nbytes, self.properties.index))

    def allocate_host(self, nbytes: int) -> Buffer:
        """Allocate with cuMemHostAlloc."""
        self.activate()
        return self._own(cuda_memory.PinnedMemory(nbytes))

    def allocate_host_exportable(self, nbytes: int) -> Buffer:
        """Make a memfd and pin it; pinning takes half a second per GiB."""
        self.activate()
        return self._own(cuda_memory.RegisteredMemory(create_memory(nbytes)))

    def import_host_fd(self, fd: int, nbytes: int) -> Buffer:
        """Map a memfd and pin it."""
        self.activate()
        return self._own(cuda_memory.RegisteredMemory(map_fd(fd, nbytes)))

    def register_host(self, tensor: "torch.Tensor") -> Buffer:
        """Pin a tensor's memory."""
        self.activate()
        return self._own(cuda_memory.RegisteredMemory(BorrowedMemory(tensor)))

    def open_ipc(self, handle: bytes, nbytes: int) -> Buffer:
        """Open with cuIpcOpenMemHandle; peer access between the two devices is enabled by the driver."""
        self.activate()
        return self._own(cuda_memory.OpenedMemory(handle, nbytes, self.properties.index))

    def _own(self, memory: Memory) -> Buffer:
        return Buffer(self, memory, memory.address, memory.nbytes, owner=True)

    # Copies

    def copy(self, target: "Buffer | torch.Tensor", source: "Buffer | torch.Tensor", *, stream: Stream) -> None:
        """Queue one copy; unified addresses tell the driver its direction."""
        (to, to_bytes), (start, nbytes) = span(target), span(source)
        assert to_bytes == nbytes, f"a copy of {nbytes} bytes into {to_bytes}"
        self.activate()
        call(driver.cuMemcpyAsync, to, start, nbytes, stream.handle)

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
        """Queue one strided copy."""
        (to, to_bytes), (start, nbytes) = span(target), span(source)
        assert (height - 1) * target_pitch + width <= to_bytes
        assert (height - 1) * source_pitch + width <= nbytes
        self.activate()
        parameters = driver.CUDA_MEMCPY2D()
        parameters.srcMemoryType = parameters.dstMemoryType = driver.CUmemorytype.CU_MEMORYTYPE_UNIFIED
        parameters.srcDevice, parameters.dstDevice = start, to
        parameters.srcPitch, parameters.dstPitch = source_pitch, target_pitch
        parameters.WidthInBytes, parameters.Height = width, height
        call(driver.cuMemcpy2DAsync, parameters, stream.handle)

    def copy_batch(
        self,
        target: "Buffer | torch.Tensor | None",
        source: "Buffer | torch.Tensor | None",
        pieces: Pieces,
        *,
        stream: Stream,
    ) -> None:
        """Queue one cuMemcpyBatchAsync."""
        bases = checked_bases(target, source, pieces)
        filled = pieces.split(_LARGEST_PIECE)
        if len(filled) > 0:
            self.activate()
            self._batch(filled.shifted(*bases), stream.handle)

    def pack(
        self,
        target: "Buffer | torch.Tensor | None",
        source: "Buffer | torch.Tensor | None",
        pieces: Pieces,
        *,
        stream: Stream,
    ) -> None:
        """Queue one kernel."""
        source_base, target_base = checked_bases(target, source, pieces)
        self.activate()
        self._kernel.launch(pieces, source_base, target_base, stream.handle)

    def fill(self, target: "Buffer | torch.Tensor", value: int, *, stream: Stream) -> None:
        """Queue a memset."""
        to, nbytes = span(target)
        self.activate()
        call(driver.cuMemsetD8Async, to, value, nbytes, stream.handle)

    def write_flag(self, flag: "Buffer | torch.Tensor", value: int, *, stream: Stream) -> None:
        """Queue cuStreamWriteValue32, behind whose fence all earlier work is visible."""
        self.activate()
        call(driver.cuStreamWriteValue32, stream.handle, span(flag)[0], value & 0xFFFFFFFF, 0)

    def wait_flag(
        self,
        flag: "Buffer | torch.Tensor",
        value: int,
        *,
        stream: Stream,
        deadline_s: float | None = DEFAULT_DEADLINE_S,
    ) -> None:
        """Queue cuStreamWaitValue32 and have the watch look after it."""
        assert isinstance(stream, CudaStream)
        awaited = AwaitedFlag(span(flag)[0], value & 0xFFFFFFFF, _on_host(flag), deadline_s)
        position = stream.advance()
        self.activate()
        call(driver.cuStreamWaitValue32, stream.handle, awaited.address, awaited.value, 0)  # 0: at least, cyclic
        if self.captured_waits is not None:
            self.captured_waits.append(awaited)
        else:
            self.watch.add(stream, position, awaited)

    def _wait_event(self, event: Any) -> None:
        def settled() -> bool:
            self.watch.expire()
            return reached(event)

        poll(settled, None, "a launch")

    @cached_property
    def _batch_function(self) -> Any:
        # Called through ctypes: the binding wants a list of objects per address, which costs more than the copies.
        address, _ = call(driver.cuGetProcAddress, b"cuMemcpyBatchAsync", 13000, 0)
        pointer, size = ctypes.c_void_p, ctypes.c_size_t
        return ctypes.CFUNCTYPE(ctypes.c_int, pointer, pointer, pointer, size, pointer, pointer, size, pointer)(address)

    def _batch(self, pieces: Pieces, stream: int) -> None:
        attributes = driver.CUmemcpyAttributes()
        attributes.srcAccessOrder = driver.CUmemcpySrcAccessOrder.CU_MEMCPY_SRC_ACCESS_ORDER_STREAM
        first = np.zeros(1, dtype=np.uint64)
        addresses = [array.ctypes.data for array in (pieces.target, pieces.source, pieces.nbytes)]
        order = (int(attributes.getPtr()), first.ctypes.data, 1)
        code = self._batch_function(*addresses, len(pieces), *order, stream)
        check("cuMemcpyBatchAsync", driver.CUresult(code))


def _properties(device: Any, index: int) -> DeviceProperties:
    attributes = driver.CUdevice_attribute
    major, minor, multiprocessors = (
        int(call(driver.cuDeviceGetAttribute, attribute, device))
        for attribute in (
            attributes.CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR,
            attributes.CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MINOR,
            attributes.CU_DEVICE_ATTRIBUTE_MULTIPROCESSOR_COUNT,
        )
    )
    return DeviceProperties(
        name=_text(call(driver.cuDeviceGetName, 256, device)),
        kind="cuda",
        index=index,
        total_bytes=int(call(driver.cuDeviceTotalMem, device)),
        num_multiprocessors=multiprocessors,
        architecture=f"sm_{major}{minor}",
        bus_id=_text(call(driver.cuDeviceGetPCIBusId, 64, device)),
    )


def _on_host(place: "Buffer | torch.Tensor") -> bool:
    if isinstance(place, Buffer):
        return place.location is Location.HOST
    return place.device.type == "cpu"


def _text(name: bytes) -> str:
    return name.split(b"\0", 1)[0].decode()
