"""What the links between ranks share: how the two sides of a message find each other, begin, end and withdraw.

The receiver offers: a note with a number for the message, its key and length. The sender matches the offer with a send
of that key, checks the length, says GO and hands chunks to the wire. So no byte travels that nobody waits for, and
messages match by key whichever side was posted first. Whoever gives up says so (CANCEL, STOP with the number of chunks
that were sent), and a transfer ends only when the wire has let go of its memory. Everything here but `send` and
`receive` runs on the carrier's progress thread; the wire belongs to that thread.
"""

import ctypes
import threading
import time
from abc import abstractmethod
from collections import Counter, defaultdict, deque
from collections.abc import Callable
from typing import ClassVar, TypeVar

from dejavu.device.base import Buffer, Closing, Device, Event, Location, Stream
from dejavu.device.pieces import Pieces
from dejavu.errors import PeerLostError, TransferError
from dejavu.transport.carrier import Carrier, Gathering, Transfer, check_message
from dejavu.transport.notes import LARGEST, Kind, Note
from dejavu.transport.parcels import Incoming, Outgoing, Staging
from dejavu.transport.progress import Gates, HostTransfer, Progress, Steps, until
from dejavu.transport.staging import Slots

_PR_SET_TIMERSLACK = 29
MAX_OFFERS = 1 << 16  # of one peer, waiting for their sends
WITHDRAW_S = 5.0  # how long a side that gives up waits for the other one
BUSY_S = 30e-6  # how long the thread looks again at once; more would keep the interpreter from the other threads
SHORTEST_NAP_S = 20e-6
CUDA_NAP_S = 1e-4  # at most, while transfers are under way
TIMER_SLACK_NS = 1000  # by how much a nap may be longer; the default is 50,000
LINGER_S = 20e-3  # how long it goes on looking after the last transfer
Side = TypeVar("Side", Outgoing, Incoming)


class Wire(Closing):
    """Move notes and chunks to and from other ranks. `lost` names the peers that are gone, and why.

    Those that `left` have closed their carriers: what they sent still comes, but they answer nothing.
    """

    def __init__(self, rank: int, size: int) -> None:
        self.rank = rank
        self.size = size
        self.longest_nap_s = 2e-3  # while transfers are under way
        self.idle_nap_s: float | None = None  # without any; None where the wire can always wake the thread
        self.lost: dict[int, str] = {}
        self.left: set[int] = set()
        self.users: Counter[int] = Counter()  # transfers under way, by peer
        self.deliver: Callable[[int, Note], None] = lambda peer, note: None  # these two are the carrier's
        self.find: Callable[[int, int], Incoming | None] = lambda peer, number: None

    @abstractmethod
    def post(self, peer: int, note: Note) -> None:
        """Send a note; notes to one peer arrive in order. A lost peer gets none."""

    @abstractmethod
    def poll(self) -> bool:
        """Deliver the notes that have come, note lost peers; True if there was anything."""

    @abstractmethod
    def push(self, parcel: Outgoing) -> bool:
        """Take chunks of a message that the receiver waits for, give back those that are out; True if any were."""

    @abstractmethod
    def pull(self, parcel: Incoming) -> bool:
        """Fill chunks of a message that the sender has begun; True if any arrived."""

    @abstractmethod
    def abandon(self, parcel: Outgoing | Incoming) -> None:
        """Let go of a message's memory at once, as far as that is possible: its peer is lost, or hangs."""

    @abstractmethod
    def nap(self, seconds: float | None) -> None:
        """Sleep until something comes or `wake` is called, at most so long; None is without a limit."""

    @abstractmethod
    def wake(self) -> None:
        """End a nap; callable from any thread."""

    def is_imminent(self) -> bool:
        """Tell whether bytes travel now whose end only a look finds out."""
        return False

    def begin(self, parcel: Outgoing) -> None:
        """Say GO to the receiver of a message whose bytes are ready."""
        self.post(parcel.peer, Note(Kind.GO, parcel.number, nbytes=parcel.chunk_bytes))

    def began(self, parcel: Incoming, note: Note) -> None:
        """Take what a GO says about a message."""

    def granted(self, parcel: Outgoing, note: Note) -> None:
        """Take what a GRANT says about a message."""

    def ended(self, parcel: Outgoing | Incoming) -> None:
        """Give back what a message has held; called once, whatever its end."""

    def lose(self, peer: int, reason: object) -> None:
        """Note that a peer is gone; its transfers find out at their next step."""
        self.lost.setdefault(peer, str(reason))


class LinkProgress(Progress):
    """Advance transfers, and sleep where the wire can wake the thread."""

    def __init__(self, name: str, wire: Wire) -> None:
        super().__init__(name)
        self._wire = wire
        self._was_woken = False

    def begin(self, device: Device) -> None:
        """Start the thread: the peers' notes want answers before the first transfer too."""
        name = f"carrier-{self._name}"
        self._thread = threading.Thread(target=self._run, args=(device,), name=name, daemon=True)
        self._thread.start()

    def start(self, transfer: HostTransfer, steps: Steps) -> None:
        """Advance `steps` from now on."""
        super().start(transfer, steps)
        self._wire.wake()

    def wake(self) -> None:
        """Look again at once."""
        self._wire.wake()

    def close(self) -> None:
        """Cancel what still runs, and end the thread."""
        with self._wake:
            self._is_closing = True
            for transfer, _ in self._tasks:
                transfer.is_cancelled = True
        self._wire.wake()
        super().close()

    def _run(self, device: Device) -> None:
        set_timer_slack(TIMER_SLACK_NS)
        super()._run(device)

    def _rest(self, idle_s: float) -> bool:
        with self._wake:
            has_tasks, is_closing = bool(self._tasks), self._is_closing
        if is_closing and not has_tasks:
            return False
        if not has_tasks and idle_s > LINGER_S:
            self._wire.nap(self._wire.idle_nap_s)
            self._was_woken = True  # by something that may take more than one look to be seen
        elif idle_s > BUSY_S:
            longest_s = SHORTEST_NAP_S if self._wire.is_imminent() else self._wire.longest_nap_s
            self._wire.nap(min(longest_s, max(SHORTEST_NAP_S, idle_s / 8)))
        return True

    def _round(self) -> bool:
        has_moved, self._was_woken = self._wire.poll() or self._was_woken, False
        return super()._round() or has_moved


class LinkCarrier(Carrier):
    """Be a carrier over a wire."""

    staging_location: ClassVar[Location] = Location.HOST
    direct_bytes: ClassVar[int] = 0  # of a chunk that needs no slot; 0: as long as a slot

    def __init__(self, device: Device, wire: Wire, gathering: Gathering, *, chunk_bytes: int, num_slots: int) -> None:
        self.device = device
        self.gathering = gathering
        self.wire = wire
        self._gates = Gates(device)
        if device.properties.kind != "cpu":  # where no stream can wake the thread, and cores are many
            wire.longest_nap_s = min(wire.longest_nap_s, CUDA_NAP_S)
        # On a CPU the progress thread copies by itself; elsewhere each direction has a stream.
        self._own_streams = (
            [] if device.properties.kind == "cpu" else [device.create_stream(f"{self.name}-{i}") for i in range(2)]
        )
        streams = self._own_streams or [device.compute_stream] * 2
        self._out, self._in = (self._staging(stream, chunk_bytes, num_slots) for stream in streams)
        self._offers: defaultdict[tuple[int, int], deque[Note]] = defaultdict(deque)
        self._num_offers: Counter[int] = Counter()
        self._outgoing: dict[tuple[int, int], Outgoing] = {}
        self._incoming: dict[tuple[int, int], Incoming] = {}
        self._last_number = 0
        wire.deliver = self._deliver
        wire.find = lambda peer, number: self._incoming.get((peer, number))
        self._progress = LinkProgress(self.name, wire)
        self._progress.begin(device)

    def send(self, peer: int, key: int, memory: Buffer, pieces: Pieces, *, stream: Stream) -> Transfer:
        """Send once the peer has posted the receive."""
        self._check(peer, key, memory, pieces)
        parcel = Outgoing(peer, key, memory, pieces, self._out)
        return self._start(parcel, self._send_steps(parcel, self._mark(stream)))

    def receive(self, peer: int, key: int, memory: Buffer, pieces: Pieces, *, stream: Stream) -> Transfer:
        """Offer to receive, after what `stream` has to do with the memory."""
        self._check(peer, key, memory, pieces)
        parcel = Incoming(peer, key, memory, pieces, self._in)
        return self._start(parcel, self._receive_steps(parcel, self._mark(stream)))

    def close(self) -> None:
        """End what still runs with an error, and give everything back."""
        self._progress.close()
        self.wire.close()
        for stream in self._own_streams:
            stream.close()
        self._own_streams.clear()
        self._out.slots.close()
        self._in.slots.close()
        self._gates.close()

    def reaches(self, memory: Buffer) -> bool:
        """Tell whether the wire moves such memory itself: here, the host's."""
        return self.device.properties.kind == "cpu" or memory.location is Location.HOST

    def _staging(self, stream: Stream, chunk_bytes: int, num_slots: int) -> Staging:
        slots = Slots(self.device, slot_bytes=chunk_bytes, num_slots=num_slots, location=self.staging_location)
        return Staging(self.device, stream, slots, self.gathering, self.reaches, self.direct_bytes or chunk_bytes)

    def _check(self, peer: int, key: int, memory: Buffer, pieces: Pieces) -> None:
        if not 0 <= peer < self.wire.size or peer == self.wire.rank:
            others = f"one of the {self.wire.size - 1} others"
            raise TransferError(f"{self.name} leads from rank {self.wire.rank} to {others}, not to rank {peer}")
        assert 0 <= key <= LARGEST, key
        check_message(memory, pieces)

    def _mark(self, stream: Stream) -> Event:
        event = self.device.create_event()
        event.record(stream)
        return event

    def _start(self, parcel: Outgoing | Incoming, steps: Steps) -> Transfer:
        transfer = parcel.transfer = HostTransfer(parcel.nbytes, self._gates)
        self._progress.start(transfer, self._counted(parcel.peer, steps))
        return transfer

    def _counted(self, peer: int, steps: Steps) -> Steps:
        self.wire.users[peer] += 1
        try:
            yield from steps
        finally:
            self.wire.users[peer] -= 1

    def _send_steps(self, parcel: Outgoing, ready: Event) -> Steps:
        yield from self._after(ready)
        yield from self._match(parcel)
        self._outgoing[parcel.peer, parcel.number] = parcel
        try:
            self.wire.begin(parcel)
            while parcel.returned < parcel.count:
                self._check_peer(parcel)
                yield self.wire.push(parcel)
        except Exception:
            yield from self._stop(parcel)
            raise
        finally:
            del self._outgoing[parcel.peer, parcel.number]
            self.wire.ended(parcel)

    def _match(self, parcel: Outgoing) -> Steps:
        while (offer := self._next_offer(parcel.peer, parcel.key)) is None:
            self._check_peer(parcel)
            yield False
        parcel.number = offer.number
        is_cut_alike = self.direct_bytes > 0 or offer.value == parcel.chunk_bytes
        if offer.nbytes != parcel.nbytes or offer.value == 0 or not is_cut_alike:
            self.wire.post(parcel.peer, Note(Kind.STOP, parcel.number))
            raise TransferError(
                f"rank {parcel.peer} expects {offer.nbytes} bytes in chunks of {offer.value} under key {parcel.key}, "
                f"this rank sends {parcel.nbytes} in chunks of {parcel.chunk_bytes}: "
                "make both sides' lists from one plan"
            )
        parcel.agree(min(parcel.chunk_bytes, offer.value))

    def _next_offer(self, peer: int, key: int) -> Note | None:
        offers = self._offers.get((peer, key))
        if not offers:
            return None
        offer = offers.popleft()
        self._num_offers[peer] -= 1
        if not offers:
            del self._offers[peer, key]
        return offer

    def _stop(self, parcel: Outgoing) -> Steps:
        """Send no more, and wait until the wire has let go of what it has."""
        parcel.limit = parcel.sent
        self.wire.post(parcel.peer, Note(Kind.STOP, parcel.number, value=parcel.sent))
        yield from self._withdraw(parcel, lambda: parcel.returned == parcel.sent, self.wire.push)

    def _receive_steps(self, parcel: Incoming, ready: Event) -> Steps:
        yield from self._after(ready)
        self._last_number += 1
        parcel.number = self._last_number
        self._incoming[parcel.peer, parcel.number] = parcel
        self.wire.post(parcel.peer, Note(Kind.OFFER, parcel.number, parcel.key, parcel.nbytes, parcel.chunk_bytes))
        try:
            while not parcel.is_going or parcel.landed < parcel.limit:
                self._check_peer(parcel)
                yield self._pull(parcel)
        except Exception:
            yield from self._refuse(parcel)
            raise
        finally:
            del self._incoming[parcel.peer, parcel.number]
            self.wire.ended(parcel)
        if parcel.error is not None:
            raise parcel.error

    def _pull(self, parcel: Incoming) -> bool:
        if parcel.failure is not None and not parcel.is_void:
            raise parcel.failure
        has_landed = parcel.poll()
        return (parcel.is_going and self.wire.pull(parcel)) or has_landed

    def _refuse(self, parcel: Incoming) -> Steps:
        """Ask for no more, drop what is on its way, and wait until the sender has said how much that is."""
        parcel.is_void = True
        if not parcel.is_stopped:
            self.wire.post(parcel.peer, Note(Kind.CANCEL, parcel.number))
        yield from self._withdraw(parcel, lambda: parcel.is_stopped and parcel.landed >= parcel.limit, self._pull)

    def _withdraw(self, parcel: Side, is_over: Callable[[], bool], step: Callable[[Side], bool]) -> Steps:
        end_s = time.monotonic() + WITHDRAW_S
        while not is_over():
            if parcel.peer in self.wire.lost or parcel.peer in self.wire.left or time.monotonic() > end_s:
                self.wire.abandon(parcel)
                break
            yield step(parcel)
        yield from until(parcel.settle)

    def _after(self, ready: Event) -> Steps:
        try:
            yield from until(ready.query)
        finally:
            ready.close()

    def _check_peer(self, parcel: Outgoing | Incoming) -> None:
        if reason := self.wire.lost.get(parcel.peer):
            raise TransferError(f"rank {parcel.peer} is lost ({reason})") from PeerLostError(reason)
        if isinstance(parcel, Outgoing) and parcel.error is not None:
            raise parcel.error

    def _deliver(self, peer: int, note: Note) -> None:
        """Take a note; one about a message that has ended means nothing any more."""
        at = peer, note.number
        if note.kind is Kind.OFFER:
            self._take_offer(peer, note)
        elif note.kind is Kind.CANCEL:
            self._take_cancel(peer, note)
        elif note.kind is Kind.GRANT and at in self._outgoing:
            self.wire.granted(self._outgoing[at], note)
        elif note.kind is Kind.GO and at in self._incoming:
            self._take_go(self._incoming[at], note)
        elif note.kind is Kind.STOP and at in self._incoming:
            take_stop(self._incoming[at], note)
        elif note.kind is Kind.GOODBYE:
            self.wire.left.add(peer)

    def _take_go(self, parcel: Incoming, note: Note) -> None:
        if not parcel.is_going:
            if not 0 < note.nbytes <= parcel.chunk_bytes:
                self.wire.lose(parcel.peer, f"it sends chunks of {note.nbytes} bytes, not of {parcel.chunk_bytes}")
                return
            parcel.agree(note.nbytes)
            parcel.is_going = True
        self.wire.began(parcel, note)

    def _take_offer(self, peer: int, note: Note) -> None:
        if self._num_offers[peer] >= MAX_OFFERS:
            self.wire.lose(peer, f"it has offered to receive {MAX_OFFERS} messages that nobody sends")
            return
        self._num_offers[peer] += 1
        self._offers[peer, note.key].append(note)

    def _take_cancel(self, peer: int, note: Note) -> None:
        parcel = self._outgoing.get((peer, note.number))
        if parcel is not None:
            parcel.error = TransferError(f"rank {peer} cancelled the receive, or it failed there")
            return
        value = 0 if self._drop_offer(peer, note.number) else LARGEST
        self.wire.post(peer, Note(Kind.STOP, note.number, value=value))

    def _drop_offer(self, peer: int, number: int) -> bool:
        for (other, _), offers in self._offers.items():
            for offer in offers:
                if (other, offer.number) == (peer, number):
                    offers.remove(offer)
                    self._num_offers[peer] -= 1
                    return True
        return False


def set_timer_slack(nanoseconds: int) -> None:
    """Make the sleeps of the calling thread exact; where the kernel refuses, they stay longer."""
    ctypes.CDLL(None).prctl(_PR_SET_TIMERSLACK, ctypes.c_ulong(nanoseconds))


def take_stop(parcel: Incoming, note: Note) -> None:
    """End a message at what was sent of it; that is an error unless it was all."""
    parcel.is_going = parcel.is_stopped = True
    if note.value < LARGEST:
        parcel.limit = min(parcel.count, note.value)
        parcel.error = TransferError(f"rank {parcel.peer} cancelled the send, or it failed there")
