"""What only the store of host memory does."""

import numpy as np
import pytest

from dejavu.device import make_pieces, open_device
from dejavu.device.cpu_copy import array_at
from dejavu.errors import CapacityError, TransferError
from dejavu.transport.local import LocalStore
from tests.transport.region import Region, contents, contiguous


@pytest.fixture
def device():
    with open_device("cpu") as opened:
        yield opened


def send(store, device, key, nbytes, seed=0, **more):
    region = Region(device, contiguous(nbytes))
    region.write(contents(nbytes, seed))
    store.send(0, key, region.memory, region.pieces, stream=device.compute_stream, **more).wait(10)


def test_capacity_is_checked_and_comes_back(device):
    with LocalStore(device, 1 << 20) as store:
        send(store, device, 1, 600_000)
        with pytest.raises(CapacityError, match="does not fit"):
            send(store, device, 2, 600_000)
        assert 1 in store
        assert 2 not in store
        store.forget(1)
        send(store, device, 2, 1 << 20)
        assert store.free_bytes == 0


def test_a_view_changes_a_part_of_a_kept_message(device):
    with LocalStore(device, 1 << 20) as store:
        send(store, device, 1, 1000, seed=4)
        expected = contents(1000, 4).copy()
        expected[100:110] = 9
        device.fill(store.view(1).view(100, 10), 9, stream=device.compute_stream)
        region = Region(device, contiguous(1000))
        store.receive(0, 1, region.memory, region.pieces, stream=device.compute_stream).wait(10)
        assert np.array_equal(region.read(), expected)
        with pytest.raises(TransferError, match="key 7"):
            store.view(7)


def test_a_message_lies_in_one_piece_in_its_own_order(device):
    with LocalStore(device, 1 << 20) as store:
        region = Region(device, (make_pieces([40, 0], [0, 30], [30, 20]), 100))
        region.write(contents(50, 1))
        store.send(0, 5, region.memory, region.pieces, stream=device.compute_stream).wait(10)
        view = store.view(5)
        assert np.array_equal(array_at(view.address, (50,)), contents(50, 1))


def test_a_failed_send_leaves_nothing_under_its_key(device):
    class LostError(Exception):
        pass

    with LocalStore(device, 1 << 20) as store, device.create_stream("lost") as stream:
        region = Region(device, contiguous(100))
        stream.cancel(LostError("its peer died"))
        with pytest.raises(TransferError, match="its peer died"):
            store.send(0, 1, region.memory, region.pieces, stream=stream).wait(10)
        with pytest.raises(TransferError):
            store.receive(0, 1, region.memory, region.pieces, stream=device.compute_stream)
        send(store, device, 1, 100)  # the lane that failed is replaced


@pytest.mark.parametrize("nbytes", [1000, 1 << 20])
def test_a_short_message_of_ready_bytes_is_copied_at_once(device, nbytes):
    with LocalStore(device, 4 << 20) as store, device.allocate(4) as flag, device.create_stream("busy") as busy:
        region = Region(device, contiguous(nbytes))
        region.write(contents(nbytes, 1))
        sent = store.send(0, 1, region.memory, region.pieces, stream=device.compute_stream)
        assert sent.done or nbytes == 1 << 20
        device.wait_flag(flag, 1, stream=busy)
        held = store.send(0, 1, region.memory, region.pieces, stream=busy)  # its bytes are not ready
        behind = store.receive(0, 1, region.memory, region.pieces, stream=device.compute_stream)
        assert not held.done
        assert not behind.done
        device.write_flag(flag, 1, stream=device.compute_stream)
        behind.wait(10)
        assert held.done
