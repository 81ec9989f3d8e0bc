"""What joins stages: the way that both ends choose, and exchanges that late messages do not disturb."""

import queue
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack

import pytest
import torch

from dejavu.cluster import links
from dejavu.device import open_device
from dejavu.engine.inlet import DirectInlet
from dejavu.engine.messages import RowWork, Work
from dejavu.engine.sink import DirectNextStage
from dejavu.errors import TransferError
from dejavu.transport.reduction import Place

HIDDEN = 8


class FakeChannel:
    """Be one rank of a channel between threads: messages in order, from each rank apart."""

    def __init__(self, rank, boxes):
        self.rank = rank
        self.boxes = boxes  # by (sender, receiver)

    def send(self, dest, message):
        self.boxes.setdefault((self.rank, dest), queue.Queue()).put(message)

    def receive(self, source, deadline_s):
        return source, self.boxes.setdefault((source, self.rank), queue.Queue()).get(timeout=20)


@pytest.fixture
def channels():
    boxes = {(a, b): queue.Queue() for a in (1, 2) for b in (1, 2)}
    return {rank: FakeChannel(rank, boxes) for rank in (1, 2)}


@pytest.fixture
def pool():
    with ThreadPoolExecutor(2) as made:
        yield made


def open_both(pool, channels, devices, stacks):
    """Join rank 1's stage to rank 2's; gives the two ends."""
    outbox = pool.submit(links.open_outbox, channels[1], devices[0], 2, stacks[0])
    size = 4, HIDDEN, torch.float32
    inbox = pool.submit(links.open_inbox, channels[2], devices[1], 1, *size, stacks[1])
    return outbox.result(20), inbox.result(20)


def close_both(pool, stacks):
    for future in [pool.submit(stack.close) for stack in stacks]:
        future.result(20)


def work_of(num_tokens):
    row = RowWork(serial=1, row=0, num_new=num_tokens, context=0, is_prompt=True, samples=False, prompt_len=num_tokens)
    return Work(step=0, microbatch=0, rows=(row,), admissions=(), token_ids=())


def test_stages_of_one_host_meet_in_a_mailbox_and_part_again(pool, channels):
    stacks = ExitStack(), ExitStack()
    with open_device("cpu") as one, open_device("cpu") as other:
        outbox, inbox = open_both(pool, channels, (one, other), stacks)
        assert outbox.name == inbox.name == "mailbox"
        inlet = DirectInlet(inbox)
        for number in range(5):
            hidden = torch.full((3, HIDDEN), float(number))
            DirectNextStage(channels[1], 2, outbox).put(work_of(3), hidden)
            assert channels[2].receive(1, None)[1] == work_of(3)
            assert torch.equal(inlet.take(work_of(3)), hidden)
            inlet.release()
        channels[1].send(2, "a token that nobody waits for any more")
        close_both(pool, stacks)


def test_stages_that_nothing_joins_both_learn_it(pool, channels, monkeypatch):
    stacks = ExitStack(), ExitStack()
    with open_device("cpu") as one, open_device("cpu") as other:
        one.open_ipc = refuse
        places = [Place("host", "gpu 0"), Place("host", "gpu 1")]  # so NCCL is tried too, which a CPU has not
        monkeypatch.setattr(links, "meet", lambda device, exchange: places)
        assert open_both(pool, channels, (one, other), stacks) == (None, None)
        close_both(pool, stacks)


def refuse(handle, nbytes):
    raise TransferError("no such link")


def test_a_rank_that_fails_parts_alone(pool, channels):
    stacks = ExitStack(), ExitStack()
    with open_device("cpu") as one, open_device("cpu") as other:
        open_both(pool, channels, (one, other), stacks)
        for stack in stacks:
            with pytest.raises(ZeroDivisionError), stack:
                raise ZeroDivisionError
