"""When a stream reached a point of its work, on the run's clock: at once on a CPU, told by events on a GPU."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

from dejavu.device.base import Device, Event

NEW_BASE_S = 5.0  # an event's distance from another is told in float32 milliseconds: stay near


class Mark(Protocol):
    """A point of the compute stream's work."""

    @property
    def reached(self) -> bool:
        """Tell whether the stream has come there; never blocks. Raises the stream's error, if it had one."""

    def settle(self) -> float:
        """Give the time at which it was reached, in seconds of the run's clock; called once, when it is."""


class Timeline(Protocol):
    """Mark points of the compute stream's work."""

    def mark(self) -> Mark:
        """Mark the end of all work that the stream has now."""


@dataclass(frozen=True, slots=True)
class HostMark:
    """Hold a time: on a CPU, work is done when the call that does it returns."""

    time_s: float
    reached: bool = True

    def settle(self) -> float:
        """Give the time."""
        return self.time_s


@dataclass(frozen=True, slots=True)
class HostTimeline:
    """Mark points by reading the clock."""

    now_s: Callable[[], float]

    def mark(self) -> HostMark:
        """Read the clock."""
        return HostMark(self.now_s())


@dataclass(frozen=True, slots=True)
class DeviceMark:
    """Follow one event; it goes back to the time line when its time was asked for."""

    timeline: "DeviceTimeline"
    event: Event

    @property
    def reached(self) -> bool:
        """Ask the event."""
        return self.event.query()

    def settle(self) -> float:
        """Give the event's time, and use the event again."""
        return self.timeline.settle(self.event)


class DeviceTimeline:
    """Mark points by events of the device's compute stream, which the calling thread must have made current.

    An event's time is that of a base event plus what lies between the two. The base is taken while the stream is idle,
    then handed on from event to event; nothing that is seen lies in the future, which bounds the two clocks' drift.
    """

    def __init__(self, device: Device, now_s: Callable[[], float]) -> None:
        self.device = device
        self.stream = device.compute_stream
        self.now_s = now_s
        self.idle: list[Event] = []
        self.base = self.event()
        self.base.record(self.stream)
        self.base.synchronize()
        self.base_s = now_s()

    def event(self) -> Event:
        """Take an event that is free, or make one."""
        return self.idle.pop() if self.idle else self.device.create_event(timing=True)

    def mark(self) -> DeviceMark:
        """Record an event."""
        event = self.event()
        event.record(self.stream)
        return DeviceMark(self, event)

    def settle(self, event: Event) -> float:
        """Give the time of an event that was reached; a late one becomes the next base."""
        since_s = event.elapsed_ms(self.base) / 1e3
        self.base_s -= max(0.0, self.base_s + since_s - self.now_s())
        time_s = self.base_s + since_s
        if since_s > NEW_BASE_S:
            self.base, self.base_s, event = event, time_s, self.base
        self.idle.append(event)
        return time_s
