"""Which microbatches' KV is on the device, and which tokens of each row: a swapping rank's books, and pure.

The device has slots, each with room for all rows of one microbatch; host memory has the blocks that the controller
gave out. A row's blocks on the device follow from its slot:

    device pool   [ slot 0: row 0 | row 1 | ... ][ slot 1: row 0 | row 1 | ... ]      blocks_per_row blocks each

Passes come round robin, so the next ones are foreseen: those of the microbatches that follow in turn and have work.
Whatever comes in their place is right too, only later.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from dejavu.engine.messages import Admission, Work
from dejavu.engine.rows import kv_tokens
from dejavu.kv.swap import Part


@dataclass(slots=True)
class SwappedRow:
    """Follow one request's tokens.

    Tokens [0, length) have been computed, and are in host memory once they are flushed; [0, present) are on the
    device too, or on their way there, if the microbatch has a slot.
    """

    serial: int
    blocks: tuple[int, ...]  # in host memory
    most: int  # tokens, after which no pass follows
    length: int
    present: int = 0
    in_flight: bool = False  # a fetch into its place on the device is one that no pass has waited for
    rests: bool = False  # was left out of a token step: it has ended, as far as can be seen from here

    @property
    def goes_on(self) -> bool:
        """Tell whether a further pass is to be expected."""
        return not self.rests and self.length < self.most


class Residency:
    """Decide which microbatch has which slot, and what has to be fetched and flushed for it."""

    def __init__(self, num_microbatches: int, microbatch_size: int, blocks_per_row: int, resident: int) -> None:
        """Begin with `resident` empty slots."""
        self.num_microbatches = num_microbatches
        self.microbatch_size = microbatch_size
        self.blocks_per_row = blocks_per_row
        self.slots: list[int | None] = [None] * resident
        self.rows: list[dict[int, SwappedRow]] = [{} for _ in range(num_microbatches)]

    def admit(self, admission: Admission) -> None:
        """Let a request take a row, in place of one that has ended; nothing happens if it has it already."""
        rows = self.rows[admission.microbatch]
        if admission.row in rows and rows[admission.row].serial == admission.serial:
            return
        assert len(admission.blocks) <= self.blocks_per_row, (admission, self.blocks_per_row)
        needed, arrived = kv_tokens(admission.request), admission.num_cached
        before = rows.get(admission.row)
        in_flight = before is not None and before.in_flight
        rows[admission.row] = SwappedRow(admission.serial, admission.blocks, needed, arrived, in_flight=in_flight)

    def find(self, microbatch: int, row: int) -> list[int]:
        """Give a row's blocks on the device, where its microbatch is."""
        assert microbatch in self.slots, f"microbatch {microbatch} is out"
        first = (self.slots.index(microbatch) * self.microbatch_size + row) * self.blocks_per_row
        return list(range(first, first + self.blocks_per_row))

    def bring_in(self, microbatch: int, wanted: Sequence[int]) -> int | None:
        """Give a slot to a microbatch that is out; give the one that has to leave, or None for an empty slot.

        Microbatches that are `wanted` stay, if any other is there; of those, the one goes that is needed last.
        """
        assert microbatch not in self.slots
        slot = max(range(len(self.slots)), key=lambda slot: self.distance(self.slots[slot], microbatch, wanted))
        leaving = self.slots[slot]
        if leaving is not None:
            for row in self.rows[leaving].values():
                row.present, row.in_flight = 0, False
        self.slots[slot] = microbatch
        return leaving

    def distance(self, other: int | None, microbatch: int, wanted: Sequence[int]) -> tuple[bool, bool, bool, int]:
        """Say how far away the need for another microbatch is, while `microbatch` is needed now."""
        if other is None:
            return True, True, True, 0
        turns = (other - microbatch) % self.num_microbatches
        return False, other not in wanted, not self.goes_on(other), turns

    def goes_on(self, microbatch: int) -> bool:
        """Tell whether a further pass of a microbatch is to be expected."""
        return any(row.goes_on for row in self.rows[microbatch].values())

    def upcoming(self, microbatch: int) -> list[int]:
        """Foresee the microbatches of the next passes after one of `microbatch`, as many as there are slots."""
        turns = ((microbatch + turn) % self.num_microbatches for turn in range(1, self.num_microbatches + 1))
        return [other for other in turns if self.goes_on(other)][: len(self.slots)]

    def fetch_for(self, work: Work) -> list[Part]:
        """Give what a pass reads and the device does not have, and take it as fetched."""
        rows = self.rows[work.microbatch]
        assert all(rows[row.row].serial == row.serial for row in work.rows), work
        return [part for row in work.rows for part in self.fetch_row(work.microbatch, row.row, row.context)]

    def fetch_all(self, microbatch: int) -> list[Part]:
        """Give what the next pass of a microbatch will read and the device does not have, and take it as fetched."""
        awaited = [(index, row.length) for index, row in self.rows[microbatch].items() if row.goes_on]
        return [part for index, length in awaited for part in self.fetch_row(microbatch, index, length)]

    def fetch_row(self, microbatch: int, index: int, length: int) -> Iterator[Part]:
        """Give the part of a row's first `length` tokens that is missing, if any."""
        row = self.rows[microbatch][index]
        assert length <= row.length, f"row {index} of microbatch {microbatch} has {row.length} tokens, not {length}"
        if row.present < length:
            yield Part(row.blocks, self.find(microbatch, index), row.present, length)
            row.present, row.in_flight = length, True

    def awaits(self, work: Work) -> bool:
        """Tell whether a pass has to wait for fetches of its rows; then take all of its microbatch as waited for."""
        rows = self.rows[work.microbatch]
        is_needed = any(rows[row.row].in_flight for row in work.rows)
        if is_needed:
            for row in rows.values():
                row.in_flight = False
        return is_needed

    def computed(self, work: Work) -> list[Part]:
        """Take note of a pass that was computed on the device; give its new tokens, to be flushed."""
        rows, parts = self.rows[work.microbatch], []
        for new in work.rows:
            row, stop = rows[new.row], new.context + new.num_new
            assert row.present >= new.context, (new, row)
            parts.append(Part(row.blocks, self.find(work.microbatch, new.row), new.context, stop))
            row.length = row.present = stop
        if work.kind == "token":
            stepping = {row.row for row in work.rows}
            for index, row in rows.items():
                row.rests = index not in stepping
        return parts
