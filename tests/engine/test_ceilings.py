import pytest

from dejavu.device import open_device
from dejavu.engine.ceilings import measure_ceilings
from dejavu.measure.recorder import MemoryRecorder
from dejavu.measure.records import TransferRecord


@pytest.fixture
def device():
    with open_device("cpu") as opened:
        yield opened


def sizes_of(*moves):
    recorder = MemoryRecorder()
    recorder.add_transfers(TransferRecord(1, *move[:2], 1, 2, move[2], 0.0, 1.0) for move in moves)
    return recorder.sizes


def test_a_copy_as_long_as_the_median_of_each_kind(device):
    moves = [("fetch", "local", size) for size in (1 << 20, 1 << 10, 3 << 20)] + [("flush", "local", 4096)]
    found = measure_ceilings(device, sizes_of(*moves, ("handover", "ipc", 1 << 20), ("replica", "local", 0)), 3)
    assert [(c.rank, c.kind, c.transport, c.bytes) for c in found] == [
        (3, "fetch", "local", 1 << 20),
        (3, "flush", "local", 4096),
    ]
    assert all(0.001 < ceiling.gbps < 10_000 for ceiling in found)


def test_no_ceiling_where_memory_is_short(device, monkeypatch):
    monkeypatch.setattr(device, "free_bytes", lambda: 1 << 20)
    assert measure_ceilings(device, sizes_of(("fetch", "local", 1 << 20)), 1) == []
