"""The two sides of an `ipc` transfer: a receive ends by a flag that the sender writes, a send by its copies."""

import threading
import time
from collections.abc import Callable

from dejavu.device.base import FLAG_BYTES, Buffer, Event, Stream
from dejavu.device.flags import Flag
from dejavu.device.pieces import Pieces
from dejavu.errors import DeadlineError, TransferError
from dejavu.transport.carrier import DEFAULT_DEADLINE_S, Transfer
from dejavu.transport.lanes import Lanes, LaneTransfer
from dejavu.transport.staging import wrap

SPIN_S = 2e-4
SHORTEST_SLEEP_S, LONGEST_SLEEP_S = 2e-5, 1e-3


WORD_BYTES = 2 * FLAG_BYTES


class Word:
    """Be two flags of this rank that a peer writes, one after the other, both with the same value.

    The host reads the first one, and streams wait for the second: cancelling a CUDA stream writes the flags that it
    waits for, so what streams wait for does not prove that a message has arrived. `value` is the next receive's.
    """

    __slots__ = ("arrived", "gate", "index", "value")

    def __init__(self, words: Buffer, index: int) -> None:
        self.index = index
        arrived, self.gate = flags_of(words, index)
        self.arrived = Flag(arrived.address)
        self.value = 1


def flags_of(words: Buffer, index: int) -> tuple[Buffer, Buffer]:
    """Give the two flags of a word: for the host, and for streams."""
    at = index * WORD_BYTES
    return words.view(at, FLAG_BYTES), words.view(at + FLAG_BYTES, FLAG_BYTES)


class IpcReceive(Transfer):
    """Follow a message that a peer stores into memory of this rank."""

    def __init__(self, lanes: Lanes, number: int, peer: int, word: Word, held: tuple[Buffer, Pieces]) -> None:
        """`lanes` lends the streams that wait for flags."""
        self.nbytes = held[1].total_bytes
        self.number = number
        self.peer = peer
        self.is_cancelled = False
        self.on_cancel: Callable[[IpcReceive], None] | None = None
        self.on_end: Callable[[Word], None] | None = None
        self._lanes = lanes
        self._device = lanes.device
        self._word = word
        self._value = word.value
        self._held: object = held
        self._error: TransferError | None = None
        self._ordered: list[Stream] = []
        self._passing: LaneTransfer | None = None  # the lane at the gate, whose event other streams wait for
        self._has_ended = False
        self._lock = threading.RLock()

    @property
    def moved_bytes(self) -> int:
        """Give all or nothing: the flag is all that this side sees."""
        return self.nbytes if self.done and self._error is None else 0

    @property
    def done(self) -> bool:
        """Look at the flag."""
        if not self._has_ended and not self.is_cancelled and self._word.arrived.passed(self._value):
            self.finish(None)
        return self._has_ended

    @property
    def error(self) -> TransferError | None:
        """Give what the receive failed with."""
        return self._error if self.done else None

    def wait(self, deadline_s: float | None = DEFAULT_DEADLINE_S) -> None:
        """Sleep until the flag is written, or the receive fails."""
        if self._device.properties.kind == "cpu" and not self.is_cancelled and not self.done:
            self._sleep_at_flag(deadline_s)
        start_s = time.monotonic()
        while not self.done:
            _pause(time.monotonic() - start_s, deadline_s, self.nbytes)
        if self._error is not None:
            raise self._error

    def order(self, stream: Stream, deadline_s: float | None = DEFAULT_DEADLINE_S) -> None:
        """Queue a wait for the flag. An error is raised here, or given to `stream`."""
        if self._device.properties.kind == "cpu":
            self._order_at_gate(stream, deadline_s)
        else:
            self._order_behind_lane(stream, deadline_s)
        if self.done and self._error is not None:
            raise self._error

    def _order_at_gate(self, stream: Stream, deadline_s: float | None) -> None:
        with self._lock:
            is_open = not self._has_ended
            if is_open:
                self._ordered.append(stream)
        if is_open:
            self._device.wait_flag(self._word.gate, self._value, stream=stream, deadline_s=deadline_s)

    def _order_behind_lane(self, stream: Stream, deadline_s: float | None) -> None:
        """Have a lane wait at the gate, once, and `stream` for the lane: only this carrier cancels the lane.

        The deadline of the first stream that waits is that of all.
        """

        def work(lane: Stream) -> None:
            self._device.wait_flag(self._word.gate, self._value, stream=lane, deadline_s=deadline_s)

        with self._lock:
            if not self._has_ended:
                if self._passing is None:
                    self._passing = self._lanes.run(0, None, work, None)
                self._passing.order(stream)

    def cancel(self) -> None:
        """Ask the peer to keep off; the receive ends when it has said so, or is dead."""
        if not self.done and not self.is_cancelled and self.on_cancel is not None:
            self.is_cancelled = True
            self.on_cancel(self)

    def finish(self, error: BaseException | None) -> None:
        """End the receive: the peer writes nothing any more. What has arrived in full stays good."""
        with self._lock:
            if self._has_ended:
                return
            if error is not None and (self.is_cancelled or not self._word.arrived.passed(self._value)):
                self._error = wrap(error)
                if self._passing is not None:
                    self._passing.fail(self._error)
                for stream in self._ordered:
                    stream.cancel(self._error)
                Flag(self._word.gate.address).write(self._value)  # lets go who came to wait just now
            self._has_ended = True
            self._ordered.clear()
            self._held = None
        self._word.value = self._value + 1
        if self.on_end is not None:
            self.on_end(self._word)

    def _sleep_at_flag(self, deadline_s: float | None) -> None:
        def check() -> None:
            if self.is_cancelled or self._error is not None:
                raise self._error or TransferError("cancelled")

        try:
            self._word.arrived.wait(self._value, deadline_s, check)
        except TransferError:
            return
        except DeadlineError as error:
            raise late(self.nbytes, deadline_s) from error


class IpcSend(Transfer):
    """Follow a message from its posting: first it waits for the peer's place, then for its copies."""

    def __init__(self, peer: int, key: int, memory: Buffer, pieces: Pieces, ready: Event) -> None:
        self.nbytes = pieces.total_bytes
        self.peer = peer
        self.key = key
        self.memory = memory
        self.pieces = pieces
        self.ready = ready
        self.on_cancel: Callable[[IpcSend], None] | None = None
        self.on_order: Callable[[IpcSend, Stream, float | None], None] | None = None
        self._copies: LaneTransfer | None = None
        self._error: TransferError | None = None
        self._is_placed = threading.Event()  # copies are queued, or it has failed

    @property
    def moved_bytes(self) -> int:
        """Give all or nothing: the copies do not report."""
        return self.nbytes if self.done and self.error is None else 0

    @property
    def done(self) -> bool:
        """Ask the copies."""
        return self._error is not None or (self._copies is not None and self._copies.done)

    @property
    def error(self) -> TransferError | None:
        """Give what the send, or its copies, failed with."""
        return self._error or (None if self._copies is None else self._copies.error)

    def wait(self, deadline_s: float | None = DEFAULT_DEADLINE_S) -> None:
        """Sleep until there is a place, and then until the copies are done."""
        start_s = time.monotonic()
        if not self._is_placed.wait(deadline_s):
            raise late(self.nbytes, deadline_s)
        left_s = None if deadline_s is None else max(0.0, deadline_s - (time.monotonic() - start_s))
        if self._copies is not None:
            self._copies.wait(left_s)
        if self._error is not None:
            raise self._error

    def order(self, stream: Stream, deadline_s: float | None = DEFAULT_DEADLINE_S) -> None:
        """Queue a wait for the copies, also for those that are not queued yet."""
        if self._copies is None and self._error is None:
            assert self.on_order is not None
            self.on_order(self, stream, deadline_s)
        elif self._copies is not None:
            self._copies.order(stream)
        if self.done and self._error is not None:
            raise self._error

    def cancel(self) -> None:
        """Withdraw the message, or stop its copies."""
        if not self.done and self.on_cancel is not None:
            self.on_cancel(self)

    @property
    def copies(self) -> LaneTransfer | None:
        """Give the copies, once there is a place for them."""
        return self._copies

    def start(self, copies: LaneTransfer) -> None:
        """Follow the copies from now on."""
        self._copies = copies
        self._is_placed.set()

    def fail(self, error: BaseException) -> None:
        """End the send with an error; its copies, if there are any, have ended."""
        if self._error is None:
            self._error = wrap(error)
        self._is_placed.set()


def late(nbytes: int, deadline_s: float | None) -> DeadlineError:
    """Make the error of a wait that took too long."""
    return DeadlineError(
        f"a transfer of {nbytes} bytes did not end within {deadline_s} s: "
        "its peer has not posted the other side, has stopped, or is slow"
    )


def _pause(waited_s: float, deadline_s: float | None, nbytes: int) -> None:
    if deadline_s is not None and waited_s > deadline_s:
        raise late(nbytes, deadline_s)
    if waited_s > SPIN_S:
        time.sleep(min(LONGEST_SLEEP_S, max(SHORTEST_SLEEP_S, waited_s / 16)))
