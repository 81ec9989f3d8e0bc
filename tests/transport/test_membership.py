"""Who plays which rank after failures: spares take the places of the dead, and nobody else moves."""

from __future__ import annotations

from hypothesis import given, settings
from hypothesis import strategies as st

from dejavu.transport.membership import Membership, enlist, is_cut_off, reassign, starter


def test_spare_takes_the_place_of_the_dead_and_its_own_stays_vacant():
    after = reassign(Membership.first(6), (0, 1, 3, 4, 5), 4, ["a"] * 6)
    assert after == Membership(1, (0, 1, 4, 3, None, 5), (0, 1, 3, 4, 5))
    assert after.lost((0, 1, 4, 5)) == (3,)
    assert [after.route(rank) for rank in after.present] == [0, 1, 3, 2, 4]
    assert [after.origin(place) for place in range(5)] == [0, 1, 3, 2, 5]
    assert after.vacant == (4,)


def test_spare_on_the_host_of_the_dead_is_preferred():
    hosts = ["a", "a", "b", "a", "b"]
    assert reassign(Membership.first(5), (0, 1, 3, 4), 3, hosts).places == (0, 1, 4, 3, None)
    assert reassign(Membership.first(5), (0, 2, 3, 4), 3, hosts).places == (0, 3, 2, None, 4)


def test_dead_spare_is_replaced_by_nobody():
    after = reassign(Membership.first(4), (0, 1, 2), 2, ["a"] * 4)
    assert (after.places, after.vacant) == ((0, 1, 2, None), (3,))


def test_process_is_started_on_the_host_that_has_lost_the_most():
    hosts = ["a", "a", "b", "a", "b", "b"]
    first = Membership.first(6)
    assert starter(reassign(first, (1, 2, 3, 4, 5), 4, hosts), hosts) == 1, "rank 0 is played by process 4, on b"
    assert starter(reassign(first, (0, 1, 2, 3, 4), 4, hosts), hosts) == 2
    twice = reassign(first, (0, 1, 3, 5), 3, hosts)  # two of b
    assert (twice.places, starter(twice, hosts)) == ((0, 1, 5, 3, None, None), 2)
    assert starter(enlist(twice, 6), [*hosts, "b"]) == 2, "one is missing still"
    assert starter(reassign(first, (0, 1, 3), 3, hosts), hosts) == 0, "nobody of b can start it"


def test_process_that_joins_takes_the_lowest_vacant_rank():
    """That of a worker before that of a spare; its number is one that nobody had before."""
    short = reassign(Membership.first(4), (0, 3), 3, ["a"] * 4)
    assert short == Membership(1, (0, 3, None, None), (0, 3))
    once = enlist(short, 4)
    assert once == Membership(2, (0, 3, 4, None), (0, 3, 4))
    assert enlist(once, 5).places == (0, 3, 4, 5)
    assert [once.route(rank) for rank in once.present] == [0, 1, 2]
    assert once.lost((0, 3)) == (2,)


@settings(max_examples=200, deadline=None)
@given(size=st.integers(2, 9), num_spares=st.integers(0, 5), data=st.data())
def test_places_are_filled_while_there_are_spares(size, num_spares, data):
    membership = Membership.first(size + num_spares)
    hosts = data.draw(st.lists(st.sampled_from("ab"), min_size=size + num_spares, max_size=size + num_spares))
    while len(membership.processes) > 1:
        dead = data.draw(st.sets(st.sampled_from(membership.processes), max_size=len(membership.processes) - 1))
        survivors = tuple(process for process in membership.processes if process not in dead)
        after = reassign(membership, survivors, size, hosts)
        assert sorted(after.places[rank] for rank in after.present) == sorted(survivors)
        for rank in range(size):
            if membership.places[rank] in survivors:
                assert after.places[rank] == membership.places[rank], "a survivor has lost its rank"
        spare_left = any(rank >= size for rank in after.present)
        assert not (spare_left and any(rank < size for rank in after.vacant))
        assert after.epoch == membership.epoch + 1
        membership = after
        if not dead:
            break


def test_one_side_of_a_cut_network_stops_and_only_one():
    hosts = ["a", "a", "a", "b", "b", "b", "c"]
    whole = Membership.first(7)
    assert is_cut_off(whole, (6,), hosts)
    assert not is_cut_off(whole, (0, 1, 2, 3, 4, 5), hosts)
    for left in ((0, 1, 2), (3, 4, 5, 6), (0, 1, 2, 6)):
        right = tuple(process for process in range(7) if process not in left)
        assert is_cut_off(whole, left, hosts) != is_cut_off(whole, right, hosts)
    halves = Membership(1, whole.places, (0, 1, 2, 3, 4, 5))
    assert not is_cut_off(halves, (0, 1, 2), hosts)
    assert is_cut_off(halves, (3, 4, 5), hosts)


def test_deaths_on_a_host_are_no_cut_network():
    hosts = ["a", "a", "a", "b"]
    assert not is_cut_off(Membership.first(4), (2,), hosts)
    assert not is_cut_off(Membership.first(4), (0, 1, 2, 3), hosts)


def test_a_spare_on_the_same_gpu_is_preferred_but_not_to_one_on_the_same_host():
    hosts, devices = ["a", "a", "a", "a", "a", "b"], [0, 0, 1, 0, 1, 0]
    assert reassign(Membership.first(6), (0, 1, 3, 4, 5), 3, hosts, devices).places == (0, 1, 4, 3, None, 5)
    assert reassign(Membership.first(6), (0, 2, 3, 4, 5), 3, hosts, devices).places == (0, 3, 2, None, 4, 5)
    assert reassign(Membership.first(6), (0, 1, 3, 5), 3, hosts, devices).places == (0, 1, 3, None, None, 5)
