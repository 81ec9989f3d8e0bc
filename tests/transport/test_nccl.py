"""The order that the NCCL carrier gives its sends and receives: conformance cases over a fake that knows no tags."""

import pytest

from dejavu.device import open_device
from dejavu.transport.carrier import UnavailableError
from dejavu.transport.nccl import NcclCarrier, check_places
from tests.transport.pair import Pair

CASES = (
    "moves_every_size",
    "moves_empty_messages",
    "moves_pieces_cut_differently",
    "moves_both_ways_at_once",
    "waits_for_the_other_side",
    "follows_the_producer_and_leads_the_consumer",
    "fails_on_both_sides_where_sizes_differ",
    "cancels",
    "survives_a_cancelled_send",
)


@pytest.fixture(scope="module")
def pair(tmp_path_factory):
    made = Pair("nccl-order", "cpu", tmp_path_factory.mktemp("nccl"))
    yield made
    made.close()


@pytest.mark.parametrize("case", CASES)
def test_messages_match_without_tags(pair, case):
    assert set(pair.run(case)) == {0, 1}


def test_a_dead_peer_is_an_error(tmp_path):
    pair = Pair("nccl-order", "cpu", tmp_path)
    try:
        assert set(pair.run("notices_a_dead_sender")) == {0}
    finally:
        pair.close()


class Comm:
    """Give each rank's answer as an allgather does."""

    def __init__(self, answers):
        self.answers = answers

    def allgather(self, mine):
        return self.answers or [mine]


def test_a_cpu_cannot_have_it():
    with pytest.raises(UnavailableError, match=r"rank 0: it moves GPU memory, and this rank runs on cpu:0"):
        NcclCarrier(open_device("cpu"), Comm(None))


def test_two_ranks_on_one_gpu_cannot_have_it():
    answers = [(None, ("host", "0000:01:00.0")), (None, ("other", "0000:01:00.0")), (None, ("host", "0000:01:00.0"))]
    with pytest.raises(UnavailableError, match=r"ranks 0 and 2 share GPU 0000:01:00\.0"):
        check_places(open_device("cpu"), Comm(answers))
    check_places(open_device("cpu"), Comm(answers[:2]))
