"""Read what a batch system has given this process: Slurm's variables, in which mpirun finds its hosts, too."""

import re
from collections.abc import Iterator, Mapping

from dejavu.errors import UsageError

HOSTS = "SLURM_NODELIST"
SLOTS = "SLURM_TASKS_PER_NODE"
STEP_TASKS = "SLURM_STEP_NUM_TASKS"
RANK_OF_MPIRUN = "OMPI_COMM_WORLD_RANK"


def allocated_hosts(environment: Mapping[str, str]) -> list[str]:
    """Give the host of each task of a Slurm allocation, in order; nothing outside of one.

    An allocation that was made without a number of tasks has one for each host.
    """
    hosts = list(expand_hosts(environment.get(HOSTS, "")))
    slots = list(expand_counts(environment.get(SLOTS, "1")))
    slots += slots[-1:] * (len(hosts) - len(slots))
    return [host for host, count in zip(hosts, slots, strict=False) for _ in range(count)]


def check_start(environment: Mapping[str, str]) -> None:
    """Raise UsageError where srun has started this program several times: each would begin a job of its own."""
    count = environment.get(STEP_TASKS, "1")
    if count != "1" and RANK_OF_MPIRUN not in environment:
        raise UsageError(f"srun has started this {count} times: leave srun out, for mpirun starts the ranks by itself")


def expand_hosts(text: str) -> Iterator[str]:
    """Give the names of a list such as `login,node[1-2,08-10]`, numbers as wide as they are written."""
    for pattern in re.findall(r"(?:[^,\[]|\[[^\]]*\])+", text):
        yield from expand_pattern(pattern)


def expand_pattern(pattern: str) -> Iterator[str]:
    """Give the names of one part of a list, in which each pair of brackets stands for numbers."""
    before, bracket, rest = pattern.partition("[")
    if not bracket:
        yield before
        return
    ranges, _, after = rest.partition("]")
    for part in ranges.split(","):
        first, _, last = part.partition("-")
        for number in range(int(first), int(last or first) + 1):
            for end in expand_pattern(after):
                yield f"{before}{number:0{len(first)}}{end}"


def expand_counts(text: str) -> Iterator[int]:
    """Give the numbers of a list such as `5(x2),3`."""
    for part in text.split(","):
        count, _, times = part.rstrip(")").partition("(x")
        yield from [int(count)] * int(times or 1)
