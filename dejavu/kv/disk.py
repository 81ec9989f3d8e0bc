"""Keep a stage's KV in a file, from which it comes back when every process, and the host, were gone.

    | whose KV, of which model, in which layout | a head for each token of the pool | tokens of block 0 | block 1 | ...

A token lies in one piece, all layers of the stage together, at the place that it has in the pool. Its head says whose
token it is, with a checksum of both and of a key that no other file has. So each token stands for itself: it is whole
or it does not count, whichever pages a loss of power has let reach the disk, in whatever order. A request's KV is there
up to its first token that does not count.

What counts must also be what the request went on with. A token that is to be computed again is therefore struck out
first, with all behind it, and the disk has that before anybody goes on: see `KvFile.strike`.
"""

import json
import os
import secrets
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from dejavu.device.base import Buffer, Closing
from dejavu.errors import DejavuError
from dejavu.kv.layout import Ints, PoolLayout
from dejavu.kv.replica import HeldRow, Place, RowCopy, count_bytes

HEADER_BYTES = ALIGNMENT = 4096
MAGIC = b"dejavu kv file 1"
KEY_BYTES = 16
CHECK_AT = 16  # the byte of a head at which its checksum begins
HEAD = np.dtype([("owner", "<i8"), ("position", "<u4"), ("microbatch", "<u2"), ("row", "<u2"), ("check", "<u4")])

Bytes = npt.NDArray[np.uint8]
Heads = npt.NDArray[np.void]  # of dtype HEAD; `owner` is the request's serial and one, 0 where there is no token


class UnusableFileError(DejavuError):
    """Report that a file is not the one that was looked for, or not whole: says what is wrong with it."""


class BlockPart(NamedTuple):
    """Name tokens [start, stop) of a request, which lie in one block."""

    block: int
    start: int
    stop: int


@dataclass(frozen=True, slots=True)
class Loaded:
    """Say what of a file counts, and how many tokens in it failed their checksums."""

    rows: dict[Place, HeldRow]
    num_broken: int


def cut_blocks(blocks: Sequence[int], start: int, stop: int, size: int) -> Iterator[BlockPart]:
    """Cut a row's tokens [start, stop) where blocks end; the first of `blocks` has token 0."""
    for first in range(start - start % size, stop, size):
        yield BlockPart(blocks[first // size], max(start, first), min(first + size, stop))


def find_rows(heads: Heads, block_size: int) -> dict[Place, HeldRow]:
    """Find the requests of which there are tokens without a gap from the first on, by heads of shape [num_tokens].

    Of two requests with one row, the later one has it. A token that is there twice does not count, nor does what is
    behind it.
    """
    slots = np.flatnonzero(heads["owner"])
    used = heads[slots]
    order = np.lexsort((used["position"], used["owner"]))
    used, blocks = used[order], slots[order] // block_size
    at_home = used["position"] % block_size == slots[order] % block_size
    bounds = np.flatnonzero(np.diff(used["owner"], prepend=0, append=0))  # owners are above 0
    rows: dict[Place, HeldRow] = {}
    for begin, end in zip(bounds[:-1].tolist(), bounds[1:].tolist(), strict=True):
        own = used[begin:end]
        length = count_prefix(own, blocks[begin:end], at_home[begin:end], block_size)
        if length:
            place = int(own["microbatch"][0]), int(own["row"][0])
            table = tuple(blocks[begin : begin + length : block_size].tolist())
            rows[place] = HeldRow(int(own["owner"][0]) - 1, length, table)
    return rows


def count_prefix(own: Heads, blocks: Ints, at_home: npt.NDArray[np.bool_], block_size: int) -> int:
    """Count the tokens of one request that lie one behind the other; heads are sorted by position."""
    number = np.arange(len(own))
    same_row = (own["microbatch"] == own["microbatch"][0]) & (own["row"] == own["row"][0])
    first = np.minimum(number - number % block_size, len(own) - 1)
    good = (own["position"] == number) & at_home & same_row & (blocks == blocks[first])
    twice = np.append(own["position"][1:] == own["position"][:-1], False)
    bad = np.flatnonzero(~good | twice)
    return int(bad[0]) if len(bad) else len(own)


class KvFile(Closing):
    """Write tokens into a file, strike them out, and read back what counts. One process has it open at a time.

    Calls that read or write raise OSError. `write` may be called from another thread than the rest, but `strike` only
    while no `write` is under way.
    """

    def __init__(self, descriptor: int, path: Path, layout: PoolLayout, key: bytes) -> None:
        """Take over an open file."""
        self.descriptor = descriptor
        self.path = path
        self.layout = layout
        self.key = key
        self.num_tokens = layout.num_blocks * layout.block_size
        self.tokens_begin = tokens_begin(layout)

    @classmethod
    def create(cls, path: Path, identity: Mapping[str, Any], layout: PoolLayout) -> "KvFile":
        """Make an empty file in place of what is there, with all the space that it can come to need."""
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
        try:
            os.ftruncate(descriptor, 0)
            os.posix_fallocate(descriptor, 0, file_bytes(layout))
            key = secrets.token_bytes(KEY_BYTES)
            os.pwrite(descriptor, pack_header(key, identity), 0)
            os.fsync(descriptor)
            sync_directories(path.parent)
        except BaseException:
            os.close(descriptor)
            path.unlink(missing_ok=True)
            raise
        return cls(descriptor, path, layout, key)

    @classmethod
    def open(cls, path: Path, identity: Mapping[str, Any], layout: PoolLayout) -> "KvFile":
        """Open the file of this identity; UnusableFileError where there is another one, or it is not whole."""
        descriptor = os.open(path, os.O_RDWR | os.O_CLOEXEC | os.O_NOFOLLOW)
        try:
            key, found = unpack_header(os.pread(descriptor, HEADER_BYTES, 0))
            differing = [name for name, value in identity.items() if found.get(name) != value]
            if differing:
                raise UnusableFileError(f"it is of another {' and '.join(differing)}")
            if os.fstat(descriptor).st_size != file_bytes(layout):
                raise UnusableFileError("it does not have its size")
        except BaseException:
            os.close(descriptor)
            raise
        return cls(descriptor, path, layout, key)

    def write(self, copies: Sequence[RowCopy], packed: Bytes) -> None:
        """Write tokens; `packed` has each part of a block as [layer, k/v, token, head, head_dim], one after the other.

        A process that is killed amid this leaves no head without its token: the kernel has all that was written.
        """
        begin, layout = 0, self.layout
        for copy in copies:
            for part in cut_blocks(copy.blocks, copy.start, copy.stop, layout.block_size):
                count = part.stop - part.start
                end = begin + count * layout.bytes_per_token
                self._write_part(copy, part, to_tokens(packed[begin:end], count, layout))
                begin = end

    def _write_part(self, copy: RowCopy, part: BlockPart, tokens: Bytes) -> None:
        heads = np.zeros(len(tokens), HEAD)
        heads["owner"], heads["microbatch"], heads["row"] = copy.serial + 1, *copy.place
        heads["position"] = np.arange(part.start, part.stop)
        heads["check"] = self._checks(heads, tokens)
        slot = part.block * self.layout.block_size + part.start % self.layout.block_size
        write_all(self.descriptor, tokens, self.tokens_begin + slot * self.layout.bytes_per_token)
        write_all(self.descriptor, heads.view(np.uint8), HEADER_BYTES + slot * HEAD.itemsize)

    def _checks(self, heads: Heads, tokens: Bytes) -> list[int]:
        """Give the checksum of each token, its head and the file's key."""
        about = heads.view(np.uint8).reshape(len(heads), HEAD.itemsize)[:, :CHECK_AT].tobytes()
        width = len(about) // len(heads)
        begun = zlib.crc32(self.key)
        seeds = (zlib.crc32(about[at : at + width], begun) for at in range(0, len(about), width))
        return [zlib.crc32(token.data, seed) for token, seed in zip(tokens, seeds, strict=True)]

    def heads(self) -> Heads:
        """Read all heads."""
        return read_all(self.descriptor, HEADER_BYTES, self.num_tokens * HEAD.itemsize).view(HEAD)

    def rows(self) -> dict[Place, HeldRow]:
        """Give what was written since the host has started, unchecked: no page of it can be torn."""
        return find_rows(self.heads(), self.layout.block_size)

    def read(self, part: BlockPart) -> tuple[int, Bytes]:
        """Give how many tokens of a part are whole, and all of them as `write` takes them."""
        slot = part.block * self.layout.block_size + part.start % self.layout.block_size
        count, width = part.stop - part.start, self.layout.bytes_per_token
        tokens = read_all(self.descriptor, self.tokens_begin + slot * width, count * width).reshape(count, width)
        heads = read_all(self.descriptor, HEADER_BYTES + slot * HEAD.itemsize, count * HEAD.itemsize).view(HEAD)
        broken = np.flatnonzero(heads["check"] != self._checks(heads, tokens))
        return int(broken[0]) if len(broken) else count, from_tokens(tokens, self.layout)

    def keep_only(self, rows: Iterable[HeldRow]) -> None:
        """Strike out all that does not count, so that it never comes to count beside what is written later."""
        size, heads = self.layout.block_size, self.heads()
        is_left = np.zeros(self.num_tokens, np.bool_)
        for row in rows:
            for part in cut_blocks(row.blocks, 0, row.length, size):
                first = part.block * size
                is_left[first : first + part.stop - part.start] = True
        heads[~is_left] = 0
        write_all(self.descriptor, heads.view(np.uint8), HEADER_BYTES)
        self.sync()

    def strike(self, rows: Iterable[tuple[HeldRow, int]]) -> None:
        """Strike out each row's tokens from its so-many-th on; they are gone from the disk too when this returns."""
        size = self.layout.block_size
        for row, first in rows:
            for part in cut_blocks(row.blocks, first, row.length, size):
                begin = part.block * size + part.start % size
                nothing = np.zeros((part.stop - part.start) * HEAD.itemsize, np.uint8)
                write_all(self.descriptor, nothing, HEADER_BYTES + begin * HEAD.itemsize)
        self.sync()

    def sync(self) -> None:
        """Wait until the disk has all that was written; OSError too where the file was removed."""
        os.fdatasync(self.descriptor)
        if os.fstat(self.descriptor).st_nlink == 0:
            raise FileNotFoundError(2, "the file was removed", str(self.path))

    def close(self) -> None:
        """Close the file, which stays."""
        if self.descriptor >= 0:
            os.close(self.descriptor)
            self.descriptor = -1


def load(file: KvFile, take: Callable[[RowCopy, Bytes], None], submit: Callable[..., Any], most_bytes: int) -> Loaded:
    """Read all that counts, and give it to `take` in parts of blocks, of about `most_bytes` at a time together.

    `submit` calls a function with arguments, in a thread say, and gives a future. What does not count is struck out.
    """
    size = file.layout.block_size
    found, cut, num_broken = file.rows(), dict[Place, int](), 0
    parts = [(place, row, part) for place, row in found.items() for part in cut_blocks(row.blocks, 0, row.length, size)]
    together = max(1, most_bytes // file.layout.block_bytes)
    for begin in range(0, len(parts), together):
        reads = [(one, submit(file.read, one[2])) for one in parts[begin : begin + together]]
        for (place, row, part), done in reads:
            count, packed = done.result()
            if part.start >= cut.get(place, row.length):
                continue
            if count < part.stop - part.start:
                cut[place] = part.start + count
                num_broken += part.stop - part.start - count
            take(RowCopy(place, row.serial, row.blocks, part.start, part.stop), packed)
    whole = {place: row._replace(length=cut.get(place, row.length)) for place, row in found.items()}
    rows = {
        place: row._replace(blocks=row.blocks[: -(-row.length // size)]) for place, row in whole.items() if row.length
    }
    file.keep_only(rows.values())
    return Loaded(rows, num_broken)


def fit(layout: PoolLayout, copies: list[RowCopy], most_bytes: int) -> tuple[list[RowCopy], list[RowCopy]]:
    """Divide copies into those that fill `most_bytes`, the last one cut, and the rest."""
    room, taken = most_bytes // layout.bytes_per_token, 0
    for index, copy in enumerate(copies):
        count = copy.stop - copy.start
        if taken + count > room:
            middle = copy.start + room - taken
            head = [copy._replace(stop=middle)] if middle > copy.start else []
            return [*copies[:index], *head], [copy._replace(start=middle), *copies[index + 1 :]]
        taken += count
    assert count_bytes(layout, copies) <= most_bytes
    return copies, []


class TokenPacker:
    """Pack tokens of a pool in the host's memory as `KvFile.write` takes them, at once; it runs between two passes."""

    __slots__ = ("_source", "layout")

    def __init__(self, pool: Buffer, layout: PoolLayout) -> None:
        """Read `pool`, which stays mapped as long as this is used."""
        self.layout = layout
        shape = layout.num_blocks, 2 * layout.num_layers, layout.block_size
        token = np.dtype((np.void, layout.token_bytes))
        self._source = pool.view(0, layout.total_bytes).tensor().numpy().view(token).reshape(shape)

    def pack(self, target: Bytes, copies: Sequence[RowCopy]) -> None:
        """Copy parts of blocks one behind the other."""
        size, begin = self.layout.block_size, 0
        tokens = target.view(self._source.dtype)
        for copy in copies:
            for block, start, stop in cut_blocks(copy.blocks, copy.start, copy.stop, size):
                first = start % size
                part = self._source[block, :, first : first + stop - start]
                tokens[begin : begin + part.size].reshape(part.shape)[:] = part
                begin += part.size


def to_tokens(packed: Bytes, count: int, layout: PoolLayout) -> Bytes:
    """Turn a part of a block, [layer and k/v, token, bytes], into [token, bytes of all layers]."""
    planes = packed.reshape(2 * layout.num_layers, count, layout.token_bytes)
    return np.ascontiguousarray(planes.transpose(1, 0, 2)).reshape(count, layout.bytes_per_token)


def from_tokens(tokens: Bytes, layout: PoolLayout) -> Bytes:
    """Turn [token, bytes of all layers] into a part of a block, flat."""
    planes = tokens.reshape(len(tokens), 2 * layout.num_layers, layout.token_bytes)
    return np.ascontiguousarray(planes.transpose(1, 0, 2)).reshape(-1)


def tokens_begin(layout: PoolLayout) -> int:
    """Give the byte at which tokens begin, behind all heads."""
    heads = layout.num_blocks * layout.block_size * HEAD.itemsize
    return HEADER_BYTES + -(-heads // ALIGNMENT) * ALIGNMENT


def file_bytes(layout: PoolLayout) -> int:
    """Count the bytes of a file."""
    return tokens_begin(layout) + layout.total_bytes


def pack_header(key: bytes, identity: Mapping[str, Any]) -> bytes:
    """Write down whose KV a file has."""
    text = json.dumps(dict(identity)).encode()
    head = MAGIC + key + len(text).to_bytes(4, "little") + text
    packed = head + zlib.crc32(head).to_bytes(4, "little")
    assert len(packed) <= HEADER_BYTES, identity
    return packed.ljust(HEADER_BYTES, b"\0")


def unpack_header(packed: bytes) -> tuple[bytes, dict[str, Any]]:
    """Give a file's key and identity."""
    fixed = len(MAGIC) + KEY_BYTES + 4
    end = fixed + int.from_bytes(packed[fixed - 4 : fixed], "little")
    if packed[: len(MAGIC)] != MAGIC or packed[end : end + 4] != zlib.crc32(packed[:end]).to_bytes(4, "little"):
        raise UnusableFileError("its header is not one of this version, or broken")
    identity: dict[str, Any] = json.loads(packed[fixed:end])
    return packed[len(MAGIC) : fixed - 4], identity


def write_all(descriptor: int, data: npt.NDArray[Any], offset: int) -> None:
    """Write all bytes of an array, in as many calls as it takes."""
    left = data.reshape(-1).view(np.uint8).data
    while left:
        done = os.pwrite(descriptor, left, offset)
        left, offset = left[done:], offset + done


def read_all(descriptor: int, offset: int, nbytes: int) -> Bytes:
    """Read so many bytes; zeros behind the end of the file."""
    data = np.zeros(nbytes, np.uint8)
    left = data.data
    while left and (done := os.preadv(descriptor, [left], offset)):
        left, offset = left[done:], offset + done
    return data


def sync_directories(directory: Path) -> None:
    """Have the disk know the names of a directory, and its own."""
    for each in (directory, directory.parent):
        descriptor = os.open(each, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
