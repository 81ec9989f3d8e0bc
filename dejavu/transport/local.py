"""The `local` carrier: a store in pinned host memory, which keeps messages until they are forgotten."""

import threading
from dataclasses import dataclass

from dejavu.device.base import Buffer, Device, Stream
from dejavu.device.pieces import Pieces
from dejavu.errors import TransferError
from dejavu.transport.arena import Arena
from dejavu.transport.carrier import Carrier, Gathering, Transfer, check_message
from dejavu.transport.lanes import Lanes, LaneTransfer
from dejavu.transport.staging import is_short, move


@dataclass(slots=True)
class Entry:
    """Be one message in the store: where it lies, and the transfer that brings it."""

    offset: int
    nbytes: int
    sent: LaneTransfer | None = None


@dataclass(slots=True)
class Use:
    """Be one transfer that reads or writes [begin, end) of the store."""

    begin: int
    end: int
    writes: bool
    transfer: LaneTransfer


class LocalStore(Carrier):
    """Keep messages in one allocation of pinned host memory; each lies there in one piece, in the message's order.

    One copy moves a contiguous message, one kernel any other, which reads and writes the pinned memory directly.
    Each direction has streams of its own, so that a send and a receive share the bus as its two ways. Sending a key
    again replaces its message, behind the transfers that still use it. CapacityError where a message does not fit.
    """

    name = "local"

    def __init__(
        self, device: Device, capacity_bytes: int, *, rank: int = 0, gathering: Gathering = Gathering.PACKED
    ) -> None:
        """Allocate the store; `capacity_bytes` counts each message rounded up to 256 bytes."""
        self.device = device
        self.rank = rank
        self.gathering = gathering
        self._memory: Buffer | None = device.allocate_host(capacity_bytes)
        self._arena = Arena(capacity_bytes)
        self._entries: dict[int, Entry] = {}
        self._uses: list[Use] = []  # in flight, and some that have ended
        self._out = Lanes(device, "local-out")
        self._in = Lanes(device, "local-in")
        self._lock = threading.Lock()
        if device.properties.kind == "cpu":  # pages of plain host memory come with their first use, pinned ones at once
            device.fill(self._memory, 0, stream=device.compute_stream)

    @property
    def free_bytes(self) -> int:
        """Give the bytes that no message takes."""
        return self._arena.free_bytes

    def __contains__(self, key: int) -> bool:
        entry = self._entries.get(key)
        return entry is not None and (entry.sent is None or entry.sent.error is None)

    def send(self, peer: int, key: int, memory: Buffer, pieces: Pieces, *, stream: Stream) -> Transfer:
        """Copy a message into the store under `key`."""
        assert peer == self.rank, f"a store holds messages of its own rank {self.rank}, not of {peer}"
        nbytes = check_message(memory, pieces)
        with self._lock:
            entry = self._place(key, nbytes)
            entry.sent = self._start(self._out, entry, memory, pieces, stream, writes=True)
            return entry.sent

    def receive(self, peer: int, key: int, memory: Buffer, pieces: Pieces, *, stream: Stream) -> Transfer:
        """Copy the message of `key` out of the store; it stays there."""
        assert peer == self.rank, f"a store holds messages of its own rank {self.rank}, not of {peer}"
        nbytes = check_message(memory, pieces)
        with self._lock:
            entry = self._find(key)
            if entry.nbytes != nbytes:
                raise TransferError(f"key {key} holds {entry.nbytes} bytes, not {nbytes}: ask for what was sent")
            return self._start(self._in, entry, memory, pieces, stream, writes=False)

    def view(self, key: int) -> Buffer:
        """Give the bytes of a message in the store, for whoever changes a part of it; valid until `forget`."""
        with self._lock:
            return self._view(self._find(key))

    def forget(self, key: int) -> None:
        """Drop a message. Transfers that use it go on; the space is used again behind them."""
        with self._lock:
            self._drop(key)

    def close(self) -> None:
        """End what still runs and free the store."""
        self._out.close()
        self._in.close()
        if self._memory is not None:
            self._memory.close()
            self._memory = None

    def _find(self, key: int) -> Entry:
        entry = self._entries.get(key)
        if entry is None:
            raise TransferError(f"key {key} is not in the store: send it first")
        if entry.sent is not None and entry.sent.error is not None:
            raise TransferError(f"key {key} was sent, but did not arrive whole: send it again") from entry.sent.error
        return entry

    def _place(self, key: int, nbytes: int) -> Entry:
        """Give the entry that takes the message: the old one where the size is the same."""
        entry = self._entries.get(key)
        if entry is not None and entry.nbytes == nbytes:
            return entry
        if entry is not None:
            self._drop(key)
        self._entries[key] = entry = Entry(self._arena.take(nbytes), nbytes)
        return entry

    def _drop(self, key: int) -> None:
        entry = self._entries.pop(key, None)
        if entry is not None:
            self._arena.give(entry.offset, entry.nbytes)

    def _view(self, entry: Entry) -> Buffer:
        assert self._memory is not None, "the store was closed"
        return self._memory.view(entry.offset, entry.nbytes)

    def _start(
        self, lanes: Lanes, entry: Entry, memory: Buffer, pieces: Pieces, stream: Stream, *, writes: bool
    ) -> LaneTransfer:
        kept = self._view(entry)
        before = self._users(entry, writes=writes)

        def work(lane: Stream) -> None:
            for transfer in before:
                transfer.order(lane)
            if writes:
                move(self.device, kept, memory, pieces, self.gathering, stream=lane)
            else:
                move(self.device, memory, kept, pieces.inverse, self.gathering, stream=lane)

        short = not before and is_short(self.device, pieces, self.gathering)
        transfer = lanes.run(entry.nbytes, lanes.mark(stream), work, (memory, pieces), is_short=short)
        self._uses.append(Use(entry.offset, entry.offset + entry.nbytes, writes, transfer))
        return transfer

    def _users(self, entry: Entry, *, writes: bool) -> list[LaneTransfer]:
        """Give the transfers in flight that must pass first: all over the same bytes, or before a read the writes."""
        self._uses = [use for use in self._uses if not use.transfer.done]
        begin, end = entry.offset, entry.offset + entry.nbytes
        return [use.transfer for use in self._uses if use.begin < end and begin < use.end and (writes or use.writes)]
