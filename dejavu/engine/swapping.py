"""Keep the KV of a few microbatches on the device and that of all in host memory, beside the passes.

A pass waits, on its stream, until its microbatch is there; behind it, its new tokens are flushed, and then the
microbatches of the next passes are fetched into slots that others have left. The host waits for none of it.
"""

from collections.abc import Sequence
from dataclasses import replace
from functools import partial

from dejavu.device.base import Device, Event, Stream
from dejavu.engine.handover import LOOK_EVERY_S, LayerDone, NoMover, RunTime
from dejavu.engine.messages import Report, Work
from dejavu.engine.residency import Residency
from dejavu.kv.flushed import FlushedRow, FlushedRows
from dejavu.kv.swap import Lanes, Link, Part
from dejavu.measure.records import TransferRecord

Stalls = dict[tuple[int, int], tuple[Event, Event]]  # by microbatch and step: around the wait of its compute


class SwapMover(NoMover):
    """Swap one rank's microbatches.

    After `end` of a pass, the work of `lanes.flush_stream` includes the flush of its new tokens: whatever is queued
    there later, or behind its events, finds them in host memory (a replica's copy to another rank, say).
    """

    def __init__(
        self, device: Device, books: Residency, link: Link, stream: Stream, flushed: FlushedRows | None = None
    ) -> None:
        """Order fetches before, and flushes behind, what `stream` computes; `flushed` tells a successor of these."""
        self.books = books
        self.stream = stream
        self.flushed = flushed
        self.lanes = Lanes(device, link)
        self._computed = device.create_event()
        self._flushed = [device.create_event() for _ in range(books.num_microbatches)]
        self._freed = [device.create_event() for _ in range(books.num_microbatches)]  # its slot, by who was there
        self._fetched = [device.create_event() for _ in range(books.num_microbatches)]
        self._entered: set[int] = set()  # microbatches that no pass has waited for since they have their slots
        self._stalls: Stalls = {}
        self.stalls_ms: dict[tuple[int, int], float] = {}

    def begin(self, work: Work) -> LayerDone | None:
        """Bring the pass's microbatch in, where it is not, and make compute wait for it."""
        for admission in (*work.seated, *work.admissions):
            self.books.admit(admission)
            if self.flushed is not None:
                place = admission.microbatch, admission.row
                self.flushed.admit(FlushedRow(place, admission.serial, admission.num_cached))
        microbatch = work.microbatch
        wanted = [microbatch, *self.books.upcoming(microbatch)][: len(self.books.slots)]
        if microbatch not in self.books.slots:
            self.bring_in(microbatch, wanted)
        self.fetch(microbatch, self.books.fetch_for(work))
        self.hold(work)
        self.prepare(wanted[1:], wanted)
        return None

    def hold(self, work: Work) -> None:
        """Make compute wait for the fetches of the pass's rows; where there are none, for the slot to be free."""
        microbatch, is_fetched = work.microbatch, self.books.awaits(work)
        if is_fetched or microbatch in self._entered:
            self._entered.discard(microbatch)
            start = self.lanes.mark(self.stream)
            (self._fetched if is_fetched else self._freed)[microbatch].wait(self.stream)
            self._stalls[microbatch, work.step] = start, self.lanes.mark(self.stream)

    def end(self, work: Work) -> None:
        """Flush the pass's new tokens, then bring in what comes next."""
        self._computed.record(self.stream)
        parts = self.books.computed(work)
        landed = partial(self.flushed.extend, flushed_rows(work)) if self.flushed is not None else None
        self.lanes.run("flush", parts, [self._computed], self._flushed[work.microbatch], landed)
        coming = self.books.upcoming(work.microbatch)
        self.prepare(coming, coming)
        self.look()

    def prepare(self, coming: Sequence[int], wanted: Sequence[int]) -> None:
        """Bring microbatches in, in this order, and what is missing of those that are in; the `wanted` ones stay."""
        for microbatch in coming:
            if microbatch not in self.books.slots:
                self.bring_in(microbatch, wanted)
            self.fetch(microbatch, self.books.fetch_all(microbatch))

    def bring_in(self, microbatch: int, wanted: Sequence[int]) -> None:
        """Give a slot to a microbatch, once what was there has been flushed."""
        leaving = self.books.bring_in(microbatch, wanted)
        if leaving is not None:
            self._entered.discard(leaving)
            self.lanes.run("fetch", [], [self._flushed[leaving]], self._freed[microbatch])
            self._entered.add(microbatch)

    def fetch(self, microbatch: int, parts: Sequence[Part]) -> None:
        """Fetch parts of a microbatch that has a slot, behind its last pass and the flush of it."""
        if parts:
            self.lanes.run("fetch", parts, [self._flushed[microbatch]], self._fetched[microbatch])

    def look(self) -> float:
        """Take note of what has ended; raise the error of a copy that failed. A successor's notes are not to lag."""
        self.lanes.look()
        for key, (start, end) in list(self._stalls.items()):
            if end.query():
                self.stalls_ms[key] = end.elapsed_ms(start)
                self.lanes.recycle(start, end)
                del self._stalls[key]
        return LOOK_EVERY_S if self.flushed is not None and self.lanes.is_flushing else float("inf")

    def settle(self) -> None:
        """Wait until all is done and known."""
        self.stream.synchronize()
        self.lanes.settle()
        self.look()

    def report(self, report: Report, rank: int, run_time: RunTime) -> Report:
        """Add the fetches and flushes, when all are done."""
        self.settle()
        return replace(report, transfers=report.transfers + self.take_transfers(rank, run_time))

    def take_stall_ms(self, work: Work) -> float:
        """Give what a pass that is through has waited for its microbatch; asked once."""
        key = work.microbatch, work.step
        if key in self._stalls:
            self._stalls[key][1].synchronize()
            self.look()
        return self.stalls_ms.pop(key, 0.0)

    def take_transfers(self, rank: int, run_time: RunTime) -> list[TransferRecord]:
        """Give the fetches and flushes of this rank of which `look` has seen the end."""
        moved, self.lanes.moved = self.lanes.moved, []
        return [
            TransferRecord(rank, m.direction, "local", rank, rank, m.nbytes, run_time(m.start_s), run_time(m.end_s))
            for m in moved
        ]

    def close(self) -> None:
        """Finish what is on its way, and give streams and events back."""
        self.lanes.close()
        for event in (self._computed, *self._flushed, *self._freed, *self._fetched):
            event.close()
        for timers in self._stalls.values():
            for event in timers:
                event.close()


def flushed_rows(work: Work) -> list[FlushedRow]:
    """Say how much of each request is in host memory when a pass's new tokens are."""
    return [FlushedRow((work.microbatch, row.row), row.serial, row.context + row.num_new) for row in work.rows]
