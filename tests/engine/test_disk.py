"""KV written behind the passes: what a process leaves in its file is what its requests computed, whenever it stops."""

import errno
import os
import time
from contextlib import closing

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from dejavu.device import open_device
from dejavu.engine import disk
from dejavu.engine.disk import DiskMover, restore
from dejavu.engine.messages import Admission, Expect, RowWork, Work
from dejavu.engine.replication import ReplicaSource
from dejavu.kv.disk import KvFile
from dejavu.kv.replica import HeldRow
from dejavu.request import Request
from tests.kv.test_disk import IDENTITY, check, fill, make_layout

NUM_ROWS, ROW_LEN = 3, 12


@pytest.fixture(scope="module")
def device():
    with open_device("cpu") as opened:
        yield opened


class Owner:
    """Play a worker: each pass computes tokens, whose bytes say whose they are, in a pool that the mover reads."""

    def __init__(self, device, path, block_size=4, *, slow=False):
        self.layout = make_layout(block_size, NUM_ROWS * ROW_LEN // block_size)
        self.memory = device.allocate_exportable(self.layout.total_bytes)
        self.pool = self.memory.tensor().numpy()
        self.pool[:] = 0
        self.stream = device.create_stream("owner") if slow else device.compute_stream
        self.slow = slow
        self.source = ReplicaSource(device, self.memory, self.stream)
        self.mover = DiskMover(self.source, KvFile.create(path, IDENTITY, self.layout), 1)
        self.free = list(range(self.layout.num_blocks))
        self.rows = {}  # row → [serial, blocks, length]
        self.requests = {}  # as `check` takes them
        self.step = self.serial = 0

    def admit(self, row, cached=0):
        if row in self.rows:
            self.free += self.rows.pop(row)[1]
        per_row = ROW_LEN // self.layout.block_size
        blocks, self.free = self.free[:per_row], self.free[per_row:]
        self.serial += 1
        self.rows[row] = [self.serial, blocks, 0]
        self.mover.take(Expect(self.serial, cached, tuple(blocks)))
        self.compute(row, cached)
        return Admission(self.serial, 0, row, tuple(blocks), Request("x", (1,)), num_cached=cached)

    def compute(self, row, stop):
        serial, blocks, length = self.rows[row]
        fill(self.pool, self.layout, blocks, serial, length, stop)
        self.rows[row][2] = stop
        self.requests[serial, (0, row)] = tuple(blocks), stop

    def go(self, news, admissions=()):
        """Take a pass with so many new tokens of some rows."""
        rows = []
        for row, count in news.items():
            serial, _, length = self.rows[row]
            rows.append(RowWork(serial, row, count, length, count > 1, True, 1))
            self.compute(row, length + count)
        if self.slow:
            self.stream.submit(lambda: time.sleep(0.002))
        self.mover.end(Work(self.step, 0, tuple(rows), tuple(admissions), ()))
        self.step += 1
        self.mover.look()

    def finish(self):
        """Look until all is written."""
        deadline = time.monotonic() + 5
        while self.mover.pending or self.mover.staged or self.mover.writing:
            assert time.monotonic() < deadline
            self.mover.look()
            time.sleep(0.001)

    def close(self):
        self.mover.close()
        if self.slow:
            self.stream.close()
        self.memory.close()


def read_back(device, path, layout):
    with device.allocate_exportable(layout.total_bytes) as memory, closing(KvFile.open(path, IDENTITY, layout)) as file:
        memory.tensor().zero_()
        loaded = restore(ReplicaSource(device, memory, device.compute_stream), file)
        return memory.tensor().numpy().copy(), loaded


@settings(max_examples=15, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data(), block_size=st.sampled_from((1, 4, 12)), slow=st.booleans())
def test_file_holds_what_was_computed_whenever_its_process_stops(device, tmp_path, monkeypatch, data, block_size, slow):
    monkeypatch.setattr(disk, "POST_EVERY_S", data.draw(st.sampled_from((0.0, 10.0))))
    monkeypatch.setattr(disk, "NUM_SLOTS", 2)
    monkeypatch.setattr(disk, "CHUNK_BYTES", 5 * make_layout(4).bytes_per_token)
    with closing(Owner(device, tmp_path / "file", block_size, slow=slow)) as owner:
        for _ in range(data.draw(st.integers(1, 10))):
            admissions, news = [], {}
            for row in data.draw(st.sets(st.integers(0, NUM_ROWS - 1), min_size=1)):
                if row not in owner.rows or owner.rows[row][2] == ROW_LEN or data.draw(st.integers(0, 3)) == 0:
                    admissions.append(owner.admit(row, data.draw(st.sampled_from((0, 0, 5)))))
                length = owner.rows[row][2]
                news[row] = data.draw(st.integers(1, min(6, ROW_LEN - length))) if length == 0 else 1
            owner.go(news, admissions)
        if is_whole := data.draw(st.booleans()):
            monkeypatch.setattr(disk, "POST_EVERY_S", 0.0)
            owner.finish()
    pool, loaded = read_back(device, tmp_path / "file", owner.layout)
    assert loaded.num_broken == 0
    check(loaded.rows, pool, owner.layout, owner.requests)
    if is_whole:
        lengths = {(0, row): (serial, length) for row, (serial, _, length) in owner.rows.items()}
        assert {place: (row.serial, row.length) for place, row in loaded.rows.items()} == lengths


def test_tokens_that_are_computed_again_are_struck_out_before_the_pass_goes_on(device, tmp_path):
    with closing(Owner(device, tmp_path / "file")) as owner:
        owner.go({0: 6}, [owner.admit(0)])
        owner.finish()
        assert owner.mover.file.rows()[0, 0].length == 6
        admission = Admission(1, 0, 0, owner.requests[1, (0, 0)][0], Request("x", (1,)), num_cached=4)
        owner.mover.end(Work(1, 0, (RowWork(1, 0, 1, 4, False, True, 1),), (admission,), ()))
        assert owner.mover.file.rows()[0, 0].length == 4
        owner.mover.look()
        owner.finish()
        assert owner.mover.file.rows()[0, 0].length == 5


def test_a_successor_writes_what_the_file_lacks(device, tmp_path):
    with closing(Owner(device, tmp_path / "file")) as owner:
        owner.go({0: 6}, [owner.admit(0)])
        owner.finish()
        owner.compute(0, 8)
        owner.mover.close()
        owner.mover = DiskMover(owner.source, KvFile.open(tmp_path / "file", IDENTITY, owner.layout), 1)
        admission = Admission(1, 0, 0, owner.requests[1, (0, 0)][0], Request("x", (1,)), num_cached=8)
        owner.go({0: 1}, [admission])
        owner.finish()
        assert [moved.nbytes for moved in owner.mover.written] == [3 * owner.layout.bytes_per_token]
        assert owner.mover.file.rows()[0, 0] == HeldRow(1, 9, owner.requests[1, (0, 0)][0])


def test_a_disk_that_fails_is_told_of_once_and_done_without(device, tmp_path, capfd, monkeypatch):
    with closing(Owner(device, tmp_path / "file")) as owner:

        def refuse(*arguments):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

        monkeypatch.setattr(KvFile, "write", refuse)
        owner.go({0: 6}, [owner.admit(0)])
        deadline = time.monotonic() + 5
        while not owner.mover.is_lost and time.monotonic() < deadline:
            owner.mover.look()
        owner.go({0: 1})
        assert owner.mover.look() == float("inf")
        said = capfd.readouterr().err
        assert said.count("cannot be written (No space left on device)") == 1
        assert not (tmp_path / "file").exists()


def test_what_was_written_reaches_the_disk_twice_a_second(device, tmp_path, monkeypatch):
    monkeypatch.setattr(disk, "SYNC_EVERY_S", 0.01)
    synced = []
    sync = KvFile.sync
    monkeypatch.setattr(KvFile, "sync", lambda self: (synced.append(True), sync(self)))
    with closing(Owner(device, tmp_path / "file")) as owner:
        owner.go({0: 6}, [owner.admit(0)])
        owner.finish()
        deadline = time.monotonic() + 5
        while not synced and time.monotonic() < deadline:
            assert owner.mover.look() < 1 or owner.mover.syncing
            time.sleep(0.005)
        assert synced
        os.unlink(tmp_path / "file")
        owner.go({0: 1})
        while not owner.mover.is_lost and time.monotonic() < deadline:
            owner.mover.look()
            time.sleep(0.005)
        assert owner.mover.is_lost
