"""The ring's places: both sides find the same ones, and none is written while what lies there is still to be read."""

from hypothesis import given
from hypothesis import strategies as st

from dejavu.transport.ring import ALIGNMENT, Ring

CAPACITY = 16 * ALIGNMENT


@given(st.lists(st.integers(1, CAPACITY), max_size=60), st.data())
def test_no_message_overwrites_one_that_was_not_taken(sizes, data):
    ring, taken, lying = Ring(CAPACITY), 0, {}  # lying: number -> (offset, nbytes)
    for nbytes in sizes:
        slot = ring.place(nbytes)
        assert slot.offset % ALIGNMENT == 0
        assert slot.offset + nbytes <= CAPACITY
        while taken < slot.after:  # the sender waits for these
            taken += 1
            lying.pop(taken)
        for offset, other in lying.values():
            assert slot.offset + nbytes <= offset or offset + other <= slot.offset
        lying[slot.number] = slot.offset, nbytes
        for _ in range(data.draw(st.integers(0, len(lying)))):  # the receiver may be further than the sender knows
            taken += 1
            lying.pop(taken)


def test_a_message_waits_for_no_more_than_it_must():
    ring = Ring(4 * ALIGNMENT)
    slots = [ring.place(ALIGNMENT) for _ in range(9)]
    assert [slot.after for slot in slots] == [0, 0, 0, 0, 1, 2, 3, 4, 5]
    assert ring.place(3 * ALIGNMENT).after == 8  # begins again at 0, where 1 and 5 were, then 6 to 8


def test_the_books_do_not_grow():
    ring = Ring(CAPACITY)
    for number in range(1000):
        ring.place(1 + number * 37 % CAPACITY)
    assert len(ring.held) <= CAPACITY // ALIGNMENT
