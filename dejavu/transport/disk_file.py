"""The files of the `disk` carrier: one message each, with checksums of its chunks, written aside and then renamed.

    block 0 ..   header: magic, version, key, message bytes, chunk bytes, its own checksum; then one crc32 per chunk
    then         the message, padded to whole blocks

A file of a message's name is therefore whole; one that is not (a disk's fault, a stranger's write) fails its checksums.
"""

import os
import struct
import zlib
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from dejavu.errors import TransferError

BLOCK_BYTES = 4096  # what direct I/O wants addresses, offsets and lengths to be multiples of
_MAGIC = b"dvkvfile"
_FIXED = struct.Struct("<8sIqQQI")  # magic, version, key, message bytes, chunk bytes, checksum of all before and after
_VERSION = 1


@dataclass(frozen=True, slots=True)
class Header:
    """Describe a message in a file; `checksums` has shape [num_chunks], uint32."""

    key: int
    nbytes: int
    chunk_bytes: int
    checksums: tuple[int, ...]

    @property
    def num_blocks(self) -> int:
        """Give the blocks of a header with so many chunks."""
        return header_blocks(self.nbytes, self.chunk_bytes)

    def pack(self) -> bytes:
        """Give the header's blocks."""
        sums = np.array(self.checksums, dtype="<u4").tobytes()
        head = _FIXED.pack(_MAGIC, _VERSION, self.key, self.nbytes, self.chunk_bytes, 0)
        own = zlib.crc32(sums, zlib.crc32(head))
        head = _FIXED.pack(_MAGIC, _VERSION, self.key, self.nbytes, self.chunk_bytes, own)
        return (head + sums).ljust(self.num_blocks * BLOCK_BYTES, b"\0")


def header_blocks(nbytes: int, chunk_bytes: int) -> int:
    """Give the blocks that the header of a message takes."""
    return -(-(_FIXED.size + 4 * num_chunks(nbytes, chunk_bytes)) // BLOCK_BYTES)


def num_chunks(nbytes: int, chunk_bytes: int) -> int:
    """Count the chunks of a message."""
    return -(-nbytes // chunk_bytes)


def whole_blocks(nbytes: int) -> int:
    """Round up to whole blocks."""
    return -(-nbytes // BLOCK_BYTES) * BLOCK_BYTES


def read_header(path: Path) -> Header:
    """Read and check a file's header and length; TransferError says what is wrong with it."""
    try:
        with path.open("rb") as file:
            first = file.read(_FIXED.size)
            if len(first) < _FIXED.size:
                raise _broken(path, f"it is only {len(first)} bytes long")
            magic, version, key, nbytes, chunk_bytes, own = _FIXED.unpack(first)
            if magic != _MAGIC or version != _VERSION or chunk_bytes == 0:
                raise _broken(path, "it does not begin as one of this version does")
            size = os.fstat(file.fileno()).st_size
            if size != header_blocks(nbytes, chunk_bytes) * BLOCK_BYTES + whole_blocks(nbytes):
                raise _broken(path, f"a message of {nbytes} bytes does not lie in {size} bytes")
            sums = file.read(4 * num_chunks(nbytes, chunk_bytes))
    except OSError as error:
        raise TransferError(f"cannot read {path} ({error.strerror}): check the disk store's directory") from error
    if zlib.crc32(sums, zlib.crc32(_FIXED.pack(magic, version, key, nbytes, chunk_bytes, 0))) != own:
        raise _broken(path, "its header fails its checksum")
    return Header(key, nbytes, chunk_bytes, tuple(np.frombuffer(sums, dtype="<u4").tolist()))


def path_of(directory: Path, key: int) -> Path:
    """Give the name of a key's file."""
    return directory / f"{key}.kv"


def key_of(path: Path) -> int | None:
    """Give the key of a file's name, or None where it is no message."""
    try:
        return int(path.stem) if path.suffix == ".kv" else None
    except ValueError:
        return None


def _broken(path: Path, why: str) -> TransferError:
    return TransferError(f"{path.name} of the disk store is torn or corrupted ({why}): send that message again")
