"""What the two sides of an `ipc` link say to each other: fixed structures and tables of pieces, nothing pickled."""

import os
import struct
from dataclasses import dataclass
from enum import IntEnum

import numpy as np

from dejavu.device.base import IPC_HANDLE_BYTES
from dejavu.device.pieces import Pieces
from dejavu.errors import TransferError

MAX_MESSAGE_BYTES = 32 * 1024  # well under what a socket takes at once
INLINE_PIECES = 1024  # a longer table travels in a memfd of its own
_ROW_BYTES = 24  # three 64-bit integers
_KIND = struct.Struct("<B")
_REGISTER = struct.Struct(f"<IQ??{IPC_HANDLE_BYTES}s")
_POST = struct.Struct("<IqIIIQ")
_NUMBER = struct.Struct("<I")


class Kind(IntEnum):
    """Say what a message is."""

    REGISTER = 1  # receiver: here is memory that I shall receive into
    UNREGISTER = 2  # receiver: let that memory go
    POST = 3  # receiver: store the message of this key there, then write this flag
    CANCEL = 4  # receiver: forget a post
    WITHDRAWN = 5  # sender: nothing is written for that post any more
    FAIL = 6  # sender: that post will not be served, because
    GOODBYE = 7  # the carrier is being closed


@dataclass(frozen=True, slots=True)
class Register:
    """Introduce memory: by a descriptor that comes with the message, or by a 64-byte handle."""

    memory_id: int
    nbytes: int
    is_host: bool
    handle: bytes | None

    def pack(self) -> bytes:
        """Give the message."""
        has_handle = self.handle is not None
        return _KIND.pack(Kind.REGISTER) + _REGISTER.pack(
            self.memory_id, self.nbytes, self.is_host, has_handle, self.handle or b""
        )

    @classmethod
    def unpack(cls, body: bytes) -> "Register":
        """Read the message without its kind."""
        memory_id, nbytes, is_host, has_handle, handle = _REGISTER.unpack(body)
        return cls(memory_id, nbytes, is_host, handle if has_handle else None)


@dataclass(frozen=True, slots=True)
class Post:
    """Offer a place: `pieces.source` counts in the memory `memory_id`, `pieces.target` in the message."""

    number: int  # of the receive, on its side
    key: int
    memory_id: int
    word: int  # index of the flag among the receiver's
    value: int  # what the flag becomes when all is stored
    pieces: Pieces

    def pack(self) -> tuple[bytes, int | None]:
        """Give the message, and the descriptor of its table where it is too long; the caller closes it."""
        table = np.stack((self.pieces.source, self.pieces.target, self.pieces.nbytes))
        fixed = (self.number, self.key, self.memory_id, self.word, self.value, len(self.pieces))
        head = _KIND.pack(Kind.POST) + _POST.pack(*fixed)
        if len(self.pieces) <= INLINE_PIECES:
            return head + table.tobytes(), None
        return head, _store(table.tobytes())

    @classmethod
    def unpack(cls, body: bytes, fds: list[int]) -> "Post":
        """Read the message without its kind; TransferError where its table is cut short."""
        number, key, memory_id, word, value, count = _POST.unpack(body[: _POST.size])
        table = os.pread(fds[0], count * _ROW_BYTES, 0) if fds else body[_POST.size :]
        if len(table) != count * _ROW_BYTES:
            raise TransferError(f"a table of {count} pieces came as {len(table)} bytes: both sides must be one version")
        source, target, nbytes = np.frombuffer(table, dtype=np.int64).reshape(3, count)
        return cls(number, key, memory_id, word, value, Pieces(source, target, nbytes))


def pack_number(kind: Kind, number: int, text: str = "") -> bytes:
    """Give a message of a number, and a text where it is FAIL."""
    return _KIND.pack(kind) + _NUMBER.pack(number) + text.encode()[: MAX_MESSAGE_BYTES // 2]


def unpack_number(body: bytes) -> tuple[int, str]:
    """Read such a message without its kind."""
    return _NUMBER.unpack(body[: _NUMBER.size])[0], body[_NUMBER.size :].decode(errors="replace")


def split_kind(message: bytes) -> tuple[Kind, bytes]:
    """Give a message's kind and the rest; TransferError where it has none."""
    try:
        return Kind(message[0]), message[1:]
    except (ValueError, IndexError) as error:
        raise TransferError(
            f"an unknown message of {len(message)} bytes came: both sides must be one version"
        ) from error


def _store(table: bytes) -> int:
    fd = os.memfd_create("dejavu-pieces", os.MFD_CLOEXEC)
    os.pwrite(fd, table, 0)
    return fd
