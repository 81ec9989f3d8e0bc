"""What every carrier does alike: cases that run at the same time on two ranks of a link, and cases of a store.

A link's case is called on both ranks with a `Rank`; it fails by raising, on either of them.
"""

import os
import signal
import time
from contextlib import ExitStack, contextmanager, suppress

import numpy as np
import pytest

from dejavu.device import make_pieces
from dejavu.errors import DejavuError, TransferError
from dejavu.transport.carrier import Gathering
from tests.transport.region import Region, contents, contiguous, scattered

SIZES = (1, 2, 3, 17, 255, 4095, 4096, 65_537, (5 << 20) + 13)
LARGEST = 256 << 20
DEADLINE_S = 20.0
NOTICE_S = 5.0  # how soon the death of a peer has to show


class Rank:
    """Be one of the two ranks: its carriers, and what the cases need around them."""

    def __init__(self, device, carriers, index, barrier):
        self.device = device
        self.carriers = carriers
        self.index = index
        self.peer = 1 - index
        self.barrier = barrier
        self.open = ExitStack()
        self.next_key = 0

    def key(self):
        """Give a new key, the same on both ranks."""
        self.next_key += 1
        return self.next_key

    def region(self, layout):
        made = Region(self.device, layout)
        self.open.callback(made.close)
        return made

    def stream(self):
        return self.open.enter_context(self.device.create_stream("case"))

    def close(self):
        self.open.close()


@contextmanager
def gate(rank, stream):
    """Hold a stream back until the `with` ends."""
    flag = rank.device.allocate_host_exportable(4)
    rank.device.wait_flag(flag, 1, stream=stream, deadline_s=DEADLINE_S)
    try:
        yield
    finally:
        with rank.device.create_stream("opener") as opener:
            rank.device.write_flag(flag, 1, stream=opener)
            opener.synchronize(DEADLINE_S)
        stream.synchronize(DEADLINE_S)
        flag.close()


def post(rank, carrier, key, sender, layout, seed, stream):
    """Post one side of a message; gives the transfer and this rank's region."""
    region = rank.region(layout)
    if rank.index == sender:
        region.write(contents(region.nbytes, seed))
        return carrier.send(rank.peer, key, region.memory, region.pieces, stream=stream), region
    return carrier.receive(rank.peer, key, region.memory, region.pieces, stream=stream), region


def settle(rank, posted, sender, seed):
    """Wait for one side of a message and check what arrived."""
    transfer, region = posted
    transfer.wait(DEADLINE_S)
    assert transfer.done
    assert transfer.error is None
    assert transfer.moved_bytes == transfer.nbytes == region.nbytes
    assert region.holds(seed), "the message differs"


def exchange(rank, carrier, layouts, sender, seed=0):
    """Move one message, cut by `layouts[sender]` and by the other one on the other side."""
    key, stream = rank.key(), rank.stream()
    layout = layouts[0 if rank.index == sender else 1]
    settle(rank, post(rank, carrier, key, sender, layout, seed, stream), sender, seed)


# Contents


def moves_every_size(rank):
    for gathering, carrier in rank.carriers.items():
        for i, nbytes in enumerate(SIZES):
            layouts = contiguous(nbytes, offset=i), contiguous(nbytes, offset=5 + 3 * i)
            exchange(rank, carrier, layouts, sender=i % 2, seed=i)
        assert carrier.gathering is gathering


def moves_empty_messages(rank):
    exchange(rank, rank.carriers[Gathering.PACKED], (contiguous(0), contiguous(0)), sender=0)


def moves_a_large_message(rank):
    layouts = contiguous(LARGEST, offset=3), contiguous(LARGEST, offset=64)
    exchange(rank, rank.carriers[Gathering.PACKED], layouts, sender=0)


def moves_pieces_cut_differently(rank):
    for carrier in rank.carriers.values():
        for seed, (nbytes, out, into) in enumerate([(10, 10, 3), (40_000, 200, 1), (40_000, 1, 177), (9_999, 64, 81)]):
            exchange(rank, carrier, (scattered(nbytes, out, seed), scattered(nbytes, into, 99 + seed)), seed % 2, seed)


def moves_many_pieces(rank):
    layouts = scattered(9 << 20, 20_000, 1), scattered(9 << 20, 15_000, 2)
    exchange(rank, rank.carriers[Gathering.PACKED], layouts, sender=1)


def moves_both_ways_at_once(rank):
    """Post 24 messages in different orders, half of them each way, in memory that several of them share."""
    keys = [(rank.key(), i) for i in range(24)]
    carriers = list(rank.carriers.values())
    order = np.random.default_rng(rank.index).permutation(len(keys))
    stream, posted = rank.stream(), {}
    for number in order:
        key, i = keys[number]
        layout = scattered(30_000 + 1000 * i, 1 + 7 * (i % 5), 2 * i + rank.index)
        posted[i] = post(rank, carriers[i % 2], key, i % 2, layout, i, stream)
    for i, item in posted.items():
        settle(rank, item, i % 2, i)


# Order


def waits_for_the_other_side(rank):
    """Post one side long before the other, either one first."""
    for carrier in rank.carriers.values():
        for first in (0, 1):
            layout, stream, key = scattered(70_000, 20, rank.index), rank.stream(), rank.key()
            if rank.index != first:
                rank.barrier()
            posted = post(rank, carrier, key, 0, layout, first, stream)
            if rank.index == first:
                time.sleep(0.05)
                assert not posted[0].done or rank.index == 0  # a send may be buffered, a receive cannot have ended
                rank.barrier()
            settle(rank, posted, 0, first)


def follows_the_producer_and_leads_the_consumer(rank):
    """Send what a stream has yet to write, and read it on a stream that waits for nothing but the transfer."""
    for carrier in rank.carriers.values():
        key, stream, region = rank.key(), rank.stream(), rank.region(contiguous(300_000))
        if rank.index == 0:
            with gate(rank, stream):
                rank.device.fill(region.memory, 0x77, stream=stream)
                transfer = carrier.send(1, key, region.memory, region.pieces, stream=stream)
                rank.barrier()
                time.sleep(0.05)
                assert not transfer.done
        else:
            aside = rank.region(contiguous(300_000))
            transfer = carrier.receive(0, key, region.memory, region.pieces, stream=stream)
            consumer = rank.stream()
            transfer.order(consumer)
            rank.device.copy(aside.memory, region.memory, stream=consumer)
            rank.barrier()
            consumer.synchronize(DEADLINE_S)
            assert (aside.read() == 0x77).all()
        transfer.wait(DEADLINE_S)


def leaves_memory_to_earlier_work(rank):
    """Receive into memory that a stream still has to read."""
    for carrier in rank.carriers.values():
        key, stream, region = rank.key(), rank.stream(), rank.region(contiguous(50_000))
        if rank.index == 0:
            region.write(contents(50_000, 1))
            transfer = carrier.send(1, key, region.memory, region.pieces, stream=stream)
            rank.barrier()
            transfer.wait(DEADLINE_S)
            continue
        aside = rank.region(contiguous(50_000))
        region.write(contents(50_000, 2))
        with gate(rank, stream):
            rank.device.copy(aside.memory, region.memory, stream=stream)
            transfer = carrier.receive(0, key, region.memory, region.pieces, stream=stream)
            rank.barrier()
            time.sleep(0.05)
            assert not transfer.done
        transfer.wait(DEADLINE_S)
        assert np.array_equal(aside.read(), contents(50_000, 2)), "the receive came before the work that it follows"
        assert np.array_equal(region.read(), contents(50_000, 1))


def outlives_a_cancelled_consumer(rank):
    """Cancel one of two streams that wait for a receive: neither the other one nor the receive takes it for its end."""
    for carrier in rank.carriers.values():
        key, stream, one, other = rank.key(), rank.stream(), rank.stream(), rank.stream()
        if rank.index == 0:
            transfer, region = post(rank, carrier, key, 1, contiguous(40_000), 7, stream)
            transfer.order(one)
            transfer.order(other)
            one.cancel(DejavuError("it was not needed"))
            time.sleep(0.03)
            assert not transfer.done
            assert not other.query()
            rank.barrier()
            other.synchronize(DEADLINE_S)
            assert transfer.done
            with pytest.raises(DejavuError, match="not needed"):
                one.synchronize(DEADLINE_S)
            settle(rank, (transfer, region), 1, 7)
        else:
            rank.barrier()
            settle(rank, post(rank, carrier, key, 1, contiguous(40_000), 7, stream), 1, 7)


# Errors


def refuses_bad_pieces(rank):
    carrier, stream, region = rank.carriers[Gathering.PACKED], rank.stream(), rank.region(contiguous(100))
    outside = make_pieces([60], [0], [60])
    overlapping = make_pieces([0, 20], [0, 10], [20, 20])
    with_gap = make_pieces([0, 20], [0, 25], [20, 20])
    for wrong in (outside, overlapping, with_gap):
        for call in (carrier.send, carrier.receive):
            with pytest.raises(TransferError):
                call(rank.peer, 999_999, region.memory, wrong, stream=stream)


def fails_on_both_sides_where_sizes_differ(rank):
    for carrier in rank.carriers.values():
        for sizes in ((70_000, 60_000), (50, 9_000_000)):
            key, stream = rank.key(), rank.stream()
            transfer, _ = post(rank, carrier, key, 0, contiguous(sizes[rank.index]), 0, stream)
            with pytest.raises(TransferError):
                transfer.wait(DEADLINE_S)
            assert transfer.done
            assert transfer.error is not None
            with pytest.raises(TransferError):
                transfer.order(stream)
            rank.barrier()
            exchange(rank, carrier, (contiguous(1000), contiguous(1000)), sender=0)  # the link goes on


def cancels(rank):
    """Cancel a receive that has no sender, and use its key again."""
    for carrier in rank.carriers.values():
        key, stream = rank.key(), rank.stream()
        if rank.index == 0:
            transfer, region = post(rank, carrier, key, 1, scattered(80_000, 30, 5), 0, stream)
            waiting = rank.stream()
            transfer.order(waiting)
            time.sleep(0.02)
            transfer.cancel()
            with pytest.raises(TransferError):
                transfer.wait(DEADLINE_S)
            assert transfer.done
            with suppress(DejavuError):  # a stream that waited for it is let go, with an error
                waiting.synchronize(DEADLINE_S)
                pytest.fail("a stream went on after a transfer that was cancelled")
            assert region.is_untouched()
            transfer.cancel()  # a second one does nothing
        rank.barrier()
        settle(rank, post(rank, carrier, key, 1, contiguous(80_000), 3, stream), 1, 3)


def survives_a_cancelled_send(rank):
    """Cancel a send that has no receiver: it ends, well or not, and the link goes on."""
    for carrier in rank.carriers.values():
        key, stream = rank.key(), rank.stream()
        if rank.index == 0:
            transfer, _ = post(rank, carrier, key, 0, contiguous(8 << 20), 0, stream)
            transfer.cancel()
            with suppress(TransferError):
                transfer.wait(DEADLINE_S)
            assert transfer.done
        rank.barrier()
        exchange(rank, carrier, (contiguous(1000), contiguous(1000)), sender=0)


LINK_CASES = (
    moves_every_size,
    moves_empty_messages,
    moves_a_large_message,
    moves_pieces_cut_differently,
    moves_many_pieces,
    moves_both_ways_at_once,
    waits_for_the_other_side,
    follows_the_producer_and_leads_the_consumer,
    leaves_memory_to_earlier_work,
    outlives_a_cancelled_consumer,
    refuses_bad_pieces,
    fails_on_both_sides_where_sizes_differ,
    cancels,
    survives_a_cancelled_send,
)


# Death: rank 1 kills itself


def notices_a_dead_sender(rank):
    """Wait for messages of a peer that dies: two that it never sent, one of them awaited by a stream."""
    stream = rank.stream()
    posted = [
        post(rank, carrier, rank.key(), 1, scattered(5 << 20, 50, rank.index), 0, stream)
        for carrier in rank.carriers.values()
        if rank.index == 0
    ]
    waiting = rank.stream()
    for transfer, _ in posted:
        transfer.order(waiting)
    die(rank)
    expect_errors([transfer for transfer, _ in posted])
    with pytest.raises(DejavuError):
        waiting.synchronize(NOTICE_S)
    expect_late_errors(rank)


def notices_a_dead_receiver(rank):
    """Send to a peer that dies before it receives: messages too long for any buffer."""
    stream = rank.stream()
    posted = [
        post(rank, carrier, rank.key(), 0, contiguous(24 << 20), 0, stream)
        for carrier in rank.carriers.values()
        if rank.index == 0
    ]
    die(rank)
    expect_errors([transfer for transfer, _ in posted])
    expect_late_errors(rank)


def notices_death_amid_transfers(rank):
    """Have 40 messages of 4 MiB under way, of which some arrive: those that are reported as good are good."""
    carriers, stream, posted = list(rank.carriers.values()), rank.stream(), []
    for i in range(40):
        layout = contiguous(4 << 20, offset=i)
        with suppress(TransferError):  # the other one may be dead already
            posted.append((i, *post(rank, carriers[i % 2], rank.key(), i // 2 % 2, layout, i, stream)))
    die(rank, barrier=False)
    end_s = time.monotonic() + NOTICE_S
    for i, transfer, region in posted:
        with suppress(TransferError):
            transfer.wait(max(0.0, end_s - time.monotonic()))
            assert np.array_equal(region.read(), contents(region.nbytes, i))
        assert transfer.done


def die(rank, *, barrier=True):
    if barrier:
        rank.barrier()
    if rank.index == 1:
        os.kill(os.getpid(), signal.SIGKILL)


def expect_errors(transfers):
    end_s = time.monotonic() + NOTICE_S
    for transfer in transfers:
        with pytest.raises(TransferError):
            transfer.wait(max(0.0, end_s - time.monotonic()))
        assert transfer.error is not None


def expect_late_errors(rank):
    """Post to the dead peer: an error at once, from the call or from the transfer."""
    for carrier in rank.carriers.values():
        region, stream = rank.region(contiguous(1 << 20)), rank.stream()
        for call in (carrier.send, carrier.receive):
            with pytest.raises(TransferError):
                call(1, rank.key(), region.memory, region.pieces, stream=stream).wait(NOTICE_S)


DEATH_CASES = (notices_a_dead_sender, notices_a_dead_receiver, notices_death_amid_transfers)
