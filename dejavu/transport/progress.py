"""Transfers that the host brings to their end: a thread advances them, streams wait at gates."""

import inspect
import threading
import time
from collections.abc import Callable, Generator

from dejavu.device.base import FLAG_BYTES, Buffer, Closing, Device, Stream
from dejavu.device.flags import Flag
from dejavu.errors import DeadlineError, TransferError
from dejavu.transport.carrier import DEFAULT_DEADLINE_S, Transfer
from dejavu.transport.staging import cancelled, wrap

SHORTEST_PAUSE_S, LONGEST_PAUSE_S = 50e-6, 2e-3

Steps = Generator[bool, None, None]  # yields whether it has moved on since the last time; ends when the work is done


class Gate:
    """Hold back streams until the host opens it: a value that a flag word has not reached yet."""

    __slots__ = ("flag", "value", "word")

    def __init__(self, word: Buffer) -> None:
        self.word = word
        self.flag = Flag(word.address)
        self.value = 1


class Gates(Closing):
    """Lend gates in pinned host memory, each for one wait of one stream: cancelling a CUDA stream opens its gates.

    A word's values only grow, so that a late wait of an earlier one passes.
    """

    BLOCK_BYTES = 4096

    def __init__(self, device: Device) -> None:
        self.device = device
        self._blocks: list[Buffer] = []
        self._free: list[Gate] = []
        self._lock = threading.Lock()

    def take(self) -> Gate:
        """Give a closed gate."""
        with self._lock:
            if not self._free:
                self._grow()
            return self._free.pop()

    def open(self, gate: Gate) -> None:
        """Let the streams go on, and take the gate back."""
        gate.flag.write(gate.value)
        gate.value += 1
        with self._lock:
            self._free.append(gate)

    def release(self, waiting: list[tuple[Gate, Stream]], error: TransferError | None) -> None:
        """Let streams go on, each at its own gate; with an error where there is one."""
        for gate, stream in waiting:
            if error is not None:
                stream.cancel(error)
            self.open(gate)

    def close(self) -> None:
        """Free the words; no stream waits for one."""
        self._free.clear()
        while self._blocks:
            self._blocks.pop().close()

    def _grow(self) -> None:
        block = self.device.allocate_host_exportable(self.BLOCK_BYTES)  # zeroed
        self._blocks.append(block)
        self._free = [Gate(block.view(at, FLAG_BYTES)) for at in range(0, self.BLOCK_BYTES, FLAG_BYTES)]


class HostTransfer(Transfer):
    """Follow work that the host brings to its end: a thread calls `advanced`, and `finish` once."""

    def __init__(self, nbytes: int, gates: Gates) -> None:
        self.nbytes = nbytes
        self.is_cancelled = False
        self.wake: Callable[[], None] | None = None  # called after a cancel
        self.device = gates.device
        self._gates = gates
        self._ordered: list[tuple[Gate, Stream]] = []
        self._moved = 0
        self._error: TransferError | None = None
        self._ended = threading.Event()
        self._lock = threading.Lock()

    @property
    def moved_bytes(self) -> int:
        """Give what has been reported."""
        return self._moved

    @property
    def done(self) -> bool:
        """Tell whether `finish` was called."""
        return self._ended.is_set()

    @property
    def error(self) -> TransferError | None:
        """Give what `finish` was given."""
        return self._error

    def wait(self, deadline_s: float | None = DEFAULT_DEADLINE_S) -> None:
        """Sleep until the end."""
        if not self._ended.wait(deadline_s):
            raise DeadlineError(
                f"a transfer of {self.nbytes} bytes has moved {self._moved} in {deadline_s} s: "
                "its peer has not posted the other side, has stopped, or is slow"
            )
        if self._error is not None:
            raise self._error

    def order(self, stream: Stream, deadline_s: float | None = DEFAULT_DEADLINE_S) -> None:
        """Queue a wait for a flag, which the end writes. An error is raised here, or given to `stream`."""
        with self._lock:
            gate = None if self._ended.is_set() else self._gates.take()
            if gate is not None:
                self._ordered.append((gate, stream))
                word, value = gate.word, gate.value
        if gate is not None:
            self.device.wait_flag(word, value, stream=stream, deadline_s=deadline_s)
        if self.done and self._error is not None:
            raise self._error

    def cancel(self) -> None:
        """Ask for the end, which comes when nothing uses the memory any more."""
        self.is_cancelled = True
        if self.wake is not None:
            self.wake()

    def advanced(self, nbytes: int) -> None:
        """Count bytes that have arrived."""
        self._moved += nbytes

    def finish(self, error: BaseException | None = None) -> None:
        """End the transfer: nothing uses its memory any more. Only the first call counts."""
        with self._lock:
            if self._ended.is_set():
                return
            if error is None:
                self._moved = self.nbytes
            else:
                self._error = wrap(error)
            self._ended.set()
            self._gates.release(self._ordered, self._error)
            self._ordered = []


class Progress(Closing):
    """Advance transfers on one thread: each is a generator that does what it can without blocking, and yields.

    The thread sleeps without a limit when there is nothing to advance, and for growing pauses while all of them wait
    for something. A cancelled transfer's generator gets the error thrown in; it may go on yielding while it withdraws
    from what it has started, and then raises.
    """

    def __init__(self, name: str) -> None:
        self._name = name
        self._tasks: list[tuple[HostTransfer, Steps]] = []
        self._wake = threading.Condition()
        self._thread: threading.Thread | None = None
        self._is_closing = False

    def start(self, transfer: HostTransfer, steps: Steps) -> None:
        """Advance `steps` from now on, and finish `transfer` when they end or raise."""
        transfer.wake = self.wake
        with self._wake:
            assert not self._is_closing, "the carrier was closed"
            self._tasks.append((transfer, steps))
            if self._thread is None:
                self._thread = threading.Thread(
                    target=self._run, args=(transfer.device,), name=f"carrier-{self._name}", daemon=True
                )
                self._thread.start()
            self._wake.notify()

    def wake(self) -> None:
        """Look again at once: something has come."""
        with self._wake:
            self._wake.notify()

    def close(self) -> None:
        """Cancel what still runs, and end the thread."""
        with self._wake:
            self._is_closing = True
            for transfer, _ in self._tasks:
                transfer.is_cancelled = True
            self._wake.notify()
        if self._thread is not None:
            self._thread.join()
            self._thread = None

    def _run(self, device: Device) -> None:
        device.free_bytes()  # any such call makes a CUDA device current in the thread
        idle_since_s = time.monotonic()
        while self._rest(time.monotonic() - idle_since_s):
            if self._round():
                idle_since_s = time.monotonic()

    def _rest(self, idle_s: float) -> bool:
        """Sleep as long as it makes sense; False at the end."""
        with self._wake:
            while not self._tasks and not self._is_closing:
                self._wake.wait()
                idle_s = 0.0
            if idle_s > 0.0:
                self._wake.wait(min(LONGEST_PAUSE_S, max(SHORTEST_PAUSE_S, idle_s / 8)))
            return bool(self._tasks)

    def _round(self) -> bool:
        with self._wake:
            tasks = list(self._tasks)
        outcomes = [(task, _advance(*task)) for task in tasks]
        ended = [task for task, moved in outcomes if moved is None]
        if ended:
            with self._wake:
                self._tasks = [task for task in self._tasks if task not in ended]
        return any(moved is not False for _, moved in outcomes)


def _advance(transfer: HostTransfer, steps: Steps) -> bool | None:
    """Take one step: whether it moved on, or None at the end."""
    try:
        if transfer.is_cancelled:
            transfer.is_cancelled = False
            if inspect.getgeneratorstate(steps) == inspect.GEN_CREATED:
                next(steps)  # so that it clears up after itself
            return steps.throw(cancelled())
        return next(steps)
    except StopIteration:
        transfer.finish()
    except Exception as error:  # it ends the transfer, whose caller gets it
        transfer.finish(error)
    return None


def until(ready: Callable[[], bool]) -> Steps:
    """Yield until `ready()`; for `yield from` in a transfer's steps."""
    while not ready():
        yield False
