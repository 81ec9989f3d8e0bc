"""Run parts of a test on some ranks of COMM_WORLD, and bring what happened to all of them; nobody spins meanwhile."""

from __future__ import annotations

import pickle
import sys
import time
import traceback
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import numpy as np
from mpi4py import MPI

from dejavu.cluster.engine import Outcome, run_controller
from dejavu.cluster.job import prepare
from dejavu.cluster.participant import run_worker
from dejavu.config import ServeConfig
from dejavu.engine.controller import Controller
from dejavu.request import Completion, Request
from dejavu.topology import CONTROLLER, required_ranks
from dejavu.transport.mpi import Channel

DEADLINE_S = 20.0
Result = TypeVar("Result")


class World:
    """Stand for COMM_WORLD; every method is called by all ranks together, and gives all of them the same."""

    def __init__(self) -> None:
        self.comm = MPI.COMM_WORLD
        self.rank, self.size = self.comm.Get_rank(), self.comm.Get_size()
        self.first = {n: self.split(n) for n in range(1, self.size + 1)}

    def split(self, count: int) -> MPI.Intracomm:
        """Give a communicator of the first `count` ranks, null on the others."""
        part = self.comm.Split(0 if self.rank < count else MPI.UNDEFINED)
        assert isinstance(part, MPI.Intracomm) or part == MPI.COMM_NULL
        return part  # type: ignore[return-value]

    def gather(self, value: Any) -> list[Any]:
        """Give every rank's value."""
        data = np.frombuffer(pickle.dumps(value), np.uint8)
        sizes = np.empty(self.size, np.int64)
        settle(self.comm.Iallgather(np.array([data.size], np.int64), sizes))
        parts = np.empty(sizes.sum(), np.uint8)
        settle(self.comm.Iallgatherv(data, [parts, sizes.tolist()]))
        ends = np.cumsum(sizes)
        return [pickle.loads(parts[end - size : end].tobytes()) for size, end in zip(sizes, ends, strict=True)]

    def together(self, body: Callable[[], Result]) -> list[Result]:
        """Run `body` on every rank and give every rank's result; an exception of one rank fails the test on all."""
        result, failure = None, None
        try:
            result = body()
        except Exception as error:
            failure = f"rank {self.rank}: {type(error).__name__}: {error}"
            sys.stderr.write(f"rank {self.rank}: {traceback.format_exc()}")
        outcomes = self.gather((result, failure))
        failures = [failure for _, failure in outcomes if failure]
        assert not failures, "\n".join(failures)
        return [result for result, _ in outcomes]

    def on_first(self, count: int, body: Callable[[Channel], Result], deadline_s: float = DEADLINE_S) -> list[Result]:
        """Run `body` on the first ranks with a channel between them, which it must leave empty; give their results."""

        def run() -> Result | None:
            if self.rank >= count:
                return None
            channel = Channel(self.first[count], deadline_s)
            result = body(channel)
            channel.close()
            return result

        return self.together(run)[:count]  # type: ignore[return-value]

    def serve(
        self, config: ServeConfig, drive: Callable[[Controller], Result], make_stream: Any = None
    ) -> tuple[Result, Outcome]:
        """Serve with as many ranks as the configuration needs, driven on rank 0; give what `drive` gives."""

        def run(channel: Channel) -> Any:
            if channel.rank != CONTROLLER:
                run_worker(channel, channel.receive(CONTROLLER, DEADLINE_S)[1])
                return None
            setup = prepare(config).setup
            for rank in range(1, channel.size):
                channel.send(rank, setup)
            return run_controller(channel, setup, drive, make_stream)

        return self.on_first(required_ranks(config), run)[CONTROLLER]  # type: ignore[no-any-return]

    def generate(self, config: ServeConfig, requests: Sequence[Request]) -> list[Completion]:
        """Serve requests to their end."""
        return self.serve(config, lambda controller: controller.generate(requests))[0]


def settle(request: MPI.Request) -> None:
    """Wait for an operation, asleep."""
    while not request.Test():
        time.sleep(1e-3)
