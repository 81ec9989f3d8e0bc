"""Account for the processor time of one process, to show that waiting ranks wait without spinning."""

import time
from dataclasses import dataclass, field


@dataclass(frozen=True, slots=True)
class CpuUsage:
    """Hold the CPU seconds that all threads of a process took within a window of `window_s` seconds."""

    cpu_s: float
    window_s: float

    @property
    def core_share(self) -> float:
        """Give the share of one core that was taken: 0.05 is 5 % of a core, 2 is two whole cores."""
        return self.cpu_s / self.window_s if self.window_s > 0 else 0.0


@dataclass(slots=True)
class CpuMeter:
    """Measure this process's CPU time from now on, children apart."""

    _cpu_s: float = field(default_factory=time.process_time)
    _wall_s: float = field(default_factory=time.monotonic)

    def read(self) -> CpuUsage:
        """Give what was taken since the meter was made or last reset."""
        return CpuUsage(time.process_time() - self._cpu_s, time.monotonic() - self._wall_s)

    def reset(self) -> None:
        """Begin a new window."""
        self._cpu_s, self._wall_s = time.process_time(), time.monotonic()
