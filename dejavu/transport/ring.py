"""Places for messages of any size in a ring of memory, found alike by the sender and the receiver. Pure."""

from collections import deque
from dataclasses import dataclass, field

ALIGNMENT = 256


@dataclass(frozen=True, slots=True)
class Slot:
    """Say where a message lies, and how many messages must have been taken out before it may be written."""

    number: int  # of the message, from 1 on
    offset: int
    nbytes: int
    after: int  # number of the last earlier message that shares a byte with it, or 0


@dataclass(slots=True)
class Ring:
    """Give each message in turn a contiguous place; both sides, told the same sizes, give the same places.

    A message that does not fit before the end begins at 0 again. Messages are taken out in order, so a place is free
    when the last message that overlaps it has been taken out.
    """

    capacity: int
    number: int = 0
    end: int = 0
    held: deque[Slot] = field(default_factory=deque)  # that no later message has overlapped, as they come from `end` on

    def place(self, nbytes: int) -> Slot:
        """Give the next message's place."""
        size = aligned(nbytes)
        assert 0 < size <= self.capacity, f"a message of {nbytes} bytes in a ring of {self.capacity}"
        begin = self.end if self.end + size <= self.capacity else 0
        if begin < self.end:  # what lies behind the last place is met again after all that lies before it
            self.held.rotate(-sum(slot.offset >= self.end for slot in self.held))
        after = 0
        while self.held and self.held[0].offset < begin + size and begin < self.held[0].offset + self.held[0].nbytes:
            after = max(after, self.held.popleft().number)
        self.number += 1
        self.end = begin + size
        slot = Slot(self.number, begin, size, after)
        self.held.append(slot)
        return slot


def aligned(nbytes: int) -> int:
    """Round up to what places are aligned to."""
    return -(-nbytes // ALIGNMENT) * ALIGNMENT
