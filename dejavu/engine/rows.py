"""Who sits in which row, with which KV blocks: the controller's books, and pure."""

import heapq
from dataclasses import dataclass, field, replace
from typing import Any

from dejavu.engine.messages import Admission
from dejavu.request import Request


class BlockAllocator:
    """Hand out the KV blocks 0 … num_blocks-1; the same ids mean the same request in every stage."""

    def __init__(self, num_blocks: int) -> None:
        self.num_blocks = num_blocks
        self.free = set(range(num_blocks))
        self.lowest = list(range(num_blocks))  # a heap of all free blocks, and of some that are taken again
        self.peak = 0

    def take(self, count: int, home: int) -> tuple[int, ...]:
        """Take `count` free blocks: those from `home` on if they are free, so that a row keeps its place, or others."""
        assert count <= len(self.free)
        wanted = range(home, home + count)
        chosen = tuple(wanted) if self.free.issuperset(wanted) else tuple(self.pop_lowest() for _ in range(count))
        self.free.difference_update(chosen)
        self.peak = max(self.peak, self.num_blocks - len(self.free))
        return chosen

    def pop_lowest(self) -> int:
        """Take the lowest free block."""
        while (block := heapq.heappop(self.lowest)) not in self.free:
            continue
        self.free.remove(block)
        return block

    def claim(self, blocks: tuple[int, ...]) -> None:
        """Take these blocks, which are free."""
        assert self.free.issuperset(blocks)
        self.free.difference_update(blocks)
        self.peak = max(self.peak, self.num_blocks - len(self.free))

    def give(self, blocks: tuple[int, ...]) -> None:
        """Take blocks back."""
        assert self.free.isdisjoint(blocks)
        self.free.update(blocks)
        for block in blocks:
            heapq.heappush(self.lowest, block)
        if len(self.lowest) > 2 * self.num_blocks + len(blocks):
            self.lowest = sorted(self.free)


@dataclass(slots=True)
class RowTable:
    """Assign requests to the rows of one pipeline: the emptiest microbatch first, and never more than fits.

    A request gets all blocks it can come to need there, so that a pass never finds the pool full. Of `prompts_only`
    rows, that is the prompt.
    """

    num_microbatches: int
    microbatch_size: int
    block_size: int
    num_blocks: int
    prompts_only: bool = False
    blocks_per_row: int = 0  # the most of a row; 0 is any number
    blocks: BlockAllocator = field(init=False)
    occupants: dict[tuple[int, int], Admission] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.blocks = BlockAllocator(self.num_blocks)

    @property
    def num_rows(self) -> int:
        """Give the number of rows, taken or not."""
        return self.num_microbatches * self.microbatch_size

    @property
    def is_empty(self) -> bool:
        """Tell whether no row and no block is taken."""
        return not self.occupants and len(self.blocks.free) == self.num_blocks

    @property
    def is_full(self) -> bool:
        """Tell whether every row is taken."""
        return len(self.occupants) == self.num_rows

    def blocks_needed(self, request: Request) -> int:
        """Count the blocks that a request can come to need."""
        tokens = len(request.prompt_token_ids) if self.prompts_only else kv_tokens(request)
        return -(-tokens // self.block_size)

    def admit(self, serial: int, request: Request, handover: tuple[int, ...] = ()) -> Admission | None:
        """Seat a request, or give None while it has to wait for a row or for memory."""
        needed = self.blocks_needed(request)
        if self.is_full or needed > len(self.blocks.free):
            return None
        microbatch, row = self.choose_row()
        home = (microbatch * self.microbatch_size + row) * (self.num_blocks // self.num_rows)
        blocks = self.blocks.take(needed, home)
        return self.sit(Admission(serial, microbatch, row, blocks, request, handover))

    def reserve(self, request: Request) -> tuple[int, ...] | None:
        """Take the blocks of a request that will get its row later; None while there are too few."""
        needed = self.blocks_needed(request)
        return self.blocks.take(needed, 0) if needed <= len(self.blocks.free) else None

    def seat(
        self, serial: int, request: Request, blocks: tuple[int, ...], outputs: tuple[int, ...], num_cached: int
    ) -> Admission | None:
        """Give a row to a request that has outputs, whose blocks hold `num_cached` tokens; None while all are taken."""
        if self.is_full:
            return None
        return self.sit(Admission(serial, *self.choose_row(), blocks, request, outputs=outputs, num_cached=num_cached))

    def adopt(self, admission: Admission) -> Admission:
        """Give a request the row and the blocks that it had before."""
        self.blocks.claim(admission.blocks)
        return self.sit(admission)

    def sit(self, admission: Admission) -> Admission:
        """Note who has a row."""
        self.occupants[admission.microbatch, admission.row] = admission
        return admission

    def renew(self, admission: Admission, **changes: Any) -> Admission:
        """Change what is told of a request that keeps its row and its blocks."""
        assert self.occupants[admission.microbatch, admission.row] is admission
        return self.sit(replace(admission, **changes))

    def choose_row(self) -> tuple[int, int]:
        """Give the lowest free row of the microbatch with the fewest requests."""
        busy = [0] * self.num_microbatches
        for microbatch, _ in self.occupants:
            busy[microbatch] += 1
        microbatch = busy.index(min(busy))
        row = next(r for r in range(self.microbatch_size) if (microbatch, r) not in self.occupants)
        return microbatch, row

    def release(self, admission: Admission) -> None:
        """Free the row and the blocks of a request."""
        self.vacate(admission)
        self.blocks.give(admission.blocks)

    def vacate(self, admission: Admission) -> None:
        """Free the row of a request, but not its blocks."""
        place = admission.microbatch, admission.row
        assert self.occupants[place] is admission
        del self.occupants[place]


def kv_tokens(request: Request) -> int:
    """Count the tokens whose KV a request can come to need: the last one's is never read."""
    return len(request.prompt_token_ids) + request.sampling.max_tokens - 1
