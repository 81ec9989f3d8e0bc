"""Streams and events of the CPU: worker threads with CUDA's rules of order."""

import threading
import time
from abc import abstractmethod
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from queue import SimpleQueue

from dejavu.device.base import DEFAULT_DEADLINE_S, DeviceError, Event, Stream
from dejavu.device.cpu_memory import SharedMemory
from dejavu.device.flags import Flag
from dejavu.errors import DeadlineError

Job = Callable[[], None]
CANCEL_POLL_S = 0.02  # how soon a stream that waits for another one's event sees that it was cancelled


class Mark:
    """Hold one recording of an event: reached or not, when, and the error of the stream that it was made in."""

    __slots__ = ("_reached", "error", "time_s")

    def __init__(self) -> None:
        self._reached = threading.Event()
        self.error: Exception | None = None
        self.time_s = float("nan")

    def reach(self, error: Exception | None) -> None:
        """Let everybody who waits go on."""
        self.error = error
        self.time_s = time.perf_counter()
        self._reached.set()

    @property
    def is_sound(self) -> bool:
        """Say whether the mark is reached, without an error."""
        return self._reached.is_set() and self.error is None

    def query(self) -> bool:
        """Say whether the mark is reached; raises the stream's error."""
        if not self._reached.is_set():
            return False
        if self.error is not None:
            raise self.error
        return True

    def wait(self, deadline_s: float | None) -> None:
        """Block until the mark is reached; raises the stream's error, or DeadlineError."""
        if not self._reached.wait(deadline_s):
            raise DeadlineError(f"an event was not reached within {deadline_s} s: a peer has stopped, or is slow")
        self.query()

    def settle(self) -> None:
        """Block until the mark is reached, whatever happened before it."""
        self._reached.wait()

    def follow(self, stream: "CpuStream") -> None:
        """Block the worker of `stream` until the mark is reached; the error of the other stream becomes its own."""
        while not self._reached.wait(CANCEL_POLL_S):
            stream.check()
        self.query()


Entry = tuple["Job | Mark", tuple[object, ...]]


class CpuStream(Stream):
    """Hold what both kinds of CPU stream share: the sticky error."""

    __slots__ = ("error", "name")

    def __init__(self, name: str) -> None:
        self.name = name
        self.error: Exception | None = None

    @property
    def handle(self) -> int:
        """Give 0: there is no CUDA stream."""
        return 0

    def check(self) -> None:
        """Raise the error that this stream has, if any."""
        if self.error is not None:
            raise self.error

    def cancel(self, error: Exception) -> None:
        """Give the stream its error; waits look for it."""
        if self.error is None:
            self.error = error

    @abstractmethod
    def submit(self, job: Job, held: tuple[object, ...] = ()) -> None:
        """Queue a job, or do it; `held` is what must stay alive until it is done."""

    @abstractmethod
    def mark(self, mark: Mark) -> None:
        """Queue the reaching of a mark, which happens after an error too."""


class InlineStream(CpuStream):
    """Be the calling thread: work is done before the call returns, and its errors are raised by the call."""

    __slots__ = ()

    def submit(self, job: Job, held: tuple[object, ...] = ()) -> None:
        """Do the job."""
        job()

    def mark(self, mark: Mark) -> None:
        """Reach the mark."""
        mark.reach(None)

    def cancel(self, error: Exception) -> None:
        """Do nothing: nothing is queued, and errors here belong to the call that they were raised by."""

    def renew(self) -> None:
        """Do nothing: nothing is queued, and no error is kept."""

    def query(self) -> bool:
        """Give True: nothing is ever queued."""
        return True

    def synchronize(self, deadline_s: float | None = None) -> None:
        """Return at once: nothing is ever queued."""

    def close(self) -> None:
        """Do nothing: the thread is the caller's."""


class ThreadStream(CpuStream):
    """Run jobs on one worker thread, which the first job starts."""

    __slots__ = (
        "__weakref__",
        "_batch",
        "_closing",
        "_entries",
        "_lock",
        "_num_done",
        "_num_put",
        "_on_close",
        "_thread",
    )

    def __init__(self, name: str, on_close: Callable[["ThreadStream"], None]) -> None:
        super().__init__(name)
        self._entries: SimpleQueue[list[Entry] | None] = SimpleQueue()  # None ends the worker
        self._batch: list[Entry] | None = None  # what is held back within `together`
        self._lock = threading.Lock()  # among those who put
        self._num_put = self._num_done = 0
        self._thread: threading.Thread | None = None
        self._closing = False
        self._on_close = on_close

    def submit(self, job: Job, held: tuple[object, ...] = ()) -> None:
        """Queue a job; after an error it is dropped when its turn comes."""
        self._put((job, held))

    def mark(self, mark: Mark) -> None:
        """Queue the reaching of a mark; on an idle stream it is reached at once, and no thread woken for it."""
        with self._lock:
            is_idle = not self._closing and self._num_done == self._num_put
            if is_idle:
                mark.reach(self.error)
        if not is_idle:
            self._put((mark, ()))

    @contextmanager
    def together(self) -> Iterator[None]:
        """Hold entries back until the end."""
        with self._lock:
            is_outermost = self._batch is None
            if is_outermost:
                self._batch = []
        try:
            yield
        finally:
            with self._lock:
                if is_outermost and self._batch is not None:
                    entries, self._batch = self._batch, None
                    self._queue(entries)

    def renew(self) -> None:
        """Let the worker drop what is queued behind an error, and forget that."""
        mark = Mark()
        self.mark(mark)
        mark.settle()
        self.error = None

    def query(self) -> bool:
        """Say whether all work is done; raises the stream's error."""
        idle = self._num_done == self._num_put
        self.check()
        return idle

    def synchronize(self, deadline_s: float | None = None) -> None:
        """Block until the work queued up to now is done."""
        if not self.query():
            mark = Mark()
            self.mark(mark)
            mark.wait(deadline_s)

    def close(self) -> None:
        """Let the worker finish what is queued, and join it."""
        with self._lock:
            self._closing = True
        if self._thread is not None:
            self._entries.put(None)
            self._thread.join()
            self._thread = None
        self._on_close(self)

    def _put(self, entry: Entry) -> None:
        with self._lock:
            assert not self._closing, f"work was given to the closed stream {self.name}"
            self._num_put += 1
            if self._batch is not None:
                self._batch.append(entry)
            else:
                self._queue([entry])

    def _queue(self, entries: list[Entry]) -> None:
        if entries:
            self._entries.put(entries)
            if self._thread is None:
                self._start()

    def _start(self) -> None:
        self._thread = threading.Thread(target=self._work, name=f"stream-{self.name}", daemon=True)
        self._thread.start()

    def _work(self) -> None:
        while (entries := self._entries.get()) is not None:
            while entries:
                entry = entries.pop(0)
                self._do(entry[0])
                del entry  # what the job held is free before the next one is waited for

    def _do(self, work: "Job | Mark") -> None:
        if not isinstance(work, Mark):
            self._run(work)
        self._num_done += 1  # before a mark is reached: who waited for it finds the stream idle
        if isinstance(work, Mark):
            work.reach(self.error)

    def _run(self, job: Job) -> None:
        if self.error is not None:
            return
        try:
            job()
        except Exception as error:  # it is raised to whoever synchronises: the worker has no caller
            self.cancel(error)


class CpuEvent(Event):
    """Mark points of CPU streams of this process."""

    __slots__ = ("_mark", "_timing")

    def __init__(self, *, timing: bool) -> None:
        self._timing = timing
        self._mark: Mark | None = None

    def record(self, stream: Stream) -> None:
        """Queue a new mark."""
        assert isinstance(stream, CpuStream)
        self._mark = Mark()
        stream.mark(self._mark)

    def wait(self, stream: Stream) -> None:
        """Queue the wait for the mark made last."""
        assert isinstance(stream, CpuStream)
        mark = self._mark
        if mark is not None and not mark.is_sound:
            stream.submit(lambda: mark.follow(stream))

    def query(self) -> bool:
        """Say whether the mark has been reached."""
        return self._mark is None or self._mark.query()

    def synchronize(self, deadline_s: float | None = None) -> None:
        """Block until the mark is reached."""
        if self._mark is not None:
            self._mark.wait(deadline_s)

    def elapsed_ms(self, start: Event) -> float:
        """Give the time between two marks."""
        assert isinstance(start, CpuEvent)
        return (self._time_s() - start._time_s()) * 1e3

    def _time_s(self) -> float:
        assert self._timing, "elapsed_ms needs events made with timing"
        assert self._mark is not None, "elapsed_ms needs events that were recorded"
        return self._mark.time_s

    def ipc_handle(self) -> bytes:
        """Refuse: this event was made for one process."""
        raise DeviceError("this event has no handle: make it with interprocess=True")

    def close(self) -> None:
        """Forget the mark."""
        self._mark = None


class SharedEvent(Event):
    """Mark points of a CPU stream for other processes: two counters in shared memory, recorded and reached."""

    __slots__ = ("_memory", "_reached", "_recorded")

    def __init__(self, memory: SharedMemory) -> None:
        self._memory = memory
        self._recorded = Flag(memory.address)
        self._reached = Flag(memory.address + 4)

    def record(self, stream: Stream) -> None:
        """Queue the next mark; only the process that made the event does this."""
        assert isinstance(stream, CpuStream)
        count = self._recorded.read() + 1
        self._recorded.write(count)
        stream.submit(lambda: self._reached.write(count), (self._memory.held,))

    def wait(self, stream: Stream) -> None:
        """Queue the wait for the mark made last."""
        assert isinstance(stream, CpuStream)
        count = self._recorded.read()
        stream.submit(lambda: self._reached.wait(count, DEFAULT_DEADLINE_S, stream.check), (self._memory.held,))

    def query(self) -> bool:
        """Say whether the mark made last has been reached."""
        return self._reached.passed(self._recorded.read())

    def synchronize(self, deadline_s: float | None = None) -> None:
        """Block until the mark made last is reached."""
        self._reached.wait(self._recorded.read(), deadline_s)

    def elapsed_ms(self, start: Event) -> float:
        """Refuse: an interprocess event keeps no time, as in CUDA."""
        raise AssertionError("an interprocess event keeps no time")

    def ipc_handle(self) -> bytes:
        """Give the handle of the counters' memory."""
        return self._memory.ipc_handle()

    def close(self) -> None:
        """Unmap the counters."""
        self._memory.close()
