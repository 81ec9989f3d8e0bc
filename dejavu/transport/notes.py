"""The notes that the two sides of a link exchange about their messages: fixed size, checked, never unpickled."""

import struct
from dataclasses import dataclass
from enum import IntEnum

from dejavu.errors import TransferError

_FORMAT = struct.Struct("<IIQQQQ")
_MAGIC = 0x314A5644
NOTE_BYTES = _FORMAT.size
LARGEST = 2**64 - 1


class Kind(IntEnum):
    """Say what a note is about. A message is named by the number that its receiver gave it."""

    OFFER = 1  # receiver: a message of `nbytes`, cut into chunks of `value` bytes, may come under `key`
    GO = 2  # sender: its chunks, of `nbytes` bytes, follow, or `value` of them have been started (nccl)
    GRANT = 3  # receiver: `value` says where they go (rma)
    CANCEL = 4  # receiver: send no more
    STOP = 5  # sender: `value` chunks were sent, no more will be
    DATA = 6  # sender: chunk `value` of `nbytes` bytes follows (tcp)
    GOODBYE = 7  # either: it answers nothing any more, for a rank was lost (mpi, rma, nccl)


@dataclass(frozen=True, slots=True)
class Note:
    """Hold one note."""

    kind: Kind
    number: int
    key: int = 0
    nbytes: int = 0
    value: int = 0

    def pack(self) -> bytes:
        """Give the NOTE_BYTES that travel."""
        return _FORMAT.pack(_MAGIC, self.kind, self.number, self.key, self.nbytes, self.value)


def unpack_note(data: bytes | bytearray | memoryview) -> Note:
    """Read a note; TransferError where the bytes are none."""
    magic, kind, number, key, nbytes, value = _FORMAT.unpack(data)
    if magic != _MAGIC or kind not in Kind.__members__.values():
        raise TransferError(f"a peer sent a malformed note of kind {kind}: all ranks must run the same version")
    return Note(Kind(kind), number, key, nbytes, value)
