"""What every store does alike: cases with one rank, whose peer is itself."""

import time

import numpy as np
import pytest

from dejavu.errors import TransferError
from dejavu.transport.carrier import Gathering
from tests.transport.conformance import DEADLINE_S, LARGEST, SIZES, gate, refuses_bad_pieces
from tests.transport.region import contents, contiguous, scattered


def keep(rank, carrier, key, layout, seed):
    region, stream = rank.region(layout), rank.stream()
    region.write(contents(region.nbytes, seed))
    transfer = carrier.send(rank.peer, key, region.memory, region.pieces, stream=stream)
    return transfer, region


def take(rank, carrier, key, layout):
    region, stream = rank.region(layout), rank.stream()
    return carrier.receive(rank.peer, key, region.memory, region.pieces, stream=stream), region


def check(transfer, region, seed):
    transfer.wait(DEADLINE_S)
    assert transfer.error is None
    assert transfer.moved_bytes == region.nbytes
    assert region.holds(seed)


def keeps_every_size(rank):
    for carrier in rank.carriers.values():
        for i, nbytes in enumerate((0, *SIZES)):
            key = rank.key()
            keep(rank, carrier, key, contiguous(nbytes, offset=i), i)[0].wait(DEADLINE_S)
            for offset in (0, 1, 64):  # a receive can be repeated
                check(*take(rank, carrier, key, contiguous(nbytes, offset)), i)
            carrier.forget(key)


def keeps_a_large_message(rank):
    carrier, key = rank.carriers[Gathering.PACKED], rank.key()
    keep(rank, carrier, key, contiguous(LARGEST, offset=3), 4)[0].wait(DEADLINE_S)
    check(*take(rank, carrier, key, contiguous(LARGEST, offset=64)), 4)
    carrier.forget(key)


def gives_back_pieces_cut_differently(rank):
    for carrier in rank.carriers.values():
        for seed, (nbytes, out, into) in enumerate([(10, 10, 3), (40_000, 200, 1), (40_000, 1, 177), (9_999, 64, 81)]):
            key = rank.key()
            keep(rank, carrier, key, scattered(nbytes, out, seed), seed)[0].wait(DEADLINE_S)
            check(*take(rank, carrier, key, scattered(nbytes, into, 99 + seed)), seed)
    key = rank.key()
    keep(rank, carrier, key, scattered(9 << 20, 20_000, 1), 1)[0].wait(DEADLINE_S)
    check(*take(rank, rank.carriers[Gathering.PACKED], key, scattered(9 << 20, 15_000, 2)), 1)


def moves_both_ways_at_once(rank):
    """Receive messages while others are sent, each receive posted right behind its send."""
    for carrier in rank.carriers.values():
        keys = [rank.key() for _ in range(12)]
        sent = [keep(rank, carrier, key, scattered(90_000, 20, key), key) for key in keys]
        taken = [take(rank, carrier, key, scattered(90_000, 31, -key % 1000)) for key in keys]
        for key, (transfer, region) in zip(keys, taken, strict=True):
            check(transfer, region, key)
        for transfer, _ in sent:
            transfer.wait(DEADLINE_S)


def replaces_and_forgets(rank):
    for carrier in rank.carriers.values():
        key = rank.key()
        for seed, nbytes in enumerate((5000, 5000, 70_000, 20)):
            keep(rank, carrier, key, contiguous(nbytes), seed)[0].wait(DEADLINE_S)
            check(*take(rank, carrier, key, contiguous(nbytes)), seed)
        carrier.forget(key)
        carrier.forget(key)  # twice is once
        with pytest.raises(TransferError):
            take(rank, carrier, key, contiguous(20))[0].wait(DEADLINE_S)


def replaces_behind_a_receive_in_flight(rank):
    """Send a key again while a receive of the old message is still held back: it gets the old or the new one whole."""
    for carrier in rank.carriers.values():
        key, held = rank.key(), rank.stream()
        keep(rank, carrier, key, contiguous(500_000), 1)[0].wait(DEADLINE_S)
        region, newer, stream = rank.region(contiguous(500_000)), rank.region(contiguous(500_000)), rank.stream()
        newer.write(contents(500_000, 2))  # not behind the gate: freeing pinned memory waits for all streams
        with gate(rank, held):
            receiving = carrier.receive(rank.peer, key, region.memory, region.pieces, stream=held)
            sending = carrier.send(rank.peer, key, newer.memory, newer.pieces, stream=stream)
            time.sleep(0.02)
        check(receiving, region, 1 if carrier.name == "local" else _seed_of(receiving, region))
        sending.wait(DEADLINE_S)
        check(*take(rank, carrier, key, contiguous(500_000)), 2)


def _seed_of(transfer, region):
    transfer.wait(DEADLINE_S)
    return 1 if region.read()[0] == contents(region.nbytes, 1)[0] else 2


def follows_the_producer_and_leads_the_consumer(rank):
    for carrier in rank.carriers.values():
        key, stream, consumer = rank.key(), rank.stream(), rank.stream()
        region, target, aside = (rank.region(contiguous(300_000)) for _ in range(3))
        with gate(rank, stream):
            rank.device.fill(region.memory, 0x77, stream=stream)
            sending = carrier.send(rank.peer, key, region.memory, region.pieces, stream=stream)
            time.sleep(0.02)
            assert not sending.done
        sending.order(consumer)
        consumer.synchronize(DEADLINE_S)
        assert sending.done
        receiving = carrier.receive(rank.peer, key, target.memory, target.pieces, stream=stream)
        receiving.order(consumer)
        rank.device.copy(aside.memory, target.memory, stream=consumer)
        consumer.synchronize(DEADLINE_S)
        assert (aside.read() == 0x77).all()


def leaves_memory_to_earlier_work(rank):
    for carrier in rank.carriers.values():
        key, stream = rank.key(), rank.stream()
        keep(rank, carrier, key, contiguous(50_000), 1)[0].wait(DEADLINE_S)
        region, aside = rank.region(contiguous(50_000)), rank.region(contiguous(50_000))
        region.write(contents(50_000, 2))
        with gate(rank, stream):
            rank.device.copy(aside.memory, region.memory, stream=stream)
            receiving = carrier.receive(rank.peer, key, region.memory, region.pieces, stream=stream)
            time.sleep(0.02)
            assert not receiving.done
        check(receiving, region, 1)
        assert np.array_equal(aside.read(), contents(50_000, 2))


def refuses_what_is_not_there(rank):
    for carrier in rank.carriers.values():
        key = rank.key()
        with pytest.raises(TransferError):
            take(rank, carrier, key, contiguous(100))[0].wait(DEADLINE_S)
        keep(rank, carrier, key, contiguous(100), 0)[0].wait(DEADLINE_S)
        for nbytes in (99, 101, 9_000_000):
            with pytest.raises(TransferError):
                take(rank, carrier, key, contiguous(nbytes))[0].wait(DEADLINE_S)
        check(*take(rank, carrier, key, contiguous(100)), 0)


def cancels(rank):
    """Cancel a send and a receive that a stream holds back; what was to be sent is not there."""
    for carrier in rank.carriers.values():
        key, other, held = rank.key(), rank.key(), rank.stream()
        keep(rank, carrier, other, contiguous(1000), 1)[0].wait(DEADLINE_S)
        region, target = rank.region(contiguous(700_000)), rank.region(contiguous(1000))
        with gate(rank, held):
            transfers = [
                carrier.send(rank.peer, key, region.memory, region.pieces, stream=held),
                carrier.receive(rank.peer, other, target.memory, target.pieces, stream=held),
            ]
            for transfer in transfers:
                transfer.cancel()
        for transfer in transfers:
            with pytest.raises(TransferError):
                transfer.wait(DEADLINE_S)
            assert transfer.done
        with pytest.raises(TransferError):
            take(rank, carrier, key, contiguous(700_000))[0].wait(DEADLINE_S)
        keep(rank, carrier, key, contiguous(700_000), 6)[0].wait(DEADLINE_S)
        check(*take(rank, carrier, key, contiguous(700_000)), 6)


STORE_CASES = (
    keeps_every_size,
    keeps_a_large_message,
    gives_back_pieces_cut_differently,
    moves_both_ways_at_once,
    replaces_and_forgets,
    replaces_behind_a_receive_in_flight,
    follows_the_producer_and_leads_the_consumer,
    leaves_memory_to_earlier_work,
    refuses_bad_pieces,
    refuses_what_is_not_there,
    cancels,
)
