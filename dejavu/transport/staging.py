"""What carriers share: copies of pieces either way, slots of staging memory, and errors of one kind."""

import threading

from dejavu.device.base import Buffer, Closing, Device, Location, Stream
from dejavu.device.pieces import Pieces
from dejavu.errors import TransferError
from dejavu.transport.calibration import Engine, calibration_of, route_of
from dejavu.transport.carrier import Gathering
from dejavu.transport.message import coalesce

CHUNK_BYTES = 4 << 20
SHORT_BYTES, SHORT_PIECES = 256 << 10, 1024  # of a message that takes a CPU less time than to wake a thread for it


def move(
    device: Device,
    target: Buffer,
    source: Buffer,
    pieces: Pieces,
    gathering: Gathering,
    *,
    stream: Stream,
    beside_compute: bool = False,
) -> None:
    """Queue the copies of pieces: one for each, or all of them by one call. The pieces have been checked.

    What is to be moved `beside_compute` takes no multiprocessor: another engine could be faster, and cost more.
    """
    if gathering is Gathering.PACKED:
        pieces = coalesce(pieces)
    if len(pieces) > 1 and gathering is Gathering.PACKED:
        engine = choose_engine(device, target, source, pieces, beside_compute=beside_compute)
        if engine is not Engine.COPIES:
            together = device.pack if engine is Engine.DIRECT else device.copy_batch
            together(target, source, pieces, stream=stream)
            return
    rows = zip(pieces.source.tolist(), pieces.target.tolist(), pieces.nbytes.tolist(), strict=True)
    for start, to, nbytes in rows:
        if nbytes:
            device.copy(target.view(to, nbytes), source.view(start, nbytes), stream=stream)


def is_short(device: Device, pieces: Pieces, gathering: Gathering) -> bool:
    """Tell whether a message is copied at once where its bytes are ready: on a CPU, which has no engine for it."""
    if device.properties.kind != "cpu" or pieces.total_bytes > SHORT_BYTES:
        return False
    return len(pieces) == 1 or (len(pieces) <= SHORT_PIECES and gathering is Gathering.PACKED)


def choose_engine(
    device: Device, target: Buffer, source: Buffer, pieces: Pieces, *, beside_compute: bool = False
) -> Engine:
    """Choose what moves several pieces; a CPU has but one way."""
    if device.properties.kind == "cpu":
        return Engine.DIRECT
    if beside_compute:
        return Engine.BATCH
    from_host, to_host = source.location is Location.HOST, target.location is Location.HOST
    route = route_of(from_host=from_host, to_host=to_host)
    return calibration_of(device.properties.name).choose(route, len(pieces), pieces.total_bytes)


def wrap(error: BaseException) -> TransferError:
    """Give any error as the one that a transfer ends with."""
    if isinstance(error, TransferError):
        return error
    wrapped = TransferError(f"a transfer failed: {error}")
    wrapped.__cause__ = error
    return wrapped


def cancelled() -> TransferError:
    """Make the error of a transfer that its own side has cancelled."""
    return TransferError("the transfer was cancelled: what it has written is void")


class Slots(Closing):
    """Lend equal pieces of staging memory; callable from any thread. The memory is allocated by the first `take`."""

    def __init__(
        self, device: Device, *, slot_bytes: int = CHUNK_BYTES, num_slots: int = 8, location: Location = Location.HOST
    ) -> None:
        self.slot_bytes = slot_bytes
        self.num_slots = num_slots
        self._device = device
        self._location = location
        self._memory: Buffer | None = None
        self._free: list[Buffer] = []
        self._lock = threading.Lock()

    def take(self) -> Buffer | None:
        """Give a slot of `slot_bytes`, or None while all are lent."""
        with self._lock:
            if self._memory is None:
                self._allocate()
            return self._free.pop() if self._free else None

    def give(self, slot: Buffer) -> None:
        """Take a slot back, which nothing reads or writes any more."""
        with self._lock:
            self._free.append(slot)

    def close(self) -> None:
        """Free the memory."""
        with self._lock:
            self._free.clear()
            if self._memory is not None:
                self._memory.close()
                self._memory = None

    def _allocate(self) -> None:
        make = self._device.allocate_host if self._location is Location.HOST else self._device.allocate
        self._memory = make(self.slot_bytes * self.num_slots)
        self._free = [self._memory.view(i * self.slot_bytes, self.slot_bytes) for i in range(self.num_slots)]
