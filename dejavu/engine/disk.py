"""Write each pass's KV to a file behind the pass, by way of staging memory in the host: no pass waits for the disk.

    pool → (device: packed pieces) → staging → (a thread: checksums, write) → file → (another: every half second) → disk

A prompt is written at once, the tokens of steps together ten times a second. What a killed process had not written
is passed again.
"""

import sys
import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from dataclasses import replace
from typing import NamedTuple

from dejavu.device.base import Buffer, Stream
from dejavu.device.cpu_copy import array_at
from dejavu.device.pieces import Pieces
from dejavu.engine.handover import LOOK_EVERY_S, NoMover, RunTime
from dejavu.engine.messages import Admission, Expect, Report, Work
from dejavu.engine.replication import ReplicaSource, note_pass
from dejavu.kv.disk import Bytes, KvFile, Loaded, TokenPacker, fit, load
from dejavu.kv.replica import HeldRow, Place, ReplicaBooks, RowCopy, count_bytes, list_pieces
from dejavu.measure.records import TransferRecord
from dejavu.transport.carrier import Gathering, Transfer
from dejavu.transport.lanes import Lanes
from dejavu.transport.staging import CHUNK_BYTES, Slots, is_short, move

NAME = "disk"  # in the records
POST_EVERY_S = 0.1  # the tokens of steps
SYNC_EVERY_S = 0.5
BUSY_S = 5e-3  # after which to look again whether there is a slot
NUM_SLOTS = 8
NUM_READERS = 4
READ_BYTES = 64 << 20  # read ahead, in all


class Staged(NamedTuple):
    """Be tokens on their way to a slot of staging memory; without a transfer they are there."""

    copies: Sequence[RowCopy]
    slot: Buffer
    transfer: Transfer | None
    start_s: float


class Written(NamedTuple):
    """Tell of bytes that are in the file; seconds of `time.monotonic`."""

    nbytes: int
    start_s: float
    end_s: float


class DiskMover(NoMover):
    """Keep one rank's KV in its file, which this takes over.

    Where the disk fails, say so once and go on without: the file is removed, so that nobody takes it for whole.
    """

    takes: tuple[type, ...] = (Expect,)

    def __init__(self, source: ReplicaSource, file: KvFile, rank: int) -> None:
        """Write what the file lacks of whatever is in `source.pool`, behind the work of its stream."""
        self.source = source
        self.file = file
        self.rank = rank
        self.is_lost = False
        self.books = ReplicaBooks()
        self.begin_with(file.rows())
        self.owners: dict[int, int] = {}  # by block: the serial whose tokens come into it, or have come
        self.pending: dict[int, RowCopy] = {}  # by serial
        self.is_urgent = False
        self.staged: deque[Staged] = deque()
        self.writing: deque[Future[Written]] = deque()
        self.syncing: Future[None] | None = None
        self.is_dirty = False
        self.posted_s = self.synced_s = time.monotonic()
        self.written: list[Written] = []
        self.slots = Slots(source.device, slot_bytes=max(CHUNK_BYTES, file.layout.bytes_per_token), num_slots=NUM_SLOTS)
        in_step = source.device.properties.kind == "cpu" and source.stream is source.device.compute_stream
        self.packer = TokenPacker(source.pool, file.layout) if in_step else None
        self.lanes = Lanes(source.device, NAME, limit=1)
        self.writer = ThreadPoolExecutor(1, thread_name_prefix="kv-writer")
        self.syncer = ThreadPoolExecutor(1, thread_name_prefix="kv-syncer")

    def begin_with(self, rows: Mapping[Place, HeldRow]) -> None:
        """Take it that the file has these tokens, and no others."""
        self.books.adopt(rows)

    def take(self, message: object) -> None:
        """Note whose prompt comes into which blocks."""
        assert isinstance(message, Expect), message
        self.own(message.blocks, message.serial)

    def own(self, blocks: Sequence[int], serial: int) -> None:
        """Note whose tokens these blocks get: what is copied from now on is nobody else's."""
        for block in blocks:
            self.owners[block] = serial

    def end(self, work: Work) -> None:
        """Note what the pass adds; it is written once its result is on its way."""
        if self.is_lost:
            return
        self.admit(work.admissions)
        note_pass(self.books, work)
        for copy in self.books.due(work.microbatch, work.step) or ():
            self.add(copy)

    def admit(self, admissions: Sequence[Admission]) -> None:
        """Strike out what the file has of requests beyond the tokens that they go on with, before anybody goes on."""
        stale = []
        for admission in admissions:
            self.own(admission.blocks, admission.serial)
            book = self.books.rows.get((admission.microbatch, admission.row))
            if book is None or book.serial != admission.serial:
                continue
            is_same = tuple(admission.blocks[: len(book.blocks)]) == tuple(book.blocks)
            first = admission.num_cached if is_same else 0
            if book.copied > first:
                stale.append((HeldRow(book.serial, book.copied, tuple(book.blocks)), first))
            if is_same:
                book.blocks = admission.blocks  # the file knows those that have tokens
        if stale:
            self.attempt(lambda: self.file.strike(stale))

    def add(self, copy: RowCopy) -> None:
        """Put a copy behind what waits of its request."""
        before = self.pending.get(copy.serial)
        joins = before is not None and before.stop == copy.start
        self.pending[copy.serial] = copy._replace(start=before.start) if before and joins else copy
        self.is_urgent |= copy.stop - copy.start > 1

    def look(self) -> float:
        """Pass on what has come into staging memory, fill it anew, and give the seconds after which to look again."""
        self.attempt(self.note_written)
        self.attempt(self.sync)
        if self.is_lost:
            return float("inf")
        self.pass_on()
        self.post()
        return self.pause_s()

    def pause_s(self) -> float:
        """Give the seconds after which to look again."""
        if self.staged:
            return LOOK_EVERY_S
        if self.pending:
            return max(BUSY_S, self.posted_s + POST_EVERY_S - time.monotonic())
        return SYNC_EVERY_S if self.writing or self.is_dirty or self.syncing else float("inf")

    def post(self) -> None:
        """Copy what waits to staging memory, as far as there is any."""
        now_s = time.monotonic()
        if not self.pending or not (self.is_urgent or now_s - self.posted_s >= POST_EVERY_S):
            return
        copies = [copy for copy in self.pending.values() if self.is_wanted(copy)]
        while copies and (slot := self.slots.take()):
            some, copies = fit(self.file.layout, copies, slot.nbytes)
            self.staged.append(Staged(some, slot, self.stage(some, slot), now_s))
        self.pending = {copy.serial: copy for copy in copies}
        self.is_urgent, self.posted_s = bool(copies), now_s
        self.pass_on()

    def stage(self, copies: Sequence[RowCopy], slot: Buffer) -> Transfer | None:
        """Start copying tokens to a slot; None where they are there already."""
        if self.packer:
            nbytes = count_bytes(self.file.layout, copies)
            self.packer.pack(array_at(slot.address, (nbytes,)), copies)
            return None
        device, pool, stream = self.source.device, self.source.pool, self.source.stream
        pieces = list_pieces(self.file.layout, copies)

        def work(lane: Stream) -> None:
            move(device, slot, pool, pieces, Gathering.PACKED, stream=lane)

        short = is_short(device, pieces, Gathering.PACKED)
        return self.lanes.run(pieces.total_bytes, self.lanes.mark(stream), work, (pool, pieces), is_short=short)

    def is_wanted(self, copy: RowCopy) -> bool:
        """Tell whether a copy's blocks are still its request's: of one that has ended they may be another's by now."""
        blocks = copy.blocks[: -(-copy.stop // self.file.layout.block_size)]
        return all(self.owners.get(block) == copy.serial for block in blocks)

    def pass_on(self) -> None:
        """Have the thread write what is in staging memory; raise the error of a copy that failed.

        A pass that wrote into blocks meanwhile, for another request, is known by now: no pass begins amid a look.
        """
        while self.staged and ((transfer := self.staged[0].transfer) is None or transfer.done):
            staged = self.staged.popleft()
            if transfer and transfer.error:
                raise transfer.error
            wanted = [self.is_wanted(copy) for copy in staged.copies]
            self.writing.append(self.writer.submit(self.write, staged, wanted))

    def write(self, staged: Staged, wanted: Sequence[bool]) -> Written:
        """Write what is still wanted of a slot, and give the slot back; called by the thread."""
        nbytes = 0
        try:
            for copy, is_wanted in zip(staged.copies, wanted, strict=True):
                size = count_bytes(self.file.layout, [copy])
                if is_wanted:
                    self.file.write([copy], array_at(staged.slot.address + nbytes, (size,)))
                nbytes += size
        finally:
            self.slots.give(staged.slot)
        return Written(nbytes, staged.start_s, time.monotonic())

    def note_written(self) -> None:
        """Take note of the writes that have ended; raise the error of one that failed."""
        while self.writing and self.writing[0].done():
            self.written.append(self.writing.popleft().result())
            self.is_dirty = True

    def sync(self) -> None:
        """Have the other thread bring to the disk what was written, twice a second; raise its error."""
        if self.syncing and self.syncing.done():
            done, self.syncing = self.syncing, None
            done.result()
        if self.is_dirty and not self.syncing and time.monotonic() - self.synced_s >= SYNC_EVERY_S:
            self.is_dirty, self.synced_s = False, time.monotonic()
            self.syncing = self.syncer.submit(self.file.sync)

    def attempt(self, action: Callable[[], None]) -> None:
        """Do something with the file, unless it was given up; give it up where that fails."""
        if self.is_lost:
            return
        try:
            action()
        except OSError as error:
            self.is_lost = True
            sys.stderr.write(
                f"rank {self.rank}: {self.file.path} cannot be written ({error.strerror}): KV is kept on disk no more, "
                "and after the loss of all processes prompts are computed again\n"
            )
            self.writer.shutdown(cancel_futures=True)
            with suppress(OSError):
                self.file.path.unlink()

    def report(self, report: Report, rank: int, run_time: RunTime) -> Report:
        """Add a record for each write."""
        self.look()
        return replace(report, transfers=report.transfers + self.take_transfers(rank, run_time))

    def take_transfers(self, rank: int, run_time: RunTime) -> list[TransferRecord]:
        """Give a record for each write that has ended since the last call."""
        written, self.written = self.written, []
        return [
            TransferRecord(rank, NAME, NAME, rank, rank, each.nbytes, run_time(each.start_s), run_time(each.end_s))
            for each in written
        ]

    def close(self) -> None:
        """Finish the writes that have begun, and let go of the file; another process may have it then."""
        self.packer = None
        self.lanes.close()
        self.writer.shutdown()
        self.syncer.shutdown()
        self.slots.close()
        self.file.close()


def restore(source: ReplicaSource, file: KvFile) -> Loaded:
    """Give a pool back what counts in a file; it is there when this returns."""
    device, layout = source.device, file.layout
    with device.allocate_host(layout.block_bytes) as slot, ThreadPoolExecutor(NUM_READERS) as readers:

        def take(copy: RowCopy, packed: Bytes) -> None:
            array_at(slot.address, packed.shape)[:] = packed
            pieces: Pieces = list_pieces(layout, [copy]).inverse
            move(device, source.pool, slot, pieces, Gathering.PACKED, stream=source.stream)
            source.stream.synchronize()

        return load(file, take, readers.submit, READ_BYTES)
    raise AssertionError("an exit stack hides no error")
