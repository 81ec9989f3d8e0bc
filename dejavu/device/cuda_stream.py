"""Streams, events and graphs of the CUDA device, and the watch over flag waits that no hardware deadline ends."""

import ctypes
import math
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from cuda.bindings import driver

from dejavu.device.base import IPC_HANDLE_BYTES, DeviceError, Event, Graph, Stream
from dejavu.device.cuda_driver import call, check
from dejavu.errors import DeadlineError

if TYPE_CHECKING:
    import torch

    from dejavu.device.cuda import CudaDevice

_SPIN_S = 2e-4
_LOOK_S = 0.25
_FIRST_SLEEP_S, _LONGEST_SLEEP_S = 2e-5, 1e-3


def reached(event: Any) -> bool:
    """Say whether a driver event has been reached."""
    code = driver.cuEventQuery(event)[0]
    if code == driver.CUresult.CUDA_ERROR_NOT_READY:
        return False
    check("cuEventQuery", code)
    return True


def poll(done: Callable[[], bool], deadline_s: float | None, what: str) -> None:
    """Block until `done`: spinning at first, for short waits, then sleeping; DeadlineError after `deadline_s`."""
    start_s = time.monotonic()
    sleep_s = _FIRST_SLEEP_S
    while not done():
        waited_s = time.monotonic() - start_s
        if deadline_s is not None and waited_s > deadline_s:
            raise DeadlineError(f"{what} was not done within {deadline_s} s: a peer has stopped, or is slow")
        if waited_s > _SPIN_S:
            time.sleep(sleep_s)
            sleep_s = min(1.5 * sleep_s, _LONGEST_SLEEP_S)


@dataclass(frozen=True, slots=True)
class AwaitedFlag:
    """Name a flag and the value that it must reach."""

    address: int
    value: int
    on_host: bool
    deadline_s: float | None


@dataclass(frozen=True, slots=True)
class FlagWait:
    """Hold one wait that a stream has queued at a position, and the event right behind it."""

    stream: "CudaStream"
    position: int
    flag: AwaitedFlag
    end_s: float
    event: Any


class FlagWatch:
    """Know the flag waits in flight, and end those of a dead peer: by writing the awaited value into the flag.

    The hardware waits for ever, and about 1000 operations behind a wait the driver blocks whoever posts the next. So a
    thread ends what is late, four times a second; host-side waits of this device poll, and look more often.
    """

    def __init__(self, activate: Callable[[], None]) -> None:
        """`activate` makes the device current in the thread."""
        self._activate = activate
        self._thread: threading.Thread | None = None
        self._stop = threading.Event()
        self._waits: list[FlagWait] = []
        self._idle: list[Any] = []  # events to use again
        self._lock = threading.Lock()
        self._rescue = _urgent_stream()  # hangs behind nobody

    def add(self, stream: "CudaStream", position: int, flag: AwaitedFlag) -> None:
        """Note a wait that was just queued; its position was taken before."""
        with self._lock:
            self._forget_oldest()
            self._start()
            event = self._idle.pop() if self._idle else _new_event()
        call(driver.cuEventRecord, event, stream.handle)  # may block: not under the lock, which the thread needs
        end_s = math.inf if flag.deadline_s is None else time.monotonic() + flag.deadline_s
        with self._lock:
            self._waits.append(FlagWait(stream, position, flag, end_s, event))
        if stream.error is not None:
            self.release(stream)

    def in_flight(self) -> bool:
        """Say whether any wait may still hold a stream."""
        with self._lock:
            self._forget_reached()
            return bool(self._waits)

    def settled(self) -> bool:
        """Fail what is late, and say whether no wait is in flight."""
        self.expire()
        return not self.in_flight()

    def expire(self) -> None:
        """Fail the streams whose waits have passed their deadline."""
        now_s = time.monotonic()
        with self._lock:
            late = [wait for wait in self._waits if wait.end_s < now_s and not reached(wait.event)]
        for wait in late:
            wait.stream.cancel(
                DeadlineError(
                    f"a flag did not become {wait.flag.value} within {wait.flag.deadline_s} s: "
                    "the peer that writes it has stopped or is slower than the deadline"
                )
            )

    def first_unreached(self, stream: "CudaStream") -> int | None:
        """Give the position of the first flag wait that a stream has not passed, or None."""
        with self._lock:
            self._forget_reached()
            return next((wait.position for wait in self._waits if wait.stream is stream), None)

    def release(self, stream: "CudaStream") -> None:
        """Let a stream out of all its flag waits."""
        with self._lock:
            self._forget_reached()  # a flag that was passed may be in use for something later
            for wait in self._waits:
                if wait.stream is stream:
                    self._write(wait.flag)

    def close(self) -> None:
        """Stop the thread and give the events back; no wait is in flight."""
        self._stop.set()
        if self._thread is not None:
            self._thread.join()
        for event in self._idle + [wait.event for wait in self._waits]:
            call(driver.cuEventDestroy, event)
        self._waits.clear()
        self._idle.clear()
        call(driver.cuStreamDestroy, self._rescue)

    def _start(self) -> None:
        if self._thread is None:
            self._thread = threading.Thread(target=self._look, name="flag-watch", daemon=True)
            self._thread.start()

    def _look(self) -> None:
        self._activate()
        while not self._stop.wait(_LOOK_S):
            try:
                self.expire()
            except DeviceError:  # the device is lost, and every other call on it says so
                return

    def _write(self, flag: AwaitedFlag) -> None:
        if flag.on_host:  # needs nothing of a driver that may be blocked behind a full queue
            ctypes.c_uint32.from_address(flag.address).value = flag.value
        else:
            call(driver.cuStreamWriteValue32, self._rescue, flag.address, flag.value, 0)

    def _forget_oldest(self) -> None:
        """Let go of waits from the oldest on, as far as they are over: one more look, where the next one is not."""
        while self._waits and reached(self._waits[0].event):
            self._idle.append(self._waits.pop(0).event)

    def _forget_reached(self) -> None:
        kept = []
        for wait in self._waits:
            if reached(wait.event):
                self._idle.append(wait.event)
            else:
                kept.append(wait)
        self._waits = kept


def _new_event() -> Any:
    return call(driver.cuEventCreate, driver.CUevent_flags.CU_EVENT_DISABLE_TIMING)


def _urgent_stream() -> Any:
    _, highest = call(driver.cuCtxGetStreamPriorityRange)
    return call(driver.cuStreamCreateWithPriority, driver.CUstream_flags.CU_STREAM_NON_BLOCKING, highest)


@dataclass(slots=True)
class Source:
    """Say up to which mark of another stream a stream has waited, and from which of its own positions on."""

    mark: int
    position: int


class CudaStream(Stream):
    """Own a CUDA stream, or refer to torch's.

    Positions count its marks and waits. What is queued at or behind position `spoilt` is void once there is an error;
    a mark before it was made by sound work, and whoever waits for that mark is sound, too.
    """

    __slots__ = (
        "__weakref__",
        "_handle",
        "_owner",
        "_passed",
        "_position",
        "device",
        "error",
        "name",
        "sources",
        "spoilt",
    )

    device: "CudaDevice"

    def __init__(self, device: "CudaDevice", handle: int, name: str, *, owner: bool) -> None:
        self.device = device
        self.name = name
        self.error: Exception | None = None
        self.spoilt = 0
        self.sources: dict[CudaStream, Source] = {}  # streams that this one has waited for since it was last idle
        self._position = self._passed = 0  # queued, and known to be done
        self._handle = handle
        self._owner = owner

    @property
    def handle(self) -> int:
        """Give the CUstream."""
        return self._handle

    def advance(self) -> int:
        """Give the next position."""
        self._position += 1
        return self._position

    def follow(self, source: "CudaStream", mark: int) -> None:
        """Note that later work waits for a mark of another stream, and so for all that this mark waits for."""
        position = self.advance()
        behind = {other: each.mark for other, each in list(source.sources.items()) if each.position <= mark}
        for other, up_to in {**behind, source: mark}.items():
            if other is not self:
                known = self.sources.setdefault(other, Source(up_to, position))
                known.mark = max(known.mark, up_to)

    def check(self, mark: int | None = None) -> None:
        """Raise this stream's error, for a `mark` only if it is void; that of a mark waited for becomes its own."""
        if self.error is None:
            self._inherit()
        if self.error is not None and (mark is None or mark >= self.spoilt):
            raise self.error

    def _inherit(self) -> None:
        for source, waited in list(self.sources.items()):
            if source.error is not None and waited.mark >= source.spoilt:
                self.spoilt, self.error = waited.position, source.error
                return

    def query(self) -> bool:
        """Say whether all work is done."""
        position = self._position
        is_done = self._settled()
        self.check()
        if is_done:
            self._forget(position)
        return is_done

    def synchronize(self, deadline_s: float | None = None) -> None:
        """Block until all work is done."""
        position = self._position
        if deadline_s is None and not self.device.watch.in_flight():
            call(driver.cuStreamSynchronize, self._handle)
        else:
            poll(self._settled, deadline_s, f"the work of stream {self.name}")
        self.check()
        self._forget(position)

    def cancel(self, error: Exception) -> None:
        """Give the stream its error, and let it out of its flag waits: void is what lies behind the first of them."""
        self.device.activate()
        if self.error is None:
            first = self.device.watch.first_unreached(self)
            self.spoilt, self.error = self._passed + 1 if first is None else first, error
        self.device.watch.release(self)

    def renew(self) -> None:
        """Wait for what is queued, and forget the error and those of streams that this one has waited for."""
        self.device.activate()
        poll(self._settled, None, f"the work of stream {self.name}")
        self.error, self.spoilt = None, 0
        self.sources.clear()

    def close(self) -> None:
        """Finish the work, and destroy the stream."""
        if not self._owner:
            return
        self._owner = False
        self.device.activate()
        poll(self._settled, None, f"the work of stream {self.name}")
        call(driver.cuStreamDestroy, self._handle)
        self.device.forget(self)

    def _forget(self, position: int) -> None:
        """Note that all up to `position` is done, and was sound."""
        self._passed = max(self._passed, position)
        self.sources = {other: each for other, each in list(self.sources.items()) if each.position > position}

    def _settled(self) -> bool:
        self.device.watch.expire()
        return self._idle()

    def _idle(self) -> bool:
        code = driver.cuStreamQuery(self._handle)[0]
        if code == driver.CUresult.CUDA_ERROR_NOT_READY:
            return False
        check("cuStreamQuery", code)
        return True


class CudaEvent(Event):
    """Own a CUDA event, or another process's opened here."""

    __slots__ = ("_device", "_handle", "_mark", "_stream")

    def __init__(self, device: "CudaDevice", handle: Any) -> None:
        self._device = device
        self._handle: Any = handle
        self._stream: CudaStream | None = None
        self._mark = 0

    def record(self, stream: Stream) -> None:
        """Record on the stream."""
        assert isinstance(stream, CudaStream)
        self._stream, self._mark = stream, stream.advance()
        call(driver.cuEventRecord, self._handle, stream.handle)

    def wait(self, stream: Stream) -> None:
        """Make the stream wait on the device."""
        assert isinstance(stream, CudaStream)
        if self._stream is not None and self._stream is not stream:
            stream.follow(self._stream, self._mark)
        call(driver.cuStreamWaitEvent, stream.handle, self._handle, 0)

    def query(self) -> bool:
        """Ask the driver."""
        self._device.watch.expire()
        if self._stream is not None:
            self._stream.check(self._mark)
        return reached(self._handle)

    def synchronize(self, deadline_s: float | None = None) -> None:
        """Block until the mark is reached."""
        if deadline_s is None and not self._device.watch.in_flight():
            call(driver.cuEventSynchronize, self._handle)
        else:
            poll(self._settled, deadline_s, "an event")
        if self._stream is not None:
            self._stream.check(self._mark)

    def elapsed_ms(self, start: Event) -> float:
        """Ask the driver; half a microsecond is its resolution."""
        assert isinstance(start, CudaEvent)
        return float(call(driver.cuEventElapsedTime, start._handle, self._handle))

    def ipc_handle(self) -> bytes:
        """Give the driver's handle."""
        handle = call(driver.cuIpcGetEventHandle, self._handle)
        return ctypes.string_at(int(handle.getPtr()), IPC_HANDLE_BYTES)

    def close(self) -> None:
        """Destroy the event."""
        if self._handle is not None:
            call(driver.cuEventDestroy, self._handle)
            self._handle = None

    def _settled(self) -> bool:
        self._device.watch.expire()
        return reached(self._handle)


def create_event(device: "CudaDevice", *, timing: bool, interprocess: bool) -> CudaEvent:
    """Make an event."""
    kinds = driver.CUevent_flags
    flags = kinds.CU_EVENT_DEFAULT.value if timing else kinds.CU_EVENT_DISABLE_TIMING.value
    if interprocess:
        flags |= kinds.CU_EVENT_INTERPROCESS.value
    return CudaEvent(device, call(driver.cuEventCreate, flags))


def open_event(device: "CudaDevice", handle: bytes) -> CudaEvent:
    """Open another process's event."""
    assert len(handle) == IPC_HANDLE_BYTES
    opaque = driver.CUipcEventHandle()
    ctypes.memmove(int(opaque.getPtr()), handle, IPC_HANDLE_BYTES)
    return CudaEvent(device, call(driver.cuIpcOpenEventHandle, opaque))


class CudaGraph(Graph):
    """Hold a graph captured through torch, so that torch's allocator takes part."""

    __slots__ = ("_graph", "_stream", "_waits")

    def __init__(self, work: Callable[[], None], stream: CudaStream) -> None:
        """Capture what `work` queues on `stream`."""
        import torch

        if stream.handle == 0:
            raise DeviceError("the default stream cannot be captured: capture on a stream of create_stream")
        self._graph: torch.cuda.CUDAGraph | None = torch.cuda.CUDAGraph()
        self._waits: list[AwaitedFlag] = []
        stream.device.captured_waits = self._waits
        try:
            with torch.cuda.graph(self._graph, stream=external(stream), capture_error_mode="thread_local"):
                work()
        finally:
            stream.device.captured_waits = None

    def replay(self, *, stream: Stream) -> None:
        """Launch the graph."""
        import torch

        assert self._graph is not None, "the graph was closed"
        assert isinstance(stream, CudaStream)
        position = stream.advance()
        with torch.cuda.stream(external(stream)):
            self._graph.replay()
        for flag in self._waits:
            stream.device.watch.add(stream, position, flag)

    def close(self) -> None:
        """Free the graph and the memory that torch keeps for it."""
        if self._graph is not None:
            self._graph.reset()
            self._graph = None


def external(stream: CudaStream) -> "torch.cuda.Stream":
    """Give torch's view of a stream."""
    import torch

    return torch.cuda.ExternalStream(stream.handle, device=stream.device.torch_device)  # type: ignore[no-untyped-call]
