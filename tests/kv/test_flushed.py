"""Tell a successor what of each request is in host memory, through memory that both have mapped."""

from __future__ import annotations

import os

from dejavu.device import open_device
from dejavu.kv.flushed import ROW_BYTES, FlushedRow, FlushedRows


def test_a_successor_reads_what_was_written():
    with open_device("cpu") as device, FlushedRows.allocate(device, 2, 3) as rows:
        rows.admit(FlushedRow((0, 2), 7, 0))
        rows.admit(FlushedRow((1, 0), 0, 4))
        rows.extend([FlushedRow((0, 2), 7, 5), FlushedRow((1, 0), 0, 6)])
        fd = rows.memory.export_fd()
        memory = device.import_host_fd(fd, 2 * 3 * ROW_BYTES)
        os.close(fd)
        with FlushedRows(memory, 2, 3) as again:
            assert again.lengths() == {7: 5, 0: 6}
            rows.clear()
            assert again.lengths() == {}


def test_a_late_flush_does_not_count_for_the_rows_next_request():
    with open_device("cpu") as device, FlushedRows.allocate(device, 1, 1) as rows:
        rows.admit(FlushedRow((0, 0), 1, 0))
        rows.admit(FlushedRow((0, 0), 2, 3))
        rows.extend([FlushedRow((0, 0), 1, 9)])
        assert rows.lengths() == {2: 3}
        rows.extend([FlushedRow((0, 0), 2, 4)])
        assert rows.lengths() == {2: 4}
