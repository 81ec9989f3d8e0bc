"""Replicate each pass's KV to another rank's host memory, behind the pass; both ranks derive what moves from it."""

import time
from abc import abstractmethod
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

from dejavu.device.base import Buffer, Device, Stream
from dejavu.device.pieces import Pieces
from dejavu.engine.handover import LOOK_EVERY_S, NoMover, RunTime
from dejavu.engine.messages import AllReplicated, Replicated, Report, Work
from dejavu.kv.layout import PoolLayout
from dejavu.kv.replica import ReplicaBooks, ReplicaStore, RowCopy, TokenCopier, count_bytes, list_pieces
from dejavu.kv.stream import message_key
from dejavu.measure.records import TransferRecord
from dejavu.topology import CONTROLLER
from dejavu.transport.carrier import Carrier, Gathering, Transfer
from dejavu.transport.lanes import Lanes
from dejavu.transport.mpi import Channel
from dejavu.transport.staging import move

KIND = "replica"  # in the records
TELL_EVERY_S = 0.1  # a recovery asks the stores themselves


class Copying(NamedTuple):
    """Be the copies behind one pass that are under way; without a transfer they are made."""

    microbatch: int
    step: int
    copies: Sequence[RowCopy]
    transfer: Transfer | None
    start_s: float


@dataclass(frozen=True, slots=True)
class ReplicaSource:
    """Name the memory that has all KV of a rank, in the controller's blocks, behind the work of `stream`."""

    device: Device
    pool: Buffer
    stream: Stream


class PassFollower(NoMover):
    """Post what each pass adds to a replica, when the pass was handed on, and see to it until it is there."""

    def __init__(self, layout: PoolLayout, every: int, owner: int, holder: int) -> None:
        """Follow the KV of rank `owner`, whose pool has `layout`, to `holder`, which keeps a copy."""
        self.layout = layout
        self.books = ReplicaBooks(every)
        self.owner = owner
        self.holder = holder
        self.unposted: deque[tuple[int, int, list[RowCopy]]] = deque()  # microbatch, step, what the pass has added
        self.under_way: deque[Copying] = deque()

    def end(self, work: Work) -> None:
        """Note what the pass adds; it is copied once its result is on its way."""
        note_pass(self.books, work)
        copies = self.books.due(work.microbatch, work.step)
        if copies is not None:
            self.unposted.append((work.microbatch, work.step, copies))

    def look(self) -> float:
        """Post what is due, and conclude what has arrived."""
        while self.unposted:
            microbatch, step, copies = self.unposted.popleft()
            start_s = time.monotonic()
            transfer = self.post(microbatch, step, copies)
            self.under_way.append(Copying(microbatch, step, copies, transfer, start_s))
        return self.conclude()

    def conclude(self) -> float:
        """Conclude what has arrived, in order; raise the error of a transfer that failed."""
        while self.under_way and ((transfer := self.under_way[0].transfer) is None or transfer.done):
            if transfer is not None and transfer.error:
                raise transfer.error
            self.arrived(self.under_way.popleft())
        return LOOK_EVERY_S if self.under_way else float("inf")

    def settle(self) -> None:
        """Wait until everything has arrived."""
        self.look()
        while self.under_way:
            time.sleep(LOOK_EVERY_S)
            self.conclude()

    def close(self) -> None:
        """Give back what is the mover's own."""

    @abstractmethod
    def post(self, microbatch: int, step: int, copies: Sequence[RowCopy]) -> Transfer | None:
        """Start the copies of a pass; None where they are made already."""

    @abstractmethod
    def arrived(self, copying: Copying) -> None:
        """Conclude the copies of a pass, all before which are concluded."""


class Receiving(PassFollower):
    """Be on the side that sees the copies arrive: keep the store's index, tell the controller, and record."""

    transport: str

    def __init__(self, channel: Channel, store: ReplicaStore, every: int, owner: int, holder: int) -> None:
        super().__init__(store.layout, every, owner, holder)
        self.channel = channel
        self.store = store
        self.moved: list[tuple[int, float, float]] = []  # bytes, and from when to when
        self.untold: dict[int, int] = {}  # by microbatch: the last step that is here, where the controller lags
        self.told_s = 0.0

    def arrived(self, copying: Copying) -> None:
        """Make the copies count."""
        self.store.write(copying.microbatch, copying.step, copying.copies)
        now_s = time.monotonic()
        self.moved.append((count_bytes(self.layout, copying.copies), copying.start_s, now_s))
        self.untold[copying.microbatch] = copying.step

    def conclude(self) -> float:
        """Conclude what has arrived, and tell the controller now and then."""
        pause_s = super().conclude()
        if not self.untold:
            return pause_s
        left_s = self.told_s + TELL_EVERY_S - time.monotonic()
        if left_s > 0:
            return min(pause_s, left_s)
        self.tell()
        return pause_s

    def tell(self) -> None:
        """Tell the controller what is here."""
        self.told_s = time.monotonic()
        self.channel.send(CONTROLLER, Replicated(self.owner, tuple(self.untold.items())), ring=False)
        self.untold.clear()

    def report(self, report: Report, rank: int, run_time: RunTime) -> Report:
        """Add a record for each pass, once all has arrived."""
        self.settle()
        if self.untold:
            self.tell()
        return replace(report, transfers=report.transfers + self.take_transfers(rank, run_time))

    def take_transfers(self, rank: int, run_time: RunTime) -> list[TransferRecord]:
        """Give a record for each pass whose copies have arrived."""
        route = KIND, self.transport, self.owner, self.holder
        moved, self.moved = self.moved, []
        return [TransferRecord(rank, *route, n, run_time(start_s), run_time(end_s)) for n, start_s, end_s in moved]


class DirectReplicator(Receiving):
    """Copy straight into a store that this rank has mapped, where owner and holder share a host.

    A CPU copies between two passes, when the result of one is on its way; a GPU beside the next pass.
    """

    transport = "local"

    def __init__(
        self,
        channel: Channel,
        source: ReplicaSource,
        store: ReplicaStore,
        every: int,
        holder: int,
    ) -> None:
        super().__init__(channel, store, every, channel.rank, holder)
        self.source = source
        self.lanes = Lanes(source.device, "replica", limit=1)
        in_step = source.device.properties.kind == "cpu" and source.stream is source.device.compute_stream
        self.copier = TokenCopier(store.pool, source.pool, store.layout) if in_step else None

    def post(self, microbatch: int, step: int, copies: Sequence[RowCopy]) -> Transfer | None:
        """Store the tokens."""
        if self.copier:
            self.copier.copy(copies)
            return None
        device, pool, target = self.source.device, self.source.pool, self.store.pool
        packed = list_pieces(self.layout, copies)
        pieces = Pieces(packed.source, packed.source, packed.nbytes)
        return self.lanes.run(
            packed.total_bytes,
            self.lanes.mark(self.source.stream),
            lambda lane: move(device, target, pool, pieces, Gathering.PACKED, stream=lane),
            (target, pool, pieces),
        )

    def close(self) -> None:
        """End the stream, and let go of the memory."""
        self.copier = None
        self.lanes.close()


class SendingReplicator(PassFollower):
    """Send to a holder on another host, which posts the other side by itself."""

    takes = (AllReplicated,)

    def __init__(
        self,
        channel: Channel,
        carrier: Carrier,
        source: ReplicaSource,
        layout: PoolLayout,
        every: int,
        holder: int,
        *,
        carrier_offset: int,
    ) -> None:
        """Send to world rank `holder`, which in the carrier's communicator is `carrier_offset` less."""
        super().__init__(layout, every, channel.rank, holder)
        self.channel = channel
        self.carrier_offset = carrier_offset
        self.carrier = carrier
        self.source = source
        self.is_held = False

    def post(self, microbatch: int, step: int, copies: Sequence[RowCopy]) -> Transfer | None:
        """Send the tokens, packed into one message."""
        if not copies:
            return None
        holder, pieces = self.holder - self.carrier_offset, list_pieces(self.layout, copies)
        key = step_key(self.owner, self.holder, microbatch, step)
        return self.carrier.send(holder, key, self.source.pool, pieces, stream=self.source.stream)

    def arrived(self, copying: Copying) -> None:
        """Leave it to the holder to tell."""

    def report(self, report: Report, rank: int, run_time: RunTime) -> Report:
        """Wait until the holder has all: what is on its way is lost where its carrier is closed."""
        self.settle()
        if not self.is_held:
            self.take(self.channel.receive(self.holder, self.channel.deadline_s)[1])
        return report

    def take(self, message: object) -> None:
        """Take the holder's word that it has all."""
        assert isinstance(message, AllReplicated), message
        self.is_held = True


class ReplicaHolder(Receiving):
    """Receive the replica of a rank of another host, whose passes are this rank's own too."""

    def __init__(
        self,
        channel: Channel,
        carrier: Carrier,
        store: ReplicaStore,
        every: int,
        owner: int,
        *,
        carrier_offset: int,
    ) -> None:
        """Hold for world rank `owner`, which in the carrier's communicator is `carrier_offset` less."""
        super().__init__(channel, store, every, owner, channel.rank)
        self.carrier = carrier
        self.transport = carrier.name
        self.carrier_offset = carrier_offset

    def post(self, microbatch: int, step: int, copies: Sequence[RowCopy]) -> Transfer | None:
        """Await the tokens."""
        if not copies:
            return None
        owner, key = self.owner - self.carrier_offset, step_key(self.owner, self.holder, microbatch, step)
        stream = self.carrier.device.compute_stream
        return self.carrier.receive(owner, key, self.store.pool, list_pieces(self.layout, copies), stream=stream)

    def report(self, report: Report, rank: int, run_time: RunTime) -> Report:
        """Add the records, and tell the owner that all has arrived."""
        report = super().report(report, rank, run_time)
        self.channel.send(self.owner, AllReplicated())
        return report


def note_pass(books: ReplicaBooks, work: Work) -> None:
    """Note in the books who begins with a pass, and which tokens it computes."""
    for admission in work.admissions:
        place = admission.microbatch, admission.row
        books.admit(place, admission.serial, admission.blocks, admission.num_cached)
    for row in work.rows:
        books.advance((work.microbatch, row.row), row.context + row.num_new)


def step_key(owner: int, holder: int, microbatch: int, step: int) -> int:
    """Give the key of a pass's message."""
    return message_key(-1 - microbatch, owner, holder, step, step + 1)
