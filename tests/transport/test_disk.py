"""What only the store on disk does: it survives restarts and torn files, and delivers no corrupted byte."""

import os
import signal
import stat
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from dejavu.device import open_device
from dejavu.errors import TransferError
from dejavu.transport.carrier import UnavailableError
from dejavu.transport.disk import DiskStore
from dejavu.transport.disk_file import BLOCK_BYTES, path_of
from tests.transport.region import Region, contents, contiguous

SIZE = (9 << 20) + 5  # three chunks


@pytest.fixture
def device():
    with open_device("cpu") as opened:
        yield opened


def send(store, device, key, seed, nbytes=SIZE):
    region = Region(device, contiguous(nbytes))
    region.write(contents(nbytes, seed))
    store.send(0, key, region.memory, region.pieces, stream=device.compute_stream).wait(30)


def receive(store, device, key, nbytes=SIZE):
    region = Region(device, contiguous(nbytes))
    store.receive(0, key, region.memory, region.pieces, stream=device.compute_stream).wait(30)
    return region.read()


@pytest.mark.parametrize("options", [{}, {"direct": False, "fsync": False}], ids=["durable", "buffered"])
def test_a_later_store_finds_what_was_complete(device, tmp_path, options):
    directory = tmp_path / "store"
    with DiskStore(device, directory, **options) as store:
        assert store.io == ("direct" if not options else "buffered (as asked for)") or store.io.startswith("buffered (")
        send(store, device, 1, seed=1)
        send(store, device, -2, seed=2, nbytes=77)
    (directory / "5.draft").write_bytes(b"cut short")
    assert stat.S_IMODE(directory.stat().st_mode) == 0o700
    assert stat.S_IMODE(path_of(directory, 1).stat().st_mode) == 0o600
    with DiskStore(device, directory, **options) as store:
        assert store.keys == {1, -2}
        assert not list(directory.glob("*.draft"))
        assert np.array_equal(receive(store, device, 1), contents(SIZE, 1))
        assert np.array_equal(receive(store, device, -2, 77), contents(77, 2))


def flip(path, offset):
    with path.open("r+b") as file:
        file.seek(offset)
        byte = file.read(1)
        file.seek(offset)
        file.write(bytes([byte[0] ^ 1]))


@pytest.mark.parametrize(
    "harm",
    [
        lambda path: flip(path, BLOCK_BYTES + 3),
        lambda path: flip(path, BLOCK_BYTES + SIZE - 1),
        lambda path: flip(path, 20),
        lambda path: flip(path, 45),
        lambda path: os.truncate(path, path.stat().st_size - BLOCK_BYTES),
        lambda path: os.truncate(path, 10),
        lambda path: path.write_bytes(b"\0" * path.stat().st_size),
    ],
    ids=["first byte", "last byte", "header", "checksums", "short", "very short", "zeros"],
)
def test_a_torn_or_corrupted_file_is_reported(device, tmp_path, harm):
    with DiskStore(device, tmp_path, fsync=False) as store:
        send(store, device, 3, seed=3)
        harm(path_of(tmp_path, 3))
        with pytest.raises(TransferError, match=r"corrupted|torn|holds"):
            receive(store, device, 3)
        send(store, device, 3, seed=4)
        assert np.array_equal(receive(store, device, 3), contents(SIZE, 4))


WRITER = """
import sys
from pathlib import Path
from dejavu.device import open_device
from dejavu.transport.disk import DiskStore
from tests.transport.region import Region, contents, contiguous
device = open_device("cpu")
store = DiskStore(device, Path(sys.argv[1]))
region = Region(device, contiguous(9 << 20))
for seed in range(1, 10_000):
    region.write(contents(9 << 20, seed))
    store.send(0, 1, region.memory, region.pieces, stream=device.compute_stream).wait()
    print(seed, flush=True)
"""


def test_a_killed_writer_leaves_the_last_whole_message(device, tmp_path):
    process = subprocess.Popen(
        [sys.executable, "-c", WRITER, str(tmp_path)], stdout=subprocess.PIPE, cwd=Path(__file__).parents[2]
    )
    seeds = [int(process.stdout.readline()) for _ in range(2)]
    time.sleep(0.03)  # amid the next one
    process.send_signal(signal.SIGKILL)
    seeds += [int(line) for line in process.communicate()[0].split()]
    with DiskStore(device, tmp_path) as store:
        found = receive(store, device, 1, 9 << 20)
        assert any(np.array_equal(found, contents(9 << 20, seed)) for seed in (seeds[-1], seeds[-1] + 1))
        assert not list(tmp_path.glob("*.draft"))


def test_a_store_belongs_to_one_user_at_a_time(device, tmp_path):
    with DiskStore(device, tmp_path), pytest.raises(UnavailableError, match="in use"):
        DiskStore(device, tmp_path)


def test_a_send_whose_key_is_forgotten_meanwhile_leaves_no_file(device, tmp_path):
    with DiskStore(device, tmp_path) as store:
        region = Region(device, contiguous(SIZE))
        transfer = store.send(0, 1, region.memory, region.pieces, stream=device.compute_stream)
        store.forget(1)
        with pytest.raises(TransferError, match="forgotten"):
            transfer.wait(30)
        assert not store.keys
        assert not list(tmp_path.glob("*"))


def test_a_disk_error_names_the_directory(device, tmp_path):
    with DiskStore(device, tmp_path / "store") as store:
        (tmp_path / "store").rename(tmp_path / "elsewhere")
        with pytest.raises(TransferError, match="check its space"):
            send(store, device, 1, seed=1, nbytes=10)
