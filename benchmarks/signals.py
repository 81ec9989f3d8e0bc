"""How soon a small piece and the flag behind it arrive: two ranks put 4 KiB into each other's memory, in turns."""

import time
from statistics import median
from typing import Any

from dejavu.device import FLAG_BYTES
from dejavu.device.base import Buffer

from .contents import Check
from .shapes import Exchange, contiguous
from .timing import Timing

TURNS = 100  # of one batch, all queued before the first begins
DEADLINE_S = 30.0


class PutFlag:
    """Put bytes and a flag into the other rank's memory, which waits for the flag and does the same back."""

    num_pieces = 1
    window = 1

    def __init__(self, world: Any, nbytes: int) -> None:
        """Map the other rank's data and flag."""
        device = world.device
        self.world = world
        self.nbytes = nbytes
        self.exchange: Exchange = contiguous(nbytes)
        self.stream = device.create_stream("signals")
        self._source = device.allocate(nbytes)
        self._own = device.allocate(nbytes + FLAG_BYTES)
        device.fill(self._own, 0, stream=self.stream)
        self.stream.synchronize()
        handles = world.comm.allgather(self._own.ipc_handle())
        self._there: Buffer = device.open_ipc(handles[1 - world.rank], nbytes + FLAG_BYTES)
        self._check = Check(device, self.exchange.source, nbytes, nbytes)
        self._value = 0

    def measure(self, batches: int) -> Timing:
        """Time batches of turns; a single transfer is half a turn."""
        self._batch()
        results = [self._batch() for _ in range(max(3, min(batches, 20)))]
        self._check.fill(self._source, self.world.rank)
        self._check.poison(self._own.view(0, self.nbytes), 1 - self.world.rank)
        results.append(self._batch())
        return Timing([each for each, _ in results], [], [post for _, post in results])

    def count_wrong(self) -> int:
        """Count what differs in this rank's memory."""
        return self._check.count_wrong(self._own.view(0, self.nbytes))

    def close(self) -> None:
        """Unmap, and free what nobody maps any more."""
        self._there.close()
        self.world.share()
        for memory in (self._own, self._source):
            memory.close()
        self.stream.close()

    def _batch(self) -> tuple[float, float]:
        """Queue turns on both ranks, let them go, and give the seconds of one put, and of posting one."""
        self.world.share()
        if self.world.rank == 0:
            self.world.gate.shut(self.stream)
        posts = [self._turn() for _ in range(TURNS)]
        self.world.share()
        start_s = time.perf_counter()
        if self.world.rank == 0:
            self.world.gate.open()
        self._settle()
        elapsed_s = time.perf_counter() - start_s
        shared = self.world.share(elapsed_s, median(posts))
        return shared[0][0] / (2 * TURNS), shared[0][1]

    def _turn(self) -> float:
        self._value += 1
        if self.world.rank == 1:
            self._wait()
        begin_s = time.perf_counter()
        device, there = self.world.device, self._there
        device.copy(there.view(0, self.nbytes), self._source, stream=self.stream)
        device.write_flag(there.view(self.nbytes, FLAG_BYTES), self._value, stream=self.stream)
        post_s = time.perf_counter() - begin_s
        if self.world.rank == 0:
            self._wait()
        return post_s

    def _wait(self) -> None:
        place = self._own.view(self.nbytes, FLAG_BYTES)
        self.world.device.wait_flag(place, self._value, stream=self.stream, deadline_s=DEADLINE_S)

    def _settle(self) -> None:
        if self.world.device.properties.kind == "cuda":
            while not self.stream.query():
                time.sleep(0)
        self.stream.synchronize(DEADLINE_S)
