"""Cause failures on purpose, where and when one asked for them; ranks are told by the environment."""

import json
import os
import random
import re
import signal
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from dejavu.engine.messages import Work
from dejavu.engine.ring import place_name
from dejavu.errors import UsageError
from dejavu.topology import CONTROLLER, Placement, Role, Topology

if TYPE_CHECKING:  # the command asks for failures outside mpirun, where MPI must not start
    from dejavu.engine.source import Source

FAULTS = "DEJAVU_FAULTS"
SIGNALS = {"kill": signal.SIGKILL, "stop": signal.SIGSTOP}
Kind = Literal["kill", "stop"]


@dataclass(frozen=True, slots=True)
class Fault:
    """Say which rank is to be killed or stopped, at which step or second, and with `every` again after so many.

    Or when so many tokens have been given out, of all requests.
    """

    rank: int
    kind: Kind
    step: int | None = None
    time_s: float | None = None
    every: int = 0
    loses_memory: bool = False
    tokens: int | None = None

    def is_due(self, times_done: int, step: int, now_s: float, tokens: int = 0) -> bool:
        """Tell whether it is to happen now, having happened so often."""
        if times_done and not self.every:
            return False
        if self.tokens is not None:
            return tokens >= self.tokens + times_done * self.every
        if self.step is not None:
            return step >= self.step + times_done * self.every
        assert self.time_s is not None
        return now_s >= self.time_s + times_done * self.every


def parse_fault(text: str, kind: Kind, topology: Topology, every: int = 0, *, loses_memory: bool = False) -> Fault:
    """Read WHO@WHEN, such as `token:1.0@step=40` or `controller@t=3.5`; UsageError says how it is written."""
    who, _, when = text.partition("@")
    moment = re.fullmatch(r"step=(\d+)|t=(\d+(?:\.\d+)?)|tokens=(\d+)", when)
    if not moment:
        who = who.strip() or "token:1"
        raise UsageError(f"{text!r} does not say when: write {who}@step=40, {who}@t=3.5 or {who}@tokens=500")
    step = None if moment[1] is None else int(moment[1])
    time_s = None if moment[2] is None else float(moment[2])
    tokens = None if moment[3] is None else int(moment[3])
    return Fault(find_rank(who, topology), kind, step, time_s, every, loses_memory, tokens)


def describe_fault(fault: Fault, topology: Topology) -> str:
    """Write a fault as `parse_fault` reads it."""
    who = next(names_of(topology.placements[fault.rank], topology))
    moments = {"step": fault.step, "t": fault.time_s, "tokens": fault.tokens}
    return next(f"{who}@{name}={value}" for name, value in moments.items() if value is not None)


def random_faults(
    count: int, topology: Topology, num_tokens: int, seed: int, *, loses_memory: bool = False
) -> list[Fault]:
    """Draw failures of any ranks, the controller and one spare among them, over a run that gives out so many tokens.

    One in four stops a rank, the others kill it; where they may lose memory, one in three of these does. None comes in
    the last twentieth, so that there is a run left to go on. The same arguments give the same failures.
    """
    latest = num_tokens * 19 // 20
    if count > latest:
        raise UsageError(f"{count} random failures do not fit into {num_tokens} tokens: serve more, or ask for fewer")
    draw = random.Random(f"{seed} failures")  # noqa: S311 (nothing to guess)
    num_targets = min(topology.first_spare + 1, len(topology.placements))
    faults = []
    for tokens in sorted(draw.sample(range(1, latest + 1), count)):
        kind: Kind = "stop" if draw.random() < 1 / 4 else "kill"
        loses = draw.random() < 1 / 3 and loses_memory and kind == "kill"
        faults.append(Fault(draw.randrange(num_targets), kind, loses_memory=loses, tokens=tokens))
    return faults


def find_rank(who: str, topology: Topology) -> int:
    """Give the rank that WHO names: `ROLE:STAGE`, `ROLE:STAGE.TENSOR_RANK`, `spare:N`, `controller` or `rank:N`."""
    named = {name: placement.rank for placement in topology.placements for name in names_of(placement, topology)}
    if who not in named:
        raise UsageError(f"there is no {who!r} to fail: name one of {', '.join(named)}")
    return named[who]


def names_of(placement: Placement, topology: Topology) -> Iterator[str]:
    """Give what a rank can be called."""
    if placement.role is Role.CONTROLLER:
        yield "controller"
    elif placement.role is Role.SPARE:
        yield f"spare:{placement.rank - topology.first_spare}"
    elif placement.shard:
        same = [pipeline for pipeline in topology.pipelines if pipeline.role is placement.role]
        stage = placement.stage + sum(pipeline.pp for pipeline in same if pipeline.index < placement.pipeline)
        if placement.shard.tp_rank == 0:
            yield f"{placement.role}:{stage}"
        yield f"{placement.role}:{stage}.{placement.shard.tp_rank}"
    yield f"rank:{placement.rank}"


def to_environment(faults: Sequence[Fault]) -> dict[str, str]:
    """Give the variable that tells ranks of faults."""
    return {FAULTS: json.dumps([asdict(fault) for fault in faults])}


def from_environment(environment: Mapping[str, str]) -> list[Fault]:
    """Read the faults that this job is to have; none as a rule."""
    return [Fault(**fault) for fault in json.loads(environment.get(FAULTS, "[]"))]


@dataclass(frozen=True, slots=True)
class Incident:
    """Note what was done to a process, and when: in seconds after the run's start, a hang's end on the host's clock."""

    process: int
    kind: Literal["kill", "stop", "hang"]
    time_s: float
    fault: int = -1  # its number in the list, where it was caused on purpose
    pid: int = 0


class IncidentLog:
    """Share with all processes of this host, and with those that come after, what was done to whom."""

    def __init__(self, directory: Path) -> None:
        self.path = directory / "incidents.jsonl"

    def note(self, incident: Incident) -> None:
        """Add a line, with one system call, so that it is there before the signal is."""
        file = os.open(self.path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
        with os.fdopen(file, "wb", buffering=0) as target:
            target.write(json.dumps(asdict(incident)).encode() + b"\n")

    def read(self) -> list[Incident]:
        """Give all incidents so far."""
        if not self.path.exists():
            return []
        return [Incident(**json.loads(line)) for line in self.path.read_text().splitlines()]

    def times_done(self) -> Counter[int]:
        """Count how often each fault was caused, by its number."""
        return Counter(incident.fault for incident in self.read() if incident.fault >= 0)


@dataclass(slots=True)
class Injector:
    """Cause those faults that this process is to cause: a worker its own, the controller all others.

    `drop_memory` lets this host's keeper forget all that a place has in memory.
    """

    faults: Sequence[tuple[int, Fault]]
    log: IncidentLog
    drop_memory: Callable[[str], object]
    topology: Topology
    done: Counter[int] = field(init=False)  # by whoever played these ranks before, too

    def __post_init__(self) -> None:
        self.done = self.log.times_done()

    def look(self, step: int, now_s: float, find: Callable[[int], tuple[int, int] | None], tokens: int = 0) -> None:
        """Cause what is due; `find` gives the process that plays a rank, and its pid."""
        for number, fault in self.faults:
            if not fault.is_due(self.done[number], step, now_s, tokens) or not (found := find(fault.rank)):
                continue
            self.done[number] += 1
            process, pid = found
            if fault.loses_memory and self.topology.placements[fault.rank].shard:
                self.drop_memory(f"{place_name(self.topology.placements[fault.rank])}/")
            self.log.note(Incident(process, fault.kind, now_s, number, pid))
            os.kill(pid, SIGNALS[fault.kind])


def faults_for(faults: Sequence[Fault], rank: int, topology: Topology) -> list[tuple[int, Fault]]:
    """Give the faults, with their numbers, that the process that plays `rank` is to cause."""

    def causer(fault: Fault) -> int:
        is_own = fault.step is not None and topology.placements[fault.rank].shard
        return fault.rank if is_own else CONTROLLER

    return [(number, fault) for number, fault in enumerate(faults) if causer(fault) == rank]


class Tripwire:
    """Give a worker its passes, and cause its own faults before those at which they are due."""

    def __init__(self, source: "Source", injector: Injector, process: int, now_s: Callable[[], float]) -> None:
        self.source = source
        self.injector = injector
        self.process = process
        self.now_s = now_s

    def next(self) -> Work | None:
        """Wait for the next pass."""
        work = self.source.next()
        if work:
            self.injector.look(work.step, self.now_s(), lambda rank: (self.process, os.getpid()))
        return work
