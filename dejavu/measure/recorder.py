"""Where a worker's records go while it serves: into memory, for a report at the end, or into files as they come."""

from collections import deque
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Protocol

from dejavu.measure.parts import STEPS, TRANSFERS, GrowingFile, new_name, parts_of
from dejavu.measure.records import StepRecord, TransferRecord

MOST_SIZES = 1000  # of transfers of one kind that are remembered


class Sizes(dict[tuple[str, str], deque[int]]):
    """Hold the bytes of the last transfers, by kind and carrier."""

    def note(self, transfer: TransferRecord) -> None:
        """Take a transfer of any bytes."""
        if transfer.bytes:
            self.setdefault((transfer.kind, transfer.transport), deque(maxlen=MOST_SIZES)).append(transfer.bytes)


class Recorder(Protocol):
    """Take records; what lies in memory at the end goes into the report."""

    steps: list[StepRecord]
    transfers: list[TransferRecord]
    sizes: Sizes

    def add_step(self, step: StepRecord) -> None:
        """Take a pass."""

    def add_transfers(self, transfers: Iterable[TransferRecord]) -> None:
        """Take transfers."""

    def flush(self) -> None:
        """Bring what was taken to where it outlives this process, if there is such a place; twice a second."""

    def chunks(self) -> Iterator[tuple[str, int, bytes]]:
        """Give what only this host has, as parts of named files with their offsets."""

    def close(self) -> None:
        """Flush, and give files back."""


class MemoryRecorder:
    """Hold all records."""

    def __init__(self) -> None:
        self.steps: list[StepRecord] = []
        self.transfers: list[TransferRecord] = []
        self.sizes = Sizes()

    def add_step(self, step: StepRecord) -> None:
        """Take a pass."""
        self.steps.append(step)

    def add_transfers(self, transfers: Iterable[TransferRecord]) -> None:
        """Take transfers."""
        for transfer in transfers:
            self.transfers.append(transfer)
            self.sizes.note(transfer)

    def flush(self) -> None:
        """Have no better place."""

    def chunks(self) -> Iterator[tuple[str, int, bytes]]:
        """Have no files."""
        return iter(())

    def close(self) -> None:
        """Have nothing to give back."""


class FileRecorder:
    """Write records to files of this process in the run's directory, so that memory has those since the last flush.

    Where this host does not see that directory, they are nameless files of its own, and handed in at the end.
    """

    def __init__(self, directory: Path) -> None:
        """Write to the parts of a run `directory`."""
        self.steps: list[StepRecord] = []  # none: they are in the files
        self.transfers: list[TransferRecord] = []
        self.sizes = Sizes()
        self.is_shared = directory.is_dir()
        name = new_name()
        names = [f"{name}.steps", f"{name}.transfers"]
        paths = [parts_of(directory) / each if self.is_shared else None for each in names]
        self.step_file = GrowingFile(paths[0], STEPS)
        self.transfer_file = GrowingFile(paths[1], TRANSFERS)
        self.files: dict[str, GrowingFile[StepRecord] | GrowingFile[TransferRecord]] = {
            names[0]: self.step_file,
            names[1]: self.transfer_file,
        }

    def add_step(self, step: StepRecord) -> None:
        """Take a pass."""
        self.step_file.add(step)

    def add_transfers(self, transfers: Iterable[TransferRecord]) -> None:
        """Take transfers."""
        for transfer in transfers:
            self.transfer_file.add(transfer)
            self.sizes.note(transfer)

    def flush(self) -> None:
        """Write what was taken."""
        for file in self.files.values():
            file.flush()

    def chunks(self) -> Iterator[tuple[str, int, bytes]]:
        """Give the nameless files' contents."""
        if not self.is_shared:
            for name, file in self.files.items():
                for offset, data in file.chunks():
                    yield name, offset, data

    def close(self) -> None:
        """Write the rest, and close the files."""
        for file in self.files.values():
            file.close()
