"""One time line for a run: every rank counts seconds from the same start, on the controller's clock."""

import time
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

BOOT = Path("/proc/sys/kernel/random/boot_id")


class ClockSample(NamedTuple):
    """Hold one ping-pong: own clock when the ping left, the peer's when it answered, own when the pong came (s)."""

    sent_s: float
    remote_s: float
    received_s: float


@dataclass(frozen=True, slots=True)
class ClockOffset:
    """Say by how much the peer's clock is ahead of one's own, in seconds, and by how much that may be wrong."""

    offset_s: float
    uncertainty_s: float


def estimate_offset(samples: Iterable[ClockSample | tuple[float, float, float]]) -> ClockOffset:
    """Estimate a clock offset from ping-pongs, by the sample with the shortest round trip (Cristian, 1989).

    The peer answered somewhere within the round trip, so the error is at most half of it. Ten samples or more make
    it likely that one met no queue.
    """
    best = min((ClockSample(*sample) for sample in samples), key=lambda sample: sample.received_s - sample.sent_s)
    assert best.received_s >= best.sent_s, "a pong arrived before its ping left: the samples mix clocks"
    return ClockOffset(best.remote_s - (best.sent_s + best.received_s) / 2, (best.received_s - best.sent_s) / 2)


@dataclass(frozen=True, slots=True)
class RunClock:
    """Count seconds after the run's start; `origin_s` is that start on this process's monotonic clock.

    Linux's monotonic clock is one for all processes of a host, so ranks beside the controller need no offset.
    """

    origin_s: float

    @classmethod
    def start(cls) -> "RunClock":
        """Make this moment the run's start; called by the controller, which sends its `origin_s` to the others."""
        return cls(time.monotonic())

    def describe(self) -> tuple[float, float, str]:
        """Give what `resume` needs: the origin on both clocks, and which start of a host the first of them is of."""
        return self.origin_s, time.time() - self.now_s(), boot_id()

    @classmethod
    def resume(cls, origin_s: float, wall_s: float, boot: str, latest_s: float) -> "RunClock":
        """Go on with a run's clock. Where the host was started since, or is another one, by the wall clock.

        That may have been set back: what happened after `latest_s` is not before it.
        """
        if boot == boot_id():
            return cls(origin_s)
        return cls(time.monotonic() - max(latest_s, time.time() - wall_s))

    @classmethod
    def join(cls, controller_origin_s: float, controller: ClockOffset | None = None) -> "RunClock":
        """Count from the controller's start; `controller` is its clock's offset, measured from this process."""
        return cls(controller_origin_s - (controller.offset_s if controller else 0.0))

    def now_s(self) -> float:
        """Give the seconds since the run's start; negative before it."""
        return time.monotonic() - self.origin_s

    def at_s(self, monotonic_s: float) -> float:
        """Turn a moment of `time.monotonic()` of this process into seconds after the run's start."""
        return monotonic_s - self.origin_s


def boot_id() -> str:
    """Give the name of this start of the host, since which its monotonic clock counts."""
    return BOOT.read_text().strip()
