"""The thread that advances transfers, and the gates at which streams wait for them."""

import threading
import time

import pytest

from dejavu.device import open_device
from dejavu.errors import DeadlineError, TransferError
from dejavu.transport.progress import Gates, HostTransfer, Progress
from dejavu.transport.staging import Slots


@pytest.fixture
def device():
    with open_device("cpu") as opened:
        yield opened


@pytest.fixture
def gates(device):
    with Gates(device) as made:
        yield made


def steps_until(event, *, count=10**9):
    for _ in range(count):
        if event.is_set():
            return
        yield False


def test_transfers_advance_beside_each_other_and_end_by_themselves(gates):
    with Progress("test") as progress:
        events = [threading.Event() for _ in range(5)]
        transfers = [HostTransfer(10, gates) for _ in events]
        for transfer, event in zip(transfers, events, strict=True):
            progress.start(transfer, steps_until(event))
        for transfer, event in reversed(list(zip(transfers, events, strict=True))):
            assert not transfer.done
            event.set()
            transfer.wait(5)
            assert transfer.moved_bytes == 10


def test_an_idle_thread_burns_nothing(gates):
    with Progress("test") as progress:
        transfer = HostTransfer(1, gates)
        progress.start(transfer, steps_until(threading.Event(), count=3))
        transfer.wait(5)
        before = time.process_time()
        time.sleep(0.2)
        assert time.process_time() - before < 0.05


def test_streams_that_wait_go_on_or_get_the_error(device, gates):
    with device.create_stream("good") as good, device.create_stream("bad") as bad:
        first, second = HostTransfer(1, gates), HostTransfer(1, gates)
        first.order(good)
        second.order(bad)
        assert not good.query()
        with pytest.raises(DeadlineError):
            first.wait(0.01)
        first.finish()
        good.synchronize(5)
        second.finish(OSError("the disk is gone"))
        with pytest.raises(TransferError, match="the disk is gone"):
            bad.synchronize(5)
        with pytest.raises(TransferError):
            second.order(good)
        first.order(good)  # it is done: nothing to wait for
        good.synchronize(5)


def test_a_stream_waits_as_long_as_it_was_told(device, gates):
    with device.create_stream("hasty") as hasty, device.create_stream("patient") as patient:
        transfer = HostTransfer(1, gates)
        transfer.order(hasty, deadline_s=0.1)
        transfer.order(patient, deadline_s=None)
        with pytest.raises(DeadlineError, match="flag"):
            hasty.synchronize(5)
        transfer.finish()
        patient.synchronize(5)


def test_a_cancelled_transfer_withdraws_before_it_ends(gates):
    withdrawn = threading.Event()

    def steps():
        try:
            while True:
                yield False
        except TransferError:
            for _ in range(3):
                yield True
            withdrawn.set()
            raise

    with Progress("test") as progress:
        for start_late in (False, True):  # also one whose first step has not been taken
            transfer = HostTransfer(1, gates)
            if start_late:
                transfer.is_cancelled = True
            progress.start(transfer, steps())
            transfer.cancel()
            with pytest.raises(TransferError, match="cancelled"):
                transfer.wait(5)
            assert withdrawn.is_set()
            withdrawn.clear()


def test_closing_ends_what_runs(gates):
    progress = Progress("test")
    transfer = HostTransfer(1, gates)
    progress.start(transfer, steps_until(threading.Event()))
    progress.close()
    assert isinstance(transfer.error, TransferError)


def test_slots_are_lent_once(device):
    with Slots(device, slot_bytes=64, num_slots=2) as slots:
        first, second = slots.take(), slots.take()
        assert first.address != second.address
        assert slots.take() is None
        slots.give(first)
        assert slots.take().address == first.address
