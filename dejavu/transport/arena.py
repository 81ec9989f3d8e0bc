"""Space in one allocation: which ranges are free. Pure; the store of host memory keeps its messages in one."""

from bisect import bisect_left, insort

from dejavu.errors import CapacityError

ALIGNMENT = 256  # of every range: the widest vectors of any device


class Arena:
    """Give out ranges of [0, capacity), first fit; neighbours that are given back grow together again."""

    def __init__(self, capacity_bytes: int) -> None:
        self.capacity_bytes = capacity_bytes
        self._gaps = [(0, capacity_bytes)] if capacity_bytes else []  # (begin, end), in order, never touching

    @property
    def free_bytes(self) -> int:
        """Give the bytes that are free, in all gaps together."""
        return sum(end - begin for begin, end in self._gaps)

    def take(self, nbytes: int) -> int:
        """Give the offset of a range; CapacityError where no gap is large enough."""
        size = _whole(nbytes)
        for i, (begin, end) in enumerate(self._gaps):
            if end - begin >= size:
                self._gaps[i : i + 1] = [(begin + size, end)] if end - begin > size else []
                return begin
        largest = max((end - begin for begin, end in self._gaps), default=0)
        raise CapacityError(
            f"a message of {nbytes} bytes does not fit into a store of {self.capacity_bytes} bytes whose largest gap "
            f"is {largest} bytes: enlarge the store, or forget other keys first"
        )

    def give(self, offset: int, nbytes: int) -> None:
        """Take a range back."""
        begin, end = offset, offset + _whole(nbytes)
        if begin == end:
            return
        at = bisect_left(self._gaps, (begin, end))
        if at < len(self._gaps) and self._gaps[at][0] == end:
            end = self._gaps.pop(at)[1]
        if at > 0 and self._gaps[at - 1][1] == begin:
            begin = self._gaps.pop(at - 1)[0]
        insort(self._gaps, (begin, end))


def _whole(nbytes: int) -> int:
    return -(-nbytes // ALIGNMENT) * ALIGNMENT
