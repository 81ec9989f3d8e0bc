"""The `disk` carrier: a store of one file per message, checksummed, with direct I/O where the file system has it.

One file per key rather than a log: sending a key again replaces its file in one step, `forget` gives the space back at
once, nothing is ever compacted, and several threads write at once. A key is a whole message of some MiB, so the cost
of a file is small beside it.
"""

import fcntl
import mmap
import os
import threading
import zlib
from collections import deque
from collections.abc import Callable, Generator
from concurrent.futures import Future, ThreadPoolExecutor
from concurrent.futures import wait as wait_for
from contextlib import suppress
from dataclasses import dataclass
from itertools import count
from pathlib import Path
from typing import ParamSpec, TypeVar

import numpy as np

from dejavu.device.base import Buffer, Device, Event, Stream
from dejavu.device.cpu_copy import array_at
from dejavu.device.pieces import Pieces
from dejavu.errors import TransferError
from dejavu.transport.carrier import Carrier, Gathering, Transfer, UnavailableError, check_message
from dejavu.transport.disk_file import (
    BLOCK_BYTES,
    Header,
    header_blocks,
    key_of,
    path_of,
    read_header,
    whole_blocks,
)
from dejavu.transport.lanes import Lanes, LaneTransfer
from dejavu.transport.message import Chunk, cut_message
from dejavu.transport.progress import Gates, HostTransfer, Progress, Steps, until
from dejavu.transport.staging import CHUNK_BYTES, Slots, move

P = ParamSpec("P")
T = TypeVar("T")

NUM_SLOTS = 8
NUM_THREADS = 4  # that write, read and check sums: a checksum runs at a few GB/s, disks are faster


@dataclass(slots=True, eq=False)
class Job:
    """Be one message on its way to or from the disk."""

    key: int
    memory: Buffer
    pieces: Pieces
    transfer: HostTransfer
    ready: Event
    is_void: bool = False  # its key was forgotten since


class DiskStore(Carrier):
    """Keep messages in files of a directory, which a later store finds again.

    What a send has reported as done is whole in its file; with `fsync` it also survives a loss of power. A send that
    fails, or a process that dies, leaves the key's former message. A file that fails its checksums is reported by
    the receive, and not delivered. Transfers of one key follow one another in the order of the calls.

    `io` says what is in use: "direct", or "buffered (why)" where the file system refuses direct I/O.
    """

    name = "disk"

    def __init__(
        self,
        device: Device,
        directory: Path,
        *,
        rank: int = 0,
        gathering: Gathering = Gathering.PACKED,
        fsync: bool = True,
        direct: bool = True,
    ) -> None:
        """Open or make the store in `directory`, which gets mode 0700 and belongs to this store alone."""
        self.device = device
        self.rank = rank
        self.gathering = gathering
        self.fsync = fsync
        self.directory = directory
        directory.mkdir(mode=0o700, parents=True, exist_ok=True)
        directory.chmod(0o700)
        self._claim: int | None = _claim(directory)
        self.io = _find_io(directory) if direct else "buffered (as asked for)"
        self._keys = {key for path in directory.iterdir() if (key := key_of(path)) is not None}
        self._queues: dict[int, deque[Job]] = {}  # by key, in the order of the calls
        self._drafts = count()
        self._lock = threading.Lock()
        self._lanes = Lanes(device, "disk")
        self._gates = Gates(device)
        self._slots = Slots(device, num_slots=NUM_SLOTS)
        self._progress = Progress("disk")
        self._threads = ThreadPoolExecutor(NUM_THREADS, thread_name_prefix="carrier-disk-io")

    @property
    def keys(self) -> frozenset[int]:
        """Give the keys that the store holds."""
        return frozenset(self._keys)

    def send(self, peer: int, key: int, memory: Buffer, pieces: Pieces, *, stream: Stream) -> Transfer:
        """Write a message to the file of `key`."""
        assert peer == self.rank, f"a store holds messages of its own rank {self.rank}, not of {peer}"
        return self._post(key, memory, pieces, stream, self._write)

    def receive(self, peer: int, key: int, memory: Buffer, pieces: Pieces, *, stream: Stream) -> Transfer:
        """Read the message of `key`; what is wrong with its file is the transfer's error."""
        assert peer == self.rank, f"a store holds messages of its own rank {self.rank}, not of {peer}"
        return self._post(key, memory, pieces, stream, self._read)

    def forget(self, key: int) -> None:
        """Remove the file of `key`. A receive that has begun goes on; a send that has not ended fails."""
        with self._lock:
            for job in self._queues.get(key, ()):
                job.is_void = True
            self._keys.discard(key)
            path_of(self.directory, key).unlink(missing_ok=True)

    def close(self) -> None:
        """End what still runs; the files stay."""
        self._progress.close()
        self._threads.shutdown()
        self._lanes.close()
        self._slots.close()
        self._gates.close()
        if self._claim is not None:
            os.close(self._claim)
            self._claim = None

    def _post(
        self, key: int, memory: Buffer, pieces: Pieces, stream: Stream, make_steps: Callable[[Job], Steps]
    ) -> Transfer:
        transfer = HostTransfer(check_message(memory, pieces), self._gates)
        job = Job(key, memory, pieces, transfer, self._lanes.mark(stream))
        with self._lock:
            queue = self._queues.setdefault(key, deque())
            queue.append(job)
            self._progress.start(transfer, self._in_turn(job, queue, make_steps))
        return transfer

    def _in_turn(self, job: Job, queue: deque[Job], make_steps: Callable[[Job], Steps]) -> Steps:
        """Follow the key's earlier transfers, and the caller's stream."""
        try:
            yield from until(lambda: queue[0] is job)
            yield from until(job.ready.query)
            yield from make_steps(job)
        except OSError as error:
            raise TransferError(
                f"the disk store {self.directory} failed ({error}): check its space and rights"
            ) from error
        finally:
            with self._lock:
                self._lanes.recycle(job.ready)
                queue.remove(job)
                if not queue:
                    del self._queues[job.key]

    # Writing

    def _write(self, job: Job) -> Steps:
        draft = self.directory / f"{next(self._drafts)}.draft"
        fd = self._open(draft, os.O_WRONLY | os.O_CREAT | os.O_EXCL)
        try:
            yield from self._write_file(fd, job)
            yield from _finish(self._submit(self._publish, fd, draft, job))
        finally:
            os.close(fd)
            draft.unlink(missing_ok=True)  # there is none after it was renamed

    def _write_file(self, fd: int, job: Job) -> Steps:
        begin = header_blocks(job.transfer.nbytes, CHUNK_BYTES) * BLOCK_BYTES
        sums: list[Future[int]] = []
        try:
            for chunk in cut_message(job.pieces, CHUNK_BYTES):
                slot = yield from self._take_slot()
                yield from self._pack(slot, job, chunk)
                sums.append(self._submit(self._store, fd, slot, begin + chunk.offset, chunk.nbytes))
                job.transfer.advanced(chunk.nbytes)
                yield True
            yield from until(lambda: all(one.done() for one in sums))
        finally:
            wait_for(sums)
        header = Header(job.key, job.transfer.nbytes, CHUNK_BYTES, tuple(one.result() for one in sums))
        yield from self._write_header(fd, header)

    def _write_header(self, fd: int, header: Header) -> Steps:
        packed = np.frombuffer(header.pack(), dtype=np.uint8)
        for at in range(0, len(packed), CHUNK_BYTES):
            part = packed[at : at + CHUNK_BYTES]
            slot = yield from self._take_slot()
            array_at(slot.address, part.shape)[:] = part
            yield from _finish(self._submit(self._store, fd, slot, at, len(part)))

    def _pack(self, slot: Buffer, job: Job, chunk: Chunk) -> Steps:
        def work(lane: Stream) -> None:
            move(self.device, slot, job.memory, chunk.pieces, self.gathering, stream=lane)

        try:
            yield from _follow(self._lanes.run(chunk.nbytes, None, work, None))
        except BaseException:
            self._slots.give(slot)
            raise

    def _store(self, fd: int, slot: Buffer, offset: int, nbytes: int) -> int:
        """Write a slot's bytes in whole blocks and give the slot back; gives the bytes' checksum."""
        try:
            whole = whole_blocks(nbytes)
            array = array_at(slot.address, (whole,))
            array[nbytes:] = 0
            done = 0
            while done < whole:
                done += os.pwrite(fd, array[done:].data, offset + done)
            return zlib.crc32(array[:nbytes].data)
        finally:
            self._slots.give(slot)

    def _publish(self, fd: int, draft: Path, job: Job) -> None:
        """Give a whole file its name."""
        if self.fsync:
            os.fsync(fd)
        with self._lock:
            if job.is_void:
                raise TransferError(f"key {job.key} was forgotten before its message was on disk: send it again")
            draft.rename(path_of(self.directory, job.key))
            self._keys.add(job.key)
        if self.fsync:
            _sync_directory(self.directory)

    # Reading

    def _read(self, job: Job) -> Steps:
        path = path_of(self.directory, job.key)
        if job.key not in self._keys:
            raise TransferError(f"key {job.key} is not in the disk store {self.directory}: send it first")
        header = read_header(path)
        if header.nbytes != job.transfer.nbytes:
            raise TransferError(
                f"key {job.key} holds {header.nbytes} bytes, not {job.transfer.nbytes}: ask for what was sent"
            )
        fd = self._open(path, os.O_RDONLY)
        try:
            yield from self._read_file(fd, header, job)
        finally:
            os.close(fd)

    def _read_file(self, fd: int, header: Header, job: Job) -> Steps:
        """Keep chunks in flight in all slots: a thread reads and checks each, and a lane unpacks it."""
        begin = header.num_blocks * BLOCK_BYTES
        waiting = deque(zip(cut_message(job.pieces, header.chunk_bytes), header.checksums, strict=True))
        reads: deque[Reading] = deque()
        try:
            while waiting or reads:
                while waiting and (slot := self._slots.take()) is not None:
                    chunk, checksum = waiting.popleft()
                    done = self._submit(_load, fd, slot, begin + chunk.offset, chunk.nbytes)
                    reads.append(Reading(chunk, checksum, slot, done))
                yield from self._advance(job, reads)
        finally:
            wait_for([reading.done for reading in reads])
            for reading in reads:
                self._slots.give(reading.slot)

    def _advance(self, job: Job, reads: "deque[Reading]") -> Steps:
        """Unpack the oldest chunk, or yield until it has been read."""
        if not reads or not reads[0].done.done():
            yield False
            return
        yield from self._unpack(job, reads[0])
        self._slots.give(reads.popleft().slot)
        yield True

    def _unpack(self, job: Job, reading: "Reading") -> Steps:
        chunk = reading.chunk
        if reading.done.result() != reading.checksum:
            raise TransferError(
                f"bytes {chunk.offset} to {chunk.offset + chunk.nbytes} of key {job.key} are corrupted on disk: "
                "send that message again"
            )

        def work(lane: Stream) -> None:
            move(self.device, job.memory, reading.slot, chunk.pieces.inverse, self.gathering, stream=lane)

        yield from _follow(self._lanes.run(chunk.nbytes, None, work, None))
        job.transfer.advanced(chunk.nbytes)

    # Parts

    def _open(self, path: Path, flags: int) -> int:
        direct = os.O_DIRECT if self.io == "direct" else 0
        return os.open(path, flags | os.O_CLOEXEC | direct, 0o600)

    def _submit(self, function: Callable[P, T], *arguments: P.args, **named: P.kwargs) -> Future[T]:
        """Have a thread of the pool call a function, and look at its outcome at once."""
        future = self._threads.submit(function, *arguments, **named)
        future.add_done_callback(lambda done: self._progress.wake())
        return future

    def _take_slot(self) -> Generator[bool, None, Buffer]:
        while (slot := self._slots.take()) is None:
            yield False
        return slot


@dataclass(frozen=True, slots=True)
class Reading:
    """Be one chunk that a thread reads into a slot; the future gives its checksum."""

    chunk: Chunk
    checksum: int
    slot: Buffer
    done: Future[int]


def _follow(copies: LaneTransfer) -> Steps:
    """Yield until copies have ended; also where this is interrupted, they have ended afterwards."""
    try:
        yield from until(lambda: copies.done)
    finally:
        copies.wait()


def _finish(future: Future[T]) -> Steps:
    """Yield until a call of a thread has ended, and raise its error. A cancel comes too late to matter."""
    while not future.done():
        with suppress(TransferError):
            yield False
    future.result()


def _load(fd: int, slot: Buffer, offset: int, nbytes: int) -> int:
    """Read whole blocks into a slot; gives the checksum of the bytes."""
    whole = whole_blocks(nbytes)
    array = array_at(slot.address, (whole,))
    done = 0
    while done < whole:
        got = os.preadv(fd, [array[done:].data], offset + done)
        if got == 0:
            raise TransferError(f"a file of the disk store ends at byte {offset + done}: send that message again")
        done += got
    return zlib.crc32(array[:nbytes].data)


def _claim(directory: Path) -> int:
    """Lock a directory until this process ends, and remove what an earlier one left unfinished."""
    fd = os.open(directory, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        os.close(fd)
        raise UnavailableError(f"the disk store {directory} is in use ({error.strerror}): give another one") from error
    for draft in directory.glob("*.draft"):
        draft.unlink()
    return fd


def _find_io(directory: Path) -> str:
    """Say "direct" where a direct write works, else "buffered" and why."""
    probe = directory / "probe.draft"
    try:
        fd = os.open(probe, os.O_WRONLY | os.O_CREAT | os.O_CLOEXEC | os.O_DIRECT, 0o600)
        try:
            os.pwrite(fd, mmap.mmap(-1, BLOCK_BYTES), 0)
        finally:
            os.close(fd)
    except OSError as error:
        return f"buffered ({error.strerror})"
    finally:
        probe.unlink(missing_ok=True)
    return "direct"


def _sync_directory(directory: Path) -> None:
    fd = os.open(directory, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)
