"""Tell who comes after this process how much of each request a swapped pool in host memory holds.

Two numbers for each row, in memory that the keeper has too: the serial of the request that has the row, and how many
of its tokens are in its blocks. A request is entered before its first pass, and its tokens count when their flush is
done. So of a serial that is not here no token has been computed; all that was handed over for it is in host memory.
"""

from collections.abc import Iterable
from typing import NamedTuple

import numpy as np

from dejavu.device.base import Buffer, Closing, Device
from dejavu.kv.layout import Ints
from dejavu.kv.replica import NOBODY, Place

ROW_BYTES = 2 * np.dtype(np.int64).itemsize


class FlushedRow(NamedTuple):
    """Say that a row's request has its first `length` tokens in host memory."""

    place: Place
    serial: int
    length: int


class FlushedRows(Closing):
    """Keep the numbers of all rows; one process writes them, and another reads them when that one is gone."""

    def __init__(self, memory: Buffer, num_microbatches: int, num_rows: int) -> None:
        """Take host memory over, of `ROW_BYTES` a row, with what it says."""
        self.memory = memory
        numbers = memory.view(0, ROW_BYTES * num_microbatches * num_rows).tensor().numpy().view(np.int64)
        self._rows: Ints | None = numbers.reshape(num_microbatches, num_rows, 2)

    @classmethod
    def allocate(cls, device: Device, num_microbatches: int, num_rows: int) -> "FlushedRows":
        """Make one of no requests, in memory that can be exported."""
        rows = cls(device.allocate_host_exportable(ROW_BYTES * num_microbatches * num_rows), num_microbatches, num_rows)
        rows.clear()
        return rows

    def clear(self) -> None:
        """Forget all requests."""
        assert self._rows is not None
        self._rows[:] = NOBODY, 0

    def admit(self, row: FlushedRow) -> None:
        """Enter a request in place of the one that had its row; of a process that dies amid this it is in neither."""
        assert self._rows is not None
        numbers = self._rows[row.place]
        numbers[0] = NOBODY
        numbers[1] = row.length
        numbers[0] = row.serial

    def extend(self, rows: Iterable[FlushedRow]) -> None:
        """Count tokens whose flush is done; not those of a request whose row is another one's by now."""
        assert self._rows is not None
        for row in rows:
            numbers = self._rows[row.place]
            if numbers[0] == row.serial:
                numbers[1] = row.length

    def lengths(self) -> dict[int, int]:
        """Give how many tokens of each request are in host memory, by its serial."""
        assert self._rows is not None
        return {serial: length for serial, length in self._rows.reshape(-1, 2).tolist() if serial != NOBODY}

    def close(self) -> None:
        """Unmap the memory; it stays where the keeper has it."""
        self._rows = None
        self.memory.close()
