"""The files of a journal: one that grows, and closed ones that stay while a request of which they speak goes on."""

import os
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from dejavu.measure.lines import encode, make_line, read_lines
from dejavu.measure.run_directory import lock

if TYPE_CHECKING:
    from dejavu.engine.journal import Past

LOCK_S = 10.0  # that a process may take to end which had the journal before


def files_of(path: Path) -> list[Path]:
    """List the files of the journal at `path`, oldest first."""
    closed = sorted(path.parent.glob(f"{path.stem}-*{path.suffix}"))
    return [*closed, path] if path.exists() else closed


@dataclass(slots=True)
class Closed:
    """Hold a file that grows no more, and the requests of which it speaks and that have not ended."""

    path: Path
    alive: set[str]


@dataclass(slots=True)
class Book:
    """Know the requests that have not ended: their numbers, their serials, and which file speaks of them."""

    numbers: dict[str, int] = field(default_factory=dict)
    names: dict[int, str] = field(default_factory=dict)  # by serial
    serials: dict[str, int] = field(default_factory=dict)
    next_number: int = 0
    next_serial: int = 0
    alive: set[str] = field(default_factory=set)  # of which the present file speaks
    closed: list[Closed] = field(default_factory=list)

    @classmethod
    def of(cls, past: "Past", files: list[Path]) -> "Book":
        """Go on with what a journal said; any of its files may speak of any request."""
        alive = {name: progress.number for name, progress in past.requests.items() if not progress.has_ended}
        book = cls(dict(alive), next_serial=past.next_serial, alive=set(alive))
        taken = [progress.number + 1 for progress in past.requests.values()]
        book.next_number = max([len(past.requests) + past.num_ended, *taken])
        for name in alive:
            if (serial := past.requests[name].serial) >= 0:
                book.names[serial], book.serials[name] = name, serial
        book.closed = [Closed(file, set(alive)) for file in files]
        return book

    def take(self, name: str) -> int:
        """Take a request, and give its number."""
        number = self.numbers[name] = self.next_number
        self.next_number += 1
        self.alive.add(name)
        return number

    def admit(self, serial: int, name: str) -> None:
        """Take note of a request's serial."""
        if (before := self.serials.get(name)) is not None:
            del self.names[before]
        self.names[serial], self.serials[name] = name, serial
        self.next_serial = max(self.next_serial, serial + 1)
        self.alive.add(name)

    def touch(self, serial: int) -> None:
        """Note that the present file speaks of a request, unless it has ended."""
        if (name := self.names.get(serial)) is not None:
            self.alive.add(name)

    def end(self, name: str) -> int:
        """Forget a request; give its number."""
        if (serial := self.serials.pop(name, None)) is not None:
            del self.names[serial]
        self.alive.discard(name)
        for segment in self.closed:
            segment.alive.discard(name)
        return self.numbers.pop(name)

    def turn(self, path: Path) -> None:
        """Close the present file, which is `path` from now on."""
        self.closed.append(Closed(path, self.alive))
        self.alive = set()

    def take_done(self) -> list[Path]:
        """Give the closed files that speak of no request that goes on, each once."""
        done = [segment.path for segment in self.closed if not segment.alive]
        self.closed = [segment for segment in self.closed if segment.alive]
        return done


class Segments:
    """Write a journal's files: `write` and its like from the serving thread, `sync` from one other."""

    def __init__(self, path: Path, past: "Past | None", ended: Path | None, segment_bytes: int) -> None:
        """Go on behind `past`; UsageError where another process writes here. `ended` has the requests that ended."""
        self.path = path
        self.segment_bytes = segment_bytes
        self.file = open_to_append(path)
        lock(self.file, path.parent, LOCK_S)
        self.size = past.num_bytes if past else 0
        os.ftruncate(self.file, self.size)
        closed = [file for file in files_of(path) if file != path]
        self.book = Book.of(past, closed) if past else Book()
        self.standing = standing_lines(past) if past else {}
        self.last = max((number_of(file) for file in closed), default=0)
        self.ended: int | None = None
        if ended is not None:
            size = max((end for end, _ in read_lines(ended)), default=0)
            self.ended = open_to_append(ended)
            os.ftruncate(self.ended, size)
            sync_name(ended)
        if past and not self.size:
            self.size = self.write_head(self.file)
        sync_name(path)
        self.retired: list[int] = []  # files to close
        self.done: list[Path] = []  # to be removed, once what was written by now is on the disk

    def write(self, lines: str, ended: str) -> None:
        """Append lines, after those of requests that have ended; a file that is large enough is then closed."""
        if ended and self.ended is not None:
            write_all(self.ended, ended)
        self.size += write_all(self.file, lines)
        if self.size >= self.segment_bytes:
            self.turn()
        if self.book.closed and self.ended is not None:
            self.done += self.book.take_done()

    def turn(self) -> None:
        """Begin a new file with what holds of the run; no line of it may be on the disk before those of the last."""
        os.fdatasync(self.file)
        self.last += 1
        closed = self.path.with_name(f"{self.path.stem}-{self.last:06}{self.path.suffix}")
        draft = self.path.with_name(f".{self.path.name}")
        draft.unlink(missing_ok=True)
        file = open_to_append(draft)
        lock(file, self.path.parent, LOCK_S)
        self.size = self.write_head(file)
        os.fdatasync(file)
        self.path.rename(closed)
        draft.rename(self.path)
        sync_name(self.path)
        self.retired.append(self.file)
        self.book.turn(closed)
        self.file = file

    def write_head(self, file: int) -> int:
        """Write what holds of the run; give the bytes."""
        return write_all(file, "".join([*self.standing.values(), make_line(["next", self.book.next_serial])]))

    def sync(self) -> None:
        """Bring to the disk what was written, and remove what nobody will ask for."""
        done = [self.done.pop() for _ in range(len(self.done))]
        retired = [self.retired.pop() for _ in range(len(self.retired))]
        for file in [*([self.ended] if self.ended is not None else []), self.file]:
            os.fdatasync(file)
        for file in retired:
            os.close(file)
        for path in done:
            path.unlink()

    def close(self) -> None:
        """Bring all to the disk, and close the files."""
        self.sync()
        for file in (self.file, self.ended):
            if file is not None:
                os.close(file)


def sync_name(path: Path) -> None:
    """Have the disk know a file's name."""
    directory = os.open(path.parent, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(directory)
    finally:
        os.close(directory)


def standing_lines(past: "Past") -> dict[str, str]:
    """Write again what a journal says of its run."""
    lines = {"start": make_line(["start", past.origin_s, *past.origin])}
    if past.is_complete:
        lines["complete"] = make_line(["complete"])
    if past.steps:
        lines["steps"] = make_line(["steps", past.steps])
    if past.failures:
        lines["failures"] = make_line(["failures", [asdict(record) for record in past.failures]])
    return lines


def number_of(path: Path) -> int:
    """Give the number in a closed file's name."""
    return int(path.stem.rpartition("-")[2])


def open_to_append(path: Path) -> int:
    """Open a file, or make it."""
    return os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)


def write_all(file: int, text: str) -> int:
    """Write lines; give their bytes."""
    data = encode(text)
    left = memoryview(data)
    while left:
        left = left[os.write(file, left) :]
    return len(data)
