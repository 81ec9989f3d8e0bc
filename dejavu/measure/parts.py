"""What a run has recorded so far, in files that only grow: `parts/` in its directory, until the run ends well.

Each process writes its passes and its transfers to files of its own, as fixed-size binary rows: a process that is
killed, even amid a write, leaves whole rows up to its last one. Their order is that in which they ended.
"""

import heapq
import os
import secrets
import struct
import tempfile
from collections.abc import Iterable, Iterator
from contextlib import suppress
from dataclasses import fields
from operator import attrgetter
from pathlib import Path
from typing import Any, Generic, TypeVar, get_type_hints

from dejavu.measure.records import StepRecord, TransferRecord, parser

PARTS = "parts"
TEXT_BYTES = 16  # of a cell that is a word
CHUNK_ROWS = 4096  # that are read at a time
REORDERED = 1024  # rows that may have begun before one that ended earlier
Row = TypeVar("Row", StepRecord, TransferRecord)


class RowFormat(Generic[Row]):
    """Turn records into bytes and back, bit for bit."""

    def __init__(self, row_type: type[Row]) -> None:
        hints = get_type_hints(row_type)
        names = [field.name for field in fields(row_type)]
        self.row_type: type[Row] = row_type
        self.cells = attrgetter(*names)
        self.words = [n for n, name in enumerate(names) if hints[name] not in (int, float)]
        self.parsers = [parser(hints[names[n]]) for n in self.words]
        codes = {int: "q", float: "d"}
        self.struct = struct.Struct("<" + "".join(codes.get(hints[name], f"{TEXT_BYTES}s") for name in names))

    def pack(self, row: Row) -> bytes:
        """Give a row's bytes."""
        cells = list(self.cells(row))
        for n in self.words:
            cells[n] = cells[n].encode()
            assert len(cells[n]) <= TEXT_BYTES, row
        return self.struct.pack(*cells)

    def unpack(self, data: bytes) -> Iterator[Row]:
        """Give the rows of some bytes; the end of a row that was not written whole is passed over."""
        whole = len(data) // self.struct.size * self.struct.size
        for values in self.struct.iter_unpack(memoryview(data)[:whole]):
            cells: list[Any] = list(values)
            for n, parse in zip(self.words, self.parsers, strict=True):
                cells[n] = parse(cells[n].rstrip(b"\0").decode())
            yield self.row_type(*cells)


STEPS, TRANSFERS = RowFormat(StepRecord), RowFormat(TransferRecord)


class GrowingFile(Generic[Row]):
    """Collect rows, and append them to a file with one system call for all since the last `flush`."""

    def __init__(self, path: Path | None, row_format: RowFormat[Row]) -> None:
        """Write to `path`, which is made with the first row; or to a file without a name, gone with this process."""
        self.path = path
        self.format: RowFormat[Row] = row_format
        self.rows = bytearray()
        self.file: int | None = None

    def add(self, row: Row) -> None:
        """Take a row."""
        self.rows += self.format.pack(row)

    def flush(self) -> None:
        """Write what was taken."""
        if not self.rows:
            return
        if self.file is None:
            self.file = self.open()
        left = memoryview(bytes(self.rows))
        self.rows.clear()
        while left:
            left = left[os.write(self.file, left) :]

    def open(self) -> int:
        """Make the file."""
        if self.path is None:
            with tempfile.TemporaryFile() as file:
                return os.dup(file.fileno())
        return os.open(self.path, os.O_RDWR | os.O_CREAT | os.O_APPEND, 0o644)

    def chunks(self) -> Iterator[tuple[int, bytes]]:
        """Give what was written, in parts with their offsets."""
        offset = 0
        while self.file is not None and (data := os.pread(self.file, CHUNK_ROWS * self.format.struct.size, offset)):
            yield offset, data
            offset += len(data)

    def close(self) -> None:
        """Write the rest, and close the file."""
        self.flush()
        if self.file is not None:
            os.close(self.file)
            self.file = None


def new_name() -> str:
    """Name the files of this process, apart from those of every other one that takes part in the run."""
    return f"{os.getpid()}-{secrets.token_hex(4)}"


def keep_chunk(directory: Path, name: str, offset: int, data: bytes) -> None:
    """Write a chunk of another host's file into the run `directory`; the same one twice changes nothing."""
    assert "/" not in name, name
    file = os.open(parts_of(directory) / name, os.O_WRONLY | os.O_CREAT, 0o644)
    try:
        os.pwrite(file, data, offset)
    finally:
        os.close(file)


def parts_of(directory: Path) -> Path:
    """Give the directory of a run's parts; made where it is not."""
    path = directory / PARTS
    path.mkdir(exist_ok=True)
    return path


def parts_are_left(directory: Path) -> bool:
    """Tell whether a run goes on still, or was cut off: its records are in no tables then."""
    return (directory / PARTS).is_dir()


def read_steps(directory: Path) -> Iterator[StepRecord]:
    """Read the passes of all processes of a run, in the order in which they began."""
    return merge(directory, "steps", STEPS)


def read_transfers(directory: Path) -> Iterator[TransferRecord]:
    """Read the transfers of all processes of a run, in the order in which they began."""
    return merge(directory, "transfers", TRANSFERS)


def merge(directory: Path, kind: str, row_format: RowFormat[Row]) -> Iterator[Row]:
    """Read the files of one kind side by side."""
    files = sorted((directory / PARTS).glob(f"*.{kind}"))
    return heapq.merge(*(in_order(read_file(file, row_format)) for file in files), key=lambda row: row.start_s)


def read_file(path: Path, row_format: RowFormat[Row]) -> Iterator[Row]:
    """Read one file, a few rows at a time."""
    with path.open("rb") as file:
        while data := file.read(CHUNK_ROWS * row_format.struct.size):
            yield from row_format.unpack(data)


def in_order(rows: Iterable[Row]) -> Iterator[Row]:
    """Put rows that ended one after the other in the order in which they began."""
    held: list[tuple[float, int, Row]] = []
    for number, row in enumerate(rows):
        heapq.heappush(held, (row.start_s, number, row))
        if len(held) > REORDERED:
            yield heapq.heappop(held)[2]
    while held:
        yield heapq.heappop(held)[2]


def remove_parts(directory: Path) -> None:
    """Remove the parts of a run whose records are in their places."""
    for file in (directory / PARTS).glob("*"):
        file.unlink(missing_ok=True)
    with suppress(FileNotFoundError):
        (directory / PARTS).rmdir()
