"""Hold back what mpirun prints about a job's end: it repeats, in twenty lines, what the job reports in one."""

import re
from collections.abc import Callable
from dataclasses import dataclass, field

from dejavu.cluster.complaints import NO_DAEMON, NO_PROGRAM, NO_STEP

RULE = re.compile(r"-{60,}\s*")
NOISE = re.compile(
    r"(LAUNCHER JOB OBJECT NOT FOUND)+|\[warn\] Epoll ADD\(4\) on fd \d+ failed"  # after MPI_Comm_spawn
    r"|\[\S+\] OPAL ERROR: Not supported in file \S+dpm\.c"  # of a process whose starter has died
    r"|NBC_Progress: an error \d+ was found|Error in NBC_Start_round"  # a barrier that a death ends, as the ranks know
    r"|\[\S+\] \S+osc_ucx_component\.c:\d+\s+Error: OSC UCX component priority"  # of windows, which are not UCX's
)
MOST_LINES = 40
BOILERPLATE = (
    "MPI_ABORT was invoked",
    "exited with non-zero status",
    "non-zero exit code",
    "exited on signal",
    "prterun noticed that process rank",
    "has exited due to process rank",
    "was killed without calling",
    *(NO_DAEMON, NO_PROGRAM, NO_STEP),
    "is not tested for post-failure",  # of one-sided windows, which the program gives deadlines of its own
)


@dataclass(slots=True)
class BoilerplateFilter:
    """Withhold mpirun's known notices, each between two rules of dashes; everything else passes, in order.

    Interval: `held` is an open block, from its first rule on; it is passed as it is when it does not close soon.
    """

    held: list[str] = field(default_factory=list)
    withheld: list[str] = field(default_factory=list)

    def push(self, line: str) -> list[str]:
        """Take one line of mpirun's stderr, and give the lines to show now."""
        if NOISE.match(line):
            return []
        is_rule = RULE.fullmatch(line) is not None
        if not self.held and not is_rule:
            return [line]
        closes = is_rule and bool(self.held)
        self.held.append(line)
        return self.release() if closes or len(self.held) > MOST_LINES else []

    def release(self) -> list[str]:
        """Give the lines of the open block, unless it is one of mpirun's notices."""
        block, self.held = self.held, []
        if any(text in line for line in block for text in BOILERPLATE):
            self.withheld += block
            return []
        return block


@dataclass(slots=True)
class Lines:
    """Cut a stream of bytes into lines, without their ends; a line goes to `take` when it is complete."""

    take: Callable[[str], None]
    rest: bytes = b""

    def feed(self, data: bytes) -> None:
        """Take the next bytes; mpirun ends its notices with a zero byte, which is dropped."""
        *lines, self.rest = (self.rest + data.replace(b"\0", b"")).split(b"\n")
        for line in lines:
            self.take(decode(line))

    def flush(self) -> None:
        """Take the unfinished last line for complete, if there is one."""
        if self.rest:
            line, self.rest = self.rest, b""
            self.take(decode(line))


def decode(line: bytes) -> str:
    """Read one line of a rank's output; its terminal may end lines with a carriage return."""
    return line.decode(errors="replace").removesuffix("\r")
