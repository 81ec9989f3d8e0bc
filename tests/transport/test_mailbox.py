"""Mailboxes between two streams of CPU devices, each side in a thread; on GPUs `test_reduction.py` has them too."""

import threading
import time
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

from dejavu.device import open_device
from dejavu.errors import TransferError
from dejavu.transport.carrier import UnavailableError
from dejavu.transport.mailbox import MailboxIn, MailboxOut
from tests.transport.test_ipc import Meeting

HIDDEN, MAX_TOKENS = 24, 50


class Ends:
    """Open both sides, each with a device and a stream of its own."""

    def __init__(self):
        self.devices = [open_device("cpu"), open_device("cpu")]
        self.streams = [device.create_stream(name) for device, name in zip(self.devices, ("out", "in"), strict=True)]
        self.meeting = Meeting(2)
        self.pool = ThreadPoolExecutor(2)
        sender = self.pool.submit(self.open_out)
        receiver = self.pool.submit(self.open_in)
        self.sender, self.receiver = sender.result(20), receiver.result(20)

    def open_out(self):
        return MailboxOut(self.devices[0], self.meeting.exchange(0), stream=self.streams[0])

    def open_in(self):
        exchange = self.meeting.exchange(1)
        return MailboxIn(self.devices[1], exchange, MAX_TOKENS, HIDDEN, torch.float32, stream=self.streams[1])

    def close(self):
        for future in [self.pool.submit(side.close) for side in (self.sender, self.receiver)]:
            future.result(20)
        self.pool.shutdown()
        for stream in self.streams:
            stream.close()
        for device in self.devices:
            device.close()


@pytest.fixture
def ends():
    opened = Ends()
    yield opened
    opened.close()


def message(number, num_tokens):
    return torch.full((num_tokens, HIDDEN), float(number))


def test_messages_arrive_whole_and_in_order_though_they_fill_the_ring_many_times(ends):
    sizes = [1 + number * 7 % MAX_TOKENS for number in range(300)]
    copies = [torch.empty(size, HIDDEN) for size in sizes]

    def take():
        for copy in copies:
            hidden = ends.receiver.receive(len(copy))
            ends.devices[1].copy(copy, hidden, stream=ends.streams[1])
            ends.receiver.release()

    taking = ends.pool.submit(take)
    for number, size in enumerate(sizes):
        ends.sender.send(message(number, size))
    taking.result(20)
    ends.streams[1].synchronize(20)
    for number, copy in enumerate(copies):
        assert torch.equal(copy, message(number, len(copy))), number


def test_neither_side_waits_in_the_host_for_the_other(ends):
    start_s = time.monotonic()
    for number in range(20):
        ends.sender.send(message(number, MAX_TOKENS))  # ten times what fits
    assert time.monotonic() - start_s < 5
    assert not ends.streams[0].query()
    for _ in range(20):
        ends.receiver.receive(MAX_TOKENS)
        ends.receiver.release()
    ends.streams[0].synchronize(20)


def test_the_place_is_not_written_before_it_is_released(ends):
    for number in range(3):
        ends.sender.send(message(number, MAX_TOKENS))  # two fit
    hidden = ends.receiver.receive(MAX_TOKENS)
    ends.streams[1].synchronize(20)
    time.sleep(0.05)
    assert torch.equal(hidden, message(0, MAX_TOKENS))
    ends.receiver.release()
    ends.streams[0].synchronize(20)
    assert torch.equal(hidden, message(2, MAX_TOKENS))


def test_an_abort_lets_go_of_a_wait_for_a_dead_sender(ends):
    ends.receiver.receive(1)
    error = TransferError("the stage before is lost")
    threading.Timer(0.05, ends.receiver.abort, (error,)).start()
    with pytest.raises(TransferError, match="is lost"):
        ends.streams[1].synchronize(20)
    ends.sender.abort(error)


def test_both_sides_learn_that_one_cannot_map_the_other():
    meeting = Meeting(2)
    with open_device("cpu") as device, ThreadPoolExecutor(2) as pool:
        device.open_ipc = refuse
        receiver = pool.submit(MailboxIn, device, meeting.exchange(1), 4, HIDDEN, torch.float32)
        with open_device("cpu") as other:
            sender = pool.submit(MailboxOut, other, meeting.exchange(0))
            for side in (sender, receiver):
                with pytest.raises(UnavailableError, match="no such link"):
                    side.result(20)


def refuse(handle, nbytes):
    raise TransferError("no such link")
