"""The MPI carrier at any number of ranks: order, big tensors, sums over some ranks, waits that end."""

from __future__ import annotations

import threading
import time

import pytest
import torch

from dejavu.errors import DeadlineError

pytestmark = [pytest.mark.mpi(min_size=2), pytest.mark.timeout(100)]

BIG = 4 * 2**20  # float32 numbers: 16 MB, far above what MPI sends eagerly


def neighbours(channel):
    return (channel.rank - 1) % channel.size, (channel.rank + 1) % channel.size


def test_objects_of_one_rank_arrive_in_order(world):
    def body(channel):
        left, right = neighbours(channel)
        for number in range(200):
            channel.send(right, (channel.rank, number, "x" * (number % 7 * 1000)))
        return [channel.receive(left, 10.0) for _ in range(200)]

    for rank, received in enumerate(world.on_first(world.size, body)):
        left = (rank - 1) % world.size
        assert received == [(left, (left, number, "x" * (number % 7 * 1000))) for number in range(200)]


def test_objects_and_tensors_pass_each_other(world):
    """A receiver may take the tensor first, though the object was sent before it."""

    def body(channel):
        left, right = neighbours(channel)
        for number in range(3):
            channel.send(right, number)
            channel.send_tensor(right, torch.full((5,), number, dtype=torch.int64))
        tensors = [channel.receive_tensor(left, torch.empty(5, dtype=torch.int64)).tolist() for _ in range(3)]
        return tensors, [channel.receive(left, 10.0)[1] for _ in range(3)]

    for tensors, objects in world.on_first(world.size, body):
        assert tensors == [[number] * 5 for number in range(3)]
        assert objects == [0, 1, 2]


def test_big_tensors_cross_without_waiting_for_the_receiver(world):
    """Both ranks of a pair send before they receive; the content is checked against its formula."""

    def body(channel):
        left, right = neighbours(channel)
        started = time.monotonic()
        channel.send_tensor(right, torch.arange(BIG, dtype=torch.float32).add_(channel.rank))
        posted_s = time.monotonic() - started
        found = channel.receive_tensor(left, torch.empty(BIG))
        return posted_s, torch.equal(found, torch.arange(BIG, dtype=torch.float32).add_(left))

    for posted_s, is_right in world.on_first(2, body):
        assert is_right
        assert posted_s < 5


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_sum_over_some_ranks(world, dtype):
    """Odd sets, in any order, at once: the same bits on every rank of the set, and the others keep what they had."""
    odd = [rank for rank in range(world.size) if rank % 2]
    rest = [rank for rank in range(world.size) if rank % 2 == 0][::-1]

    def part(rank):
        return torch.randn(33, 7, generator=torch.Generator().manual_seed(rank)).to(dtype)

    def body(channel):
        sums = []
        for ranks in (odd, rest, [world.size - 1, 0]):
            tensor = part(channel.rank)
            if channel.rank in ranks:
                channel.all_reduce(tensor, ranks)
            sums.append(tensor)
        return sums

    found = world.on_first(world.size, body)
    for index, ranks in enumerate((odd, rest, [world.size - 1, 0])):
        expected = torch.stack([part(rank).double() for rank in ranks]).sum(0)
        tolerance = 1e-5 if dtype == torch.float32 else 2**-7
        for rank in range(world.size):
            if rank not in ranks:
                assert torch.equal(found[rank][index], part(rank))
                continue
            assert ((found[rank][index].double() - expected).abs() <= tolerance * (1 + expected.abs())).all()
            assert torch.equal(found[rank][index], found[ranks[0]][index])


def test_poll_takes_from_any_rank_or_from_one(world):
    def body(channel):
        if channel.rank:
            channel.send(0, channel.rank)
            return None
        last = channel.receive(channel.size - 1, 10.0)
        others = sorted(channel.receive(deadline_s=10.0) for _ in range(channel.size - 2))
        return last, others, channel.poll()

    last = world.size - 1
    assert world.on_first(world.size, body)[0] == ((last, last), [(rank, rank) for rank in range(1, last)], None)


def test_message_wakes_a_sleeping_rank(world):
    """A ring ends the sleep at once, which would else last 20 ms; each round trip has two such sleeps."""

    def body(channel):
        times = []
        for number in range(20):
            if channel.rank == 0:
                time.sleep(0.05)  # long enough for the other to sleep its longest
                started = time.monotonic()
                channel.send(1, number)
                channel.receive(1, 10.0)
                times.append(time.monotonic() - started)
            else:
                channel.receive(0, 10.0)
                channel.send(0, number)
        return sorted(times)

    assert world.on_first(2, body)[0][5] < 0.01


def test_waiting_takes_no_core(world):
    def body(channel):
        if channel.rank == 0:
            time.sleep(1.0)
            channel.send(1, "end")
            return 0.0
        started = time.process_time()
        channel.receive(0, 10.0)
        return time.process_time() - started

    assert world.on_first(2, body)[1] < 0.05


@pytest.mark.parametrize("what", ["object", "tensor"])
def test_wait_ends_at_its_deadline(world, what):
    """Each rank waits for what nobody sends; the error names the rank that it waited for."""

    def body(channel):
        left, right = neighbours(channel)
        started = time.monotonic()
        try:
            channel.receive(left, 0.3) if what == "object" else channel.receive_tensor(left, torch.empty(1))
        except DeadlineError as error:
            message = str(error)
        waited_s = time.monotonic() - started
        if what == "object":
            return message, waited_s
        # the receive that was given up takes nothing any more
        channel.send(left, "given up")
        assert channel.receive(right, 10.0)[1] == "given up"
        channel.send_tensor(right, torch.full((1,), 5.0))
        return message, waited_s + (channel.receive_tensor(left, torch.empty(1)).item() - 5.0)

    for rank, (message, waited_s) in enumerate(world.on_first(world.size, body, deadline_s=0.5)):
        assert f"of rank {(rank - 1) % world.size}" in message
        assert 0.3 <= waited_s < 5


def test_close_completes_what_was_sent(world):
    """A rank that closes at once still delivers: its peer reads late."""

    def body(channel):
        if channel.rank == 0:
            channel.send_tensor(1, torch.arange(BIG))
            channel.send(1, threading.get_native_id())
            return None
        time.sleep(0.3)
        return channel.receive_tensor(0, torch.empty(BIG, dtype=torch.int64)).sum().item(), channel.receive(0, 5.0)[0]

    assert world.on_first(2, body)[1] == (BIG * (BIG - 1) // 2, 0)


def test_channels_are_apart(world):
    """A message on one channel is not seen on another of the same ranks."""
    from dejavu.transport.mpi import Channel

    def body(channel):
        other = Channel(channel.comm, 10.0)
        left, right = neighbours(channel)
        other.send(right, "other")
        channel.send(right, "first")
        first = channel.receive(deadline_s=10.0)
        nothing = channel.poll()
        second = other.receive(left, 10.0)
        other.close()
        return first, nothing, second

    for rank, found in enumerate(world.on_first(world.size, body)):
        left = (rank - 1) % world.size
        assert found == ((left, "first"), None, (left, "other"))
