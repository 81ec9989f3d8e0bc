"""What only the `ipc` carrier does; both ranks live in this process, one thread each while they connect."""

import os
import threading
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch

from dejavu.device import make_pieces, open_device
from dejavu.errors import DeadlineError, TransferError
from dejavu.transport import ipc_line
from dejavu.transport.carrier import UnavailableError
from dejavu.transport.ipc import IpcCarrier
from dejavu.transport.ipc_messages import Kind, Post, Register, pack_number, split_kind, unpack_number
from dejavu.transport.ipc_transfers import IpcReceive
from tests.transport.region import Region, contents, contiguous, scattered


class Meeting:
    """Be an allgather between threads."""

    def __init__(self, size):
        self.barrier = threading.Barrier(size, timeout=20)
        self.data = [b""] * size

    def exchange(self, rank):
        def gather(data):
            self.data[rank] = data
            self.barrier.wait()
            result = list(self.data)
            self.barrier.wait()
            return result

        return gather


@pytest.fixture
def device():
    with open_device("cpu") as opened:
        yield opened


def connect(device, size):
    meeting = Meeting(size)
    with ThreadPoolExecutor(size) as pool:
        return list(pool.map(lambda rank: IpcCarrier(device, rank, meeting.exchange(rank)), range(size)))


@pytest.fixture
def pair(device):
    carriers = connect(device, 2)
    yield carriers
    for carrier in carriers:
        carrier.close()


def move(device, pair, region, into, key=1):
    sending = pair[0].send(1, key, region.memory, region.pieces, stream=device.compute_stream)
    receiving = pair[1].receive(0, key, into.memory, into.pieces, stream=device.compute_stream)
    receiving.wait(10)
    sending.wait(10)
    assert np.array_equal(into.read(), region.read())


def test_a_send_finds_the_post_that_has_come_while_the_thread_sleeps(device, pair):
    region, into = Region(device, contiguous(3000)), Region(device, contiguous(3000))
    region.write(contents(3000, 1))
    with pair[0]._lock:  # which the thread needs to listen
        receiving = pair[1].receive(0, 1, into.memory, into.pieces, stream=device.compute_stream)
        sending = pair[0].send(1, 1, region.memory, region.pieces, stream=device.compute_stream)
        receiving.wait(10)
        sending.wait(10)
    assert np.array_equal(into.read(), region.read())


def test_a_send_finds_that_its_peer_has_left_while_the_thread_sleeps(device):
    first, second = connect(device, 2)
    region = Region(device, contiguous(3000))
    with first._lock:
        second.close()
        with pytest.raises(TransferError, match="rank 1 has closed its ipc carrier"):
            first.send(1, 1, region.memory, region.pieces, stream=device.compute_stream).wait(10)
    first.close()


def test_four_ranks_reach_each_other(device):
    carriers = connect(device, 4)
    regions = {(a, b): Region(device, scattered(5000, 9, 4 * a + b)) for a in range(4) for b in range(4) if a != b}
    for (a, b), region in regions.items():
        region.write(contents(5000, 4 * a + b))
        carriers[a].send(b, 7, region.memory, region.pieces, stream=device.compute_stream)
    for a, b in regions:
        into = Region(device, contiguous(5000))
        carriers[b].receive(a, 7, into.memory, into.pieces, stream=device.compute_stream).wait(10)
        assert np.array_equal(into.read(), contents(5000, 4 * a + b))
    for carrier in carriers:
        carrier.close()


def test_ranks_that_cannot_share_memory_are_named(device, monkeypatch):
    hosts = iter(["a/1", "b/2"])
    monkeypatch.setattr(ipc_line, "this_host", lambda: next(hosts))
    first, second = connect(device, 2)
    region = Region(device, contiguous(10))
    for carrier, peer in ((first, 1), (second, 0)):
        with pytest.raises(UnavailableError, match="use mpi, tcp or nccl"):
            carrier.send(peer, 1, region.memory, region.pieces, stream=device.compute_stream)
        assert "b/2" in carrier.unavailable(peer)
    with pytest.raises(UnavailableError, match="rank 5"):
        first.receive(5, 1, region.memory, region.pieces, stream=device.compute_stream)
    first.close()
    second.close()


def test_memory_without_a_descriptor_is_refused_as_a_target_only(device, pair):
    with device.register_host(torch.zeros(100, dtype=torch.uint8)) as plain:
        pieces = make_pieces([0], [0], [100])
        with pytest.raises(UnavailableError, match="allocate_exportable"):
            pair[1].receive(0, 1, plain, pieces, stream=device.compute_stream)
        into = Region(device, contiguous(100))
        receiving = pair[1].receive(0, 1, into.memory, into.pieces, stream=device.compute_stream)
        pair[0].send(1, 1, plain, pieces, stream=device.compute_stream).wait(10)
        receiving.wait(10)
        assert not into.read().any()


def test_a_buffer_is_introduced_once_and_can_be_withdrawn(device, pair):
    region, into = Region(device, contiguous(3000)), Region(device, contiguous(3000))
    for seed in range(5):
        region.write(contents(3000, seed))
        move(device, pair, region, into)
    assert len(pair[0]._peers[1].imports._mapped) == 1
    pair[1].unregister(into.memory)
    move(device, pair, region, Region(device, contiguous(3000)))  # behind the withdrawal, on the same line
    assert len(pair[0]._peers[1].imports._mapped) == 1
    move(device, pair, region, into)  # a withdrawn one is introduced anew
    assert len(pair[0]._peers[1].imports._mapped) == 2


def test_nothing_is_written_behind_a_cancelled_receive(device, pair):
    """Cancel a receive whose copies wait on the sender's stream: it ends only when they have."""
    region, into = Region(device, contiguous(1000)), Region(device, contiguous(1000))
    flag = device.allocate_host(4)
    with device.create_stream("held") as held:
        device.wait_flag(flag, 1, stream=held)
        receiving = pair[1].receive(0, 1, into.memory, into.pieces, stream=device.compute_stream)
        sending = pair[0].send(1, 1, region.memory, region.pieces, stream=held)
        assert sending._is_placed.wait(5)
        receiving.cancel()
        with pytest.raises(DeadlineError):
            receiving.wait(0.1)
        assert not receiving.done
        device.write_flag(flag, 1, stream=device.compute_stream)
        for transfer in (receiving, sending):
            with pytest.raises(TransferError, match="cancel"):
                transfer.wait(5)


@pytest.mark.parametrize("way", ["_order_at_gate", "_order_behind_lane"])
def test_streams_wait_for_a_flag_either_way(device, pair, way, monkeypatch):
    """Order two streams behind each of two receives, of which one arrives and one is cancelled."""
    monkeypatch.setattr(IpcReceive, "_order_at_gate", getattr(IpcReceive, way))  # the CPU's way
    region, good, bad = (Region(device, contiguous(500)) for _ in range(3))
    region.write(contents(500, 1))
    with device.create_stream("a") as first, device.create_stream("b") as second, device.create_stream("c") as third:
        arriving = pair[1].receive(0, 1, good.memory, good.pieces, stream=device.compute_stream)
        failing = pair[1].receive(0, 2, bad.memory, bad.pieces, stream=device.compute_stream)
        arriving.order(first)
        arriving.order(second)
        failing.order(third)
        assert not first.query()
        pair[0].send(1, 1, region.memory, region.pieces, stream=device.compute_stream)
        first.synchronize(10)
        second.synchronize(10)
        assert arriving.done
        failing.cancel()
        with pytest.raises(TransferError, match="cancelled"):
            third.synchronize(10)


NUM_CHAINED = 40  # more than there are lanes
CHAINED_BYTES = 300_000  # too long to be copied at once


def chain(device, carrier, stream):
    """Send messages of which each is ready when the one before it has arrived; on one stream, as steps below full."""
    regions = [Region(device, contiguous(CHAINED_BYTES)) for _ in range(NUM_CHAINED)]
    sends = []
    for key, region in enumerate(regions):
        device.fill(region.memory, key, stream=stream)
        sends.append(carrier.send(1, key, region.memory, region.pieces, stream=stream))
        sends[-1].order(stream)
    return regions, sends


def test_sends_that_wait_for_earlier_ones_do_not_take_their_lanes(device, pair):
    into = [Region(device, contiguous(CHAINED_BYTES)) for _ in range(NUM_CHAINED)]
    with device.create_stream("chain") as stream:
        regions, sends = chain(device, pair[0], stream)
        receives = {}
        for key in (*range(1, NUM_CHAINED), 0):  # the first one's place comes last
            receives[key] = pair[1].receive(0, key, into[key].memory, into[key].pieces, stream=device.compute_stream)
            if key == NUM_CHAINED - 1:
                with pytest.raises(DeadlineError):
                    receives[1].wait(0.1)
        for key in range(NUM_CHAINED):
            receives[key].wait(10)
            assert (into[key].read() == key).all()
        sends[-1].wait(10)
    assert len(regions) == NUM_CHAINED


@pytest.mark.parametrize("side", [0, 1])
def test_a_send_that_is_held_back_can_be_cancelled(device, pair, side):
    into = [Region(device, contiguous(CHAINED_BYTES)) for _ in range(NUM_CHAINED)]
    with device.create_stream("chain") as stream:
        regions, sends = chain(device, pair[0], stream)
        receives = [
            pair[1].receive(0, key, each.memory, each.pieces, stream=device.compute_stream)
            for key, each in enumerate(into)
            if key
        ]
        with pytest.raises(DeadlineError):
            receives[-1].wait(0.1)
        (sends, receives)[side][-1].cancel()
        for transfer in (sends[-1], receives[-1]):
            with pytest.raises(TransferError):
                transfer.wait(10)
        with pytest.raises(TransferError):
            stream.synchronize(10)  # it waits for the cancelled one, too
    assert len(regions) == NUM_CHAINED


def test_a_closed_peer_fails_what_waits_for_it(device, pair):
    region = Region(device, contiguous(1000))
    waiting = pair[0].receive(1, 1, region.memory, region.pieces, stream=device.compute_stream)
    pair[1].close()
    with pytest.raises(TransferError, match="closed"):
        waiting.wait(5)


def test_a_key_in_use_is_refused(device, pair):
    region = Region(device, contiguous(10))
    pair[0].send(1, 1, region.memory, region.pieces, stream=device.compute_stream)
    with pytest.raises(TransferError, match="key 1"):
        pair[0].send(1, 1, region.memory, region.pieces, stream=device.compute_stream)
    pair[1].receive(0, 2, region.memory, region.pieces, stream=device.compute_stream)
    with pytest.raises(TransferError, match="key 2"):
        pair[1].receive(0, 2, region.memory, region.pieces, stream=device.compute_stream).wait(5)


def test_messages_come_back_as_they_were():
    for register in (Register(3, 1 << 40, True, None), Register(4, 5, False, bytes(range(64)))):
        kind, body = split_kind(register.pack())
        assert (kind, Register.unpack(body)) == (Kind.REGISTER, register)
    assert unpack_number(split_kind(pack_number(Kind.FAIL, 9, "why"))[1]) == (9, "why")
    for num_pieces in (0, 1, 1024, 1025, 20_000):
        pieces = make_pieces(np.arange(num_pieces) * 3, np.arange(num_pieces), 1)
        message, fd = Post(1, -5, 2, 3, 4, pieces).pack()
        post = Post.unpack(split_kind(message)[1], [] if fd is None else [fd])
        assert (fd is not None) == (num_pieces > 1024)
        assert (post.number, post.key, post.memory_id, post.word, post.value) == (1, -5, 2, 3, 4)
        assert all(np.array_equal(getattr(post.pieces, n), getattr(pieces, n)) for n in ("source", "target", "nbytes"))
        if fd is not None:
            os.close(fd)
    for wrong in (b"", b"\xff123"):
        with pytest.raises(TransferError):
            split_kind(wrong)
