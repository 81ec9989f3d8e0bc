"""Lanes: the streams of a carrier, and the transfers that are nothing but work on them."""

import threading
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from dejavu.device.base import Closing, Device, Event, Stream
from dejavu.errors import DeadlineError, TransferError
from dejavu.transport.carrier import DEFAULT_DEADLINE_S, Transfer
from dejavu.transport.staging import cancelled, wrap

MAX_LANES = 16  # streams of one direction; devices have few hardware queues


class Lane:
    """Hold one stream of a carrier and the transfers that it still has to pass."""

    __slots__ = ("running", "stream")

    def __init__(self, stream: Stream) -> None:
        self.stream = stream
        self.running: deque[LaneTransfer] = deque()

    def reap(self) -> None:
        """Forget the transfers that have ended."""
        while self.running and self.running[0].done:
            self.running.popleft()

    @property
    def is_sound(self) -> bool:
        """Tell whether the stream has had no error: one that had does none of its later work."""
        try:
            self.stream.query()
        except Exception:  # the transfers on this lane have it from their own events
            return False
        return True


class Lanes(Closing):
    """Lend the streams of one direction: an idle one, a new one up to a limit, then the one lent the longest ago.

    On CUDA all of them are made at once.

    So a transfer that waits for its producer holds up no other, as long as there are lanes.
    """

    def __init__(self, device: Device, name: str, limit: int = MAX_LANES) -> None:
        self.device = device
        self._name = name
        self._limit = limit
        self._lanes: deque[Lane] = deque()  # least recently lent first
        self._events: list[Event] = []
        if device.properties.kind != "cpu":  # making a CUDA stream may wait for the device, and it for a peer's flag
            self._lanes.extend(self._create() for _ in range(limit))
        self.lock = threading.RLock()  # taken before a transfer's

    def run(
        self,
        nbytes: int,
        after: Event | None,
        work: Callable[[Stream], None],
        held: object,
        *,
        is_short: bool = False,
    ) -> "LaneTransfer":
        """Have `work` queue its copies behind `after` on a lane, and give the transfer that follows them.

        `held` stays alive until the transfer has ended. `after` is given back to `mark`'s events. Where `after` has
        been reached, the caller does short work itself, on a CPU.
        """
        with self.lock:
            lane = Lane(self.device.compute_stream) if is_short and is_reached(after) else self._take()
            with lane.stream.together():
                if after is not None:
                    after.wait(lane.stream)
                    self._events.append(after)
                work(lane.stream)
                transfer = LaneTransfer(self, lane, nbytes, self._record(lane.stream), held)
            if not transfer.done:
                lane.running.append(transfer)
        return transfer

    def mark(self, stream: Stream) -> Event:
        """Give an event at the point that `stream` has reached with its queued work; `run` takes it back."""
        with self.lock:
            return self._record(stream)

    def recycle(self, event: Event) -> None:
        """Take back an event that nobody waits for on the host."""
        self._events.append(event)

    def close(self) -> None:
        """End what still runs, and close the streams."""
        with self.lock:
            for lane in self._lanes:
                lane.reap()
                if lane.running:
                    lane.stream.cancel(TransferError("the carrier was closed before the transfer had ended"))
                lane.stream.close()
                lane.reap()
            self._lanes.clear()
            while self._events:
                self._events.pop().close()

    def _take(self) -> Lane:
        lane = self._find_idle() or self._another()
        self._lanes.remove(lane)
        self._lanes.append(lane)
        return lane

    def _find_idle(self) -> Lane | None:
        for lane in list(self._lanes):
            lane.reap()
            if lane.running:
                continue
            if lane.is_sound:
                return lane
            self._lanes.remove(lane)
            lane.stream.close()
        return None

    def _another(self) -> Lane:
        if len(self._lanes) < self._limit:
            self._lanes.append(self._create())
            return self._lanes[-1]
        return self._lanes[0]

    def _create(self) -> Lane:
        return Lane(self.device.create_stream(self._name))

    def _record(self, stream: Stream) -> Event:
        event = self._events.pop() if self._events else self.device.create_event()
        event.record(stream)
        return event


def is_reached(event: Event | None) -> bool:
    """Tell whether what an event marks is done, and sound."""
    try:
        return event is None or event.query()
    except Exception:  # of the caller's stream, which the transfer gets where it waits for it
        return False


class LaneTransfer(Transfer):
    """Follow work that is queued on a lane: it has ended when the lane's stream has passed it."""

    def __init__(self, lanes: Lanes, lane: Lane, nbytes: int, event: Event, held: object) -> None:
        self.nbytes = nbytes
        self._lanes = lanes
        self._lane = lane
        self._event: Event | None = event
        self._held = held
        self._error: TransferError | None = None
        self._ordered: list[Stream] = []
        self._users = 0  # calls that hold the event outside the lock
        self._has_ended = False
        self._lock = threading.RLock()

    @property
    def moved_bytes(self) -> int:
        """Give all or nothing: the copies do not report."""
        return self.nbytes if self.done and self._error is None else 0

    @property
    def done(self) -> bool:
        """Ask the event."""
        with self._lock:
            if self._has_ended:
                return True
            assert self._event is not None
            try:
                if self._event.query():
                    self._end(None)
            except Exception as error:  # the stream's own error, which becomes this transfer's
                self._end(error)
            return self._has_ended

    @property
    def error(self) -> TransferError | None:
        """Give the error once the transfer has ended."""
        return self._error if self.done else None

    def wait(self, deadline_s: float | None = DEFAULT_DEADLINE_S) -> None:
        """Block until the stream has passed the work."""
        with self._using() as event:
            if event is not None:
                self._synchronize(event, deadline_s)
        if self._error is not None:
            raise self._error

    def order(self, stream: Stream, deadline_s: float | None = DEFAULT_DEADLINE_S) -> None:
        """Queue a wait for the event, which has the deadlines of what the lane waits for; raises the error of a
        transfer that has ended with one.
        """
        with self._using() as event:
            if event is not None:
                self._ordered.append(stream)
                event.wait(stream)
        if self._has_ended and self._error is not None:
            raise self._error

    def cancel(self) -> None:
        """Make the transfer end with an error; what is being copied may be copied to its end before `done`."""
        self.fail(cancelled())

    def fail(self, error: TransferError) -> None:
        """Do what `cancel` does, with an error of one's own."""
        with self._lanes.lock, self._lock:
            if self.done:
                return
            self._error = error
            if len(self._lane.running) == 1:
                self._lane.stream.cancel(self._error)
            for stream in self._ordered:
                stream.cancel(self._error)

    def _synchronize(self, event: Event, deadline_s: float | None) -> None:
        try:
            event.synchronize(deadline_s)
        except DeadlineError:
            if not self.done:
                raise
        except Exception as error:  # the stream's own error, which becomes this transfer's
            with self._lock:
                self._end(error)
        assert self.done

    def _end(self, error: Exception | None) -> None:
        if self._has_ended:
            return
        self._has_ended = True
        if self._error is None and error is not None:
            self._error = wrap(error)
        self._held = None
        self._ordered.clear()
        self._give_event()

    def _give_event(self) -> None:
        if self._has_ended and self._users == 0 and self._event is not None:
            self._lanes.recycle(self._event)
            self._event = None

    @contextmanager
    def _using(self) -> Iterator[Event | None]:
        with self._lock:
            event = None if self.done else self._event
            self._users += 1
        try:
            yield event
        finally:
            with self._lock:
                self._users -= 1
                self._give_event()
