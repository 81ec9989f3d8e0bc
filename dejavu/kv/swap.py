"""Move parts of rows between the KV pool on the device and a larger one in host memory, which has all rows.

Both pools have one layout and one block size, so whole blocks move in one piece each, and a part of a block in two
pieces a layer. Two lanes, one each way, so that both directions of the link are used at once:

    compute  | pass i           | pass i+1         | pass i+2 ...
    fetch    | microbatch i+1   |  i+2 (waits for i's flush)
    flush                       | pass i's new tokens |

What a lane has moved is timed on the device, and known when somebody looks.
"""

import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal, Protocol

import numpy as np

from dejavu.device.base import Buffer, Closing, Device, Event, Stream
from dejavu.device.cpu_stream import CpuStream
from dejavu.device.pieces import Pieces
from dejavu.kv.layout import Ints, PoolLayout, cut
from dejavu.transport.carrier import Gathering
from dejavu.transport.staging import move

NEW_ORIGIN_S = 5.0  # a device tells the time between two events in float32 milliseconds: keep them near

Direction = Literal["fetch", "flush"]


@dataclass(frozen=True, slots=True)
class Part:
    """Name tokens [start, stop) of a row; `host` and `device` are its blocks in either pool, the first has token 0."""

    host: Sequence[int]
    device: Sequence[int]
    start: int
    stop: int

    @property
    def num_tokens(self) -> int:
        """Count the tokens."""
        return self.stop - self.start


def count_tokens(parts: Sequence[Part]) -> int:
    """Count the tokens of all parts."""
    return sum(part.num_tokens for part in parts)


def pair_parts(layout: PoolLayout, parts: Sequence[Part]) -> Pieces:
    """List parts as pieces from the device's pool (source) to the host's (target), which differ in their blocks only.

    Whole blocks are one piece each; of other blocks, the tokens of each plane.
    """
    size = layout.block_size
    bounds = np.array([(part.start, part.stop) for part in parts], dtype=np.int64).reshape(-1, 2)
    owner, start, stop = cut(bounds[:, 0], bounds[:, 1], size)
    index = start // size
    source = find_blocks([part.device for part in parts], owner, index) * layout.block_bytes
    target = find_blocks([part.host for part in parts], owner, index) * layout.block_bytes
    whole = stop - start == size
    rest = ~whole
    shift = ((start[rest] % size) * layout.token_bytes)[:, None] + layout.plane_bytes * np.arange(2 * layout.num_layers)
    nbytes = np.repeat((stop - start)[rest] * layout.token_bytes, 2 * layout.num_layers)
    return Pieces(
        np.concatenate([source[whole], (source[rest][:, None] + shift).ravel()]),
        np.concatenate([target[whole], (target[rest][:, None] + shift).ravel()]),
        np.concatenate([np.full(np.count_nonzero(whole), layout.block_bytes), nbytes]),
    )


def find_blocks(tables: Sequence[Sequence[int]], owner: Ints, index: Ints) -> Ints:
    """Give block `index[i]` of table `owner[i]`: of a token step, one of each table."""
    pairs = zip(owner.tolist(), index.tolist(), strict=True)
    return np.array([tables[table][place] for table, place in pairs], dtype=np.int64)


class Link(Protocol):
    """Carry parts between the two pools."""

    bytes_per_token: int

    def carry(self, direction: Direction, parts: Sequence[Part], stream: Stream) -> None:
        """Queue the copies of parts, of which there is at least one."""


class PoolLink:
    """Copy parts between two pools by copy engines.

    A kernel moves the short pieces of a token step as fast, and meanwhile keeps the next step from its multiprocessors:
    on an H200 that step took 45 µs longer, whatever else was moved.
    """

    def __init__(self, device: Device, layout: PoolLayout, on_device: Buffer, on_host: Buffer) -> None:
        """Take the memory of both pools; they stay the caller's. `layout` is either's."""
        self.device = device
        self.layout = layout
        self.on_device = on_device
        self.on_host = on_host
        self.bytes_per_token = layout.bytes_per_token

    def carry(self, direction: Direction, parts: Sequence[Part], stream: Stream) -> None:
        """Queue the copies."""
        pieces, target, source = pair_parts(self.layout, parts), self.on_host, self.on_device
        if direction == "fetch":
            pieces, target, source = pieces.inverse, source, target
        move(self.device, target, source, pieces, Gathering.PACKED, stream=stream, beside_compute=True)


class SimulatedLink:
    """Take the time that parts would take over a link, each way by itself, without any memory; on a CPU."""

    def __init__(self, bytes_per_token: int, bandwidth: float) -> None:
        """`bandwidth` is one direction's, bytes/s."""
        self.bytes_per_token = bytes_per_token
        self.bandwidth = bandwidth

    def carry(self, direction: Direction, parts: Sequence[Part], stream: Stream) -> None:
        """Queue a sleep."""
        assert isinstance(stream, CpuStream)
        seconds = count_tokens(parts) * self.bytes_per_token / self.bandwidth
        stream.submit(lambda: time.sleep(seconds))


@dataclass(frozen=True, slots=True)
class Moved:
    """Tell of one pass's bytes one way; seconds of `time.monotonic`."""

    direction: Direction
    nbytes: int
    start_s: float
    end_s: float


@dataclass(slots=True)
class Moving:
    """Hold bytes on their way, between two events; `landed` is called when somebody sees that they are there."""

    direction: Direction
    nbytes: int
    start: Event
    end: Event
    landed: Callable[[], None] | None


def is_sound(mark: Event) -> bool:
    """Tell whether a mark is reached, and what is before it not void."""
    try:
        return mark.query()
    except Exception:  # its stream's, which has been raised where it was met
        return False


class Lanes(Closing):
    """Own a stream for each direction, and time what they move."""

    def __init__(self, device: Device, link: Link) -> None:
        self.device = device
        self.link = link
        self.fetch_stream = device.create_stream("swap-fetch")
        self.flush_stream = device.create_stream("swap-flush")
        self.moved: list[Moved] = []
        self._moving: dict[Direction, deque[Moving]] = {"fetch": deque(), "flush": deque()}
        self._timers: list[Event] = []  # that nobody needs any more
        self._origin = device.create_event(timing=True)
        self._origin.record(self.fetch_stream)
        self._origin.synchronize()
        self.origin_s = time.monotonic()

    def run(
        self,
        direction: Direction,
        parts: Sequence[Part],
        after: Sequence[Event],
        arrived: Event,
        landed: Callable[[], None] | None = None,
    ) -> None:
        """Move parts behind the marks that `after` has now, and mark their arrival; only the mark without parts.

        `landed` is called from `look` when they have arrived, for each direction in the order of these calls.
        """
        stream = self.fetch_stream if direction == "fetch" else self.flush_stream
        for event in after:
            event.wait(stream)
        if parts:
            start = self.mark(stream)
            self.link.carry(direction, parts, stream)
            nbytes = count_tokens(parts) * self.link.bytes_per_token
            self._moving[direction].append(Moving(direction, nbytes, start, self.mark(stream), landed))
        arrived.record(stream)

    def mark(self, stream: Stream) -> Event:
        """Take the time at which a stream gets here; `recycle` the event."""
        timer = self._timers.pop() if self._timers else self.device.create_event(timing=True)
        timer.record(stream)
        return timer

    def recycle(self, *timers: Event) -> None:
        """Take events back, whose times have been read."""
        self._timers += timers

    def look(self) -> None:
        """Note what has been moved since; raises the error of a copy that failed."""
        for moving in self._moving.values():
            while moving and moving[0].end.query():
                self._note(moving.popleft())

    @property
    def is_flushing(self) -> bool:
        """Tell whether there is a flush of which `look` has not seen the end."""
        return bool(self._moving["flush"])

    def settle(self) -> None:
        """Wait for all that is on its way, and note it."""
        self.fetch_stream.synchronize()
        self.flush_stream.synchronize()
        self.look()

    def close(self) -> None:
        """Finish what is on its way, note what of it is sound, and give streams and events back."""
        self.fetch_stream.close()
        self.flush_stream.close()
        for queue in self._moving.values():
            while queue and is_sound(queue[0].end):
                self._note(queue.popleft())
        for moving in (*self._moving["fetch"], *self._moving["flush"]):
            self.recycle(moving.start, moving.end)
        for event in (self._origin, *self._timers):
            event.close()

    def _note(self, moving: Moving) -> None:
        start_s, end_s = (self.origin_s + event.elapsed_ms(self._origin) / 1e3 for event in (moving.start, moving.end))
        self.moved.append(Moved(moving.direction, moving.nbytes, start_s, end_s))
        if moving.landed is not None:
            moving.landed()
        latest = moving.end
        if end_s - self.origin_s > NEW_ORIGIN_S:
            self._origin, self.origin_s, latest = latest, end_s, self._origin
        self.recycle(moving.start, latest)
