"""The interface that all carriers share: messages between ranks, or to a store, cut out of memory piece by piece."""

from abc import ABC, abstractmethod
from enum import StrEnum

from dejavu.device.base import Buffer, Closing, Device, Stream
from dejavu.device.pieces import Pieces
from dejavu.errors import TransferError

DEFAULT_DEADLINE_S = 60.0
PEER_MESSAGE_BYTES = 64 << 20  # 0.2 ms between two GPUs, about what announcing and ending a message takes


class Gathering(StrEnum):
    """Say how a carrier brings the pieces of a message together (the paper's Figure 7 compares them)."""

    NAIVE = "naive"  # one copy for each piece
    PACKED = "packed"  # one kernel for all pieces, into staging or straight to where they belong


class Transfer(ABC):
    """Follow one message. It takes effect as a whole: what a failed or cancelled receive has written is void.

    Memory, pieces and stream of the call have to live, and the memory to stay as it is, until the transfer is done.
    """

    nbytes: int  # of the whole message

    @property
    @abstractmethod
    def moved_bytes(self) -> int:
        """Give the bytes that have arrived so far, as far as this side knows; `nbytes` when it is done."""

    @property
    @abstractmethod
    def done(self) -> bool:
        """Tell whether the transfer has ended, well or not; never blocks."""

    @property
    @abstractmethod
    def error(self) -> TransferError | None:
        """Give what ended the transfer early; None while it runs and after it ended well."""

    @abstractmethod
    def wait(self, deadline_s: float | None = DEFAULT_DEADLINE_S) -> None:
        """Block until the transfer has ended; raise its error, or DeadlineError after so many seconds."""

    @abstractmethod
    def order(self, stream: Stream, deadline_s: float | None = DEFAULT_DEADLINE_S) -> None:
        """Let later work of `stream` wait for this transfer, without blocking the host.

        The stream fails with DeadlineError where the transfer has not ended after so many seconds; None is no limit.
        """

    @abstractmethod
    def cancel(self) -> None:
        """End the transfer early with an error on this side; the peer's fails too, at its deadline at the latest."""


class Carrier(Closing):
    """Move messages over one kind of link. `peer` is a rank of the communicator that the carrier was made with.

    A message is `pieces.total_bytes` long. `pieces.source` are offsets in this side's memory, `pieces.target` the
    packed offsets in the message, which the pieces tile from 0 on: this orientation on both sides, so the receiving
    side's list is the one that would send the same bytes back. Both sides cut the message as they like. A list of one
    piece is a contiguous message.

    A send matches the receive with the same (peer, key), whichever is posted first; a key is used for one message at a
    time between two ranks. A store (local memory, disk) keeps what was sent to it: `peer` is then the own rank, a
    receive of a key that was never sent is an error, and it can be repeated until `forget`.

    Calls return at once; the bytes are read or written after the work that `stream` has at that time, on the carrier's
    own stream. Nothing here blocks or synchronises `stream`.
    """

    name: str
    device: Device
    gathering: Gathering
    message_bytes: int = 4 << 20  # below it a message costs its hosts more than its way: 80 us of a bus

    @abstractmethod
    def send(self, peer: int, key: int, memory: Buffer, pieces: Pieces, *, stream: Stream) -> Transfer:
        """Send a message cut out of `memory` (device or pinned host)."""

    @abstractmethod
    def receive(self, peer: int, key: int, memory: Buffer, pieces: Pieces, *, stream: Stream) -> Transfer:
        """Receive a message into the pieces of `memory`, which are valid once the transfer has ended well."""

    def forget(self, key: int) -> None:
        """Drop what a store keeps under `key`; nothing to do for a link."""


class UnavailableError(TransferError):
    """Report a carrier that cannot work here: says why, and what would make it."""


def check_message(memory: Buffer, pieces: Pieces) -> int:
    """Check that pieces lie in `memory` and tile a message; give its length. Raises TransferError."""
    nbytes = pieces.total_bytes
    pieces.check(memory.nbytes, nbytes)
    if len(pieces) == 1:  # it lies within [0, nbytes), so it is all of it
        return nbytes
    end = pieces.target + pieces.nbytes
    if (pieces.target[1:] == end[:-1]).all():  # in the message's order, as plans give them
        return nbytes
    order = pieces.target.argsort(kind="stable")
    if (pieces.target[order][1:] != end[order][:-1]).any():
        raise TransferError("the pieces of a message overlap or leave gaps: make both sides' lists from one plan")
    return nbytes
