"""One authenticated connection of the TCP carrier: frames in and out, without blocking.

A frame is a note; a DATA note is followed by its chunk's bytes. What is read goes straight into the memory that the
receiver names when it has checked the note; nothing is read further than that.
"""

import socket
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass

from dejavu.errors import TransferError
from dejavu.transport.notes import NOTE_BYTES, Kind, Note, unpack_note

ROUND_BYTES = 8 << 20  # read from one connection before the others have their turn


@dataclass(slots=True, eq=False)
class Frame:
    """Be one frame on its way out; `sent` is called when the kernel has all of it."""

    parts: list[memoryview]
    sent: Callable[[], None] | None


@dataclass(slots=True)
class Place:
    """Say where a chunk's bytes go, and what to call when all of them are there."""

    view: memoryview
    filled: Callable[[], None]


class Connection:
    """Own a socket whose two ends have proved who they are.

    `admit` is asked where a DATA note's bytes go: it gives a Place, or None to ask again later (until then nothing more
    is read), or raises TransferError for a note that fits no message. Any other note goes to `deliver`.
    """

    def __init__(
        self, sock: socket.socket, admit: Callable[[Note], Place | None], deliver: Callable[[Note], None]
    ) -> None:
        sock.setblocking(False)
        self.sock = sock
        self.waiting_bytes = 0
        self._admit = admit
        self._deliver = deliver
        self._out: deque[Frame] = deque()
        self._header = bytearray(NOTE_BYTES)
        self._header_bytes = 0
        self._place: Place | None = None
        self._place_bytes = 0
        self._held: Note | None = None  # a DATA note that has no place yet

    @property
    def has_output(self) -> bool:
        """Tell whether anything waits to be written."""
        return bool(self._out)

    @property
    def is_held(self) -> bool:
        """Tell whether reading waits for a place."""
        return self._held is not None

    def queue(self, note: Note, payload: memoryview | None = None, sent: Callable[[], None] | None = None) -> None:
        """Put a frame behind the others; its memory stays as it is until `sent`."""
        parts = [memoryview(note.pack())]
        if payload is not None and payload.nbytes:
            parts.append(payload)
        self._out.append(Frame(parts, sent))
        self.waiting_bytes += sum(part.nbytes for part in parts)

    def write(self) -> bool:
        """Give the kernel what it takes; True if it took anything. OSError where the peer is gone."""
        has_moved = False
        while self._out:
            frame = self._out[0]
            try:
                count = self.sock.sendmsg(frame.parts)
            except (BlockingIOError, InterruptedError):
                break
            has_moved = True
            self.waiting_bytes -= count
            if _drop(frame.parts, count):
                self._out.popleft()
                if frame.sent is not None:
                    frame.sent()
        return has_moved

    def read(self) -> bool:
        """Take what has come; True if there was anything. OSError or EOFError where the peer is gone.

        TransferError where it breaks the protocol.
        """
        taken = 0
        while taken < ROUND_BYTES and self._settle_held():
            count = self._read_payload() if self._place is not None else self._read_header()
            if not count:
                break
            taken += count
        return taken > 0

    def close(self) -> None:
        """Hang up."""
        self._out.clear()
        self.sock.close()

    def _settle_held(self) -> bool:
        """Find a place for the chunk that waits for one; False while there is none."""
        if self._held is None:
            return True
        place = self._admit(self._held)
        if place is None:
            return False
        self._held = None
        self._place, self._place_bytes = place, 0
        return True

    def _read_header(self) -> int:
        count = self._receive(memoryview(self._header)[self._header_bytes :])
        self._header_bytes += count
        if self._header_bytes == NOTE_BYTES:
            self._header_bytes = 0
            self._take(unpack_note(self._header))
        return count

    def _take(self, note: Note) -> None:
        if note.kind is Kind.DATA:
            self._held = note
        else:
            self._deliver(note)

    def _read_payload(self) -> int:
        assert self._place is not None
        view = self._place.view
        count = self._receive(view[self._place_bytes :])
        self._place_bytes += count
        if self._place_bytes == view.nbytes:
            place, self._place = self._place, None
            place.filled()
        return count

    def _receive(self, view: memoryview) -> int:
        try:
            count = self.sock.recv_into(view)
        except (BlockingIOError, InterruptedError):
            return 0
        if count == 0 and (self._header_bytes or self._place is not None):
            raise ConnectionResetError("it has closed the connection in the middle of a message")
        if count == 0:
            raise EOFError("it has closed the connection")
        return count


def _drop(parts: list[memoryview], count: int) -> bool:
    """Take the first `count` bytes off; True if nothing is left."""
    while parts and count >= parts[0].nbytes:
        count -= parts.pop(0).nbytes
    if parts and count:
        parts[0] = parts[0][count:]
    return not parts


def check_chunk(note: Note, count: int, nbytes: int) -> None:
    """Raise TransferError unless a DATA note names a chunk of a message of `count` chunks, of the length `nbytes`."""
    if note.value >= count or note.nbytes != nbytes:
        raise TransferError(f"it sent chunk {note.value} of {count} with {note.nbytes} bytes instead of {nbytes}")
