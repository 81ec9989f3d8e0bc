"""How the sum over a tensor group is cut: its way by size, its grid, and its place in the exported memory. Pure.

`kernels/all_reduce.cu` says what lies there, and why one or two slots are enough.
"""

from dataclasses import dataclass
from enum import StrEnum

from dejavu.transport.ring import aligned

MAX_RANKS = 8
MAX_BLOCKS = 256
FLAGS_BYTES = 256 + 2 * MAX_BLOCKS * MAX_RANKS * 4  # the counters, and a flag for each phase, block and rank
LINE_BYTES = 16  # carries 8 bytes of data
VECTOR_BYTES = 16
SMALL_BYTES = 128 << 10


class Way(StrEnum):
    """Name a way to sum."""

    ONE_SHOT = "one-shot"
    TWO_SHOT = "two-shot"
    NCCL = "nccl"


@dataclass(frozen=True, slots=True)
class Grid:
    """Give a launch's size; `share` is how many vectors of a block each rank adds up, in two shots."""

    blocks: int
    threads: int
    share: int = 0


@dataclass(frozen=True, slots=True)
class SumPlan:
    """Say how messages of a group of `size` ranks are summed, by their bytes.

    Up to `one_shot_bytes` in one shot, beyond in two, in pieces of `two_shot_bytes`; where that is 0, by NCCL.
    """

    size: int
    one_shot_bytes: int
    two_shot_bytes: int
    threads: int = 1024  # of a block, these and the blocks as measured on 2 H200
    one_shot_blocks: int = 128
    two_shot_blocks: int = 128

    def way(self, nbytes: int) -> Way:
        """Choose for a message."""
        if nbytes <= self.one_shot_bytes:
            return Way.ONE_SHOT
        return Way.TWO_SHOT if self.two_shot_bytes else Way.NCCL

    @property
    def lines_offset(self) -> int:
        """Give where the one-shot lines begin."""
        return FLAGS_BYTES

    @property
    def line_stride(self) -> int:
        """Give the bytes of one source rank's lines."""
        return aligned(2 * self.one_shot_bytes)

    @property
    def slot_stride(self) -> int:
        """Give the bytes of one slot: the lines of all sources."""
        return self.size * self.line_stride

    @property
    def parts_offset(self) -> int:
        """Give where the two-shot parts begin."""
        return self.lines_offset + 2 * self.slot_stride

    @property
    def share_stride(self) -> int:
        """Give the bytes of one source rank's parts, and of its results: shares are rounded up to whole vectors."""
        return aligned(self.two_shot_bytes // self.size + MAX_BLOCKS * VECTOR_BYTES)

    @property
    def results_offset(self) -> int:
        """Give where the two-shot results begin."""
        return self.parts_offset + self.size * self.share_stride

    @property
    def nbytes(self) -> int:
        """Give the bytes that each rank exports."""
        return self.results_offset + self.size * self.share_stride

    def one_shot_grid(self, nbytes: int) -> Grid:
        """Give the launch: a thread for each line, up to a limit from which threads take several.

        Small messages go in small blocks, which begin and end sooner.
        """
        lines = nbytes // (LINE_BYTES // 2)
        threads = self.threads if nbytes > SMALL_BYTES else -(-self.threads // 4)
        return Grid(min(self.one_shot_blocks, -(-lines // threads)), threads)

    def two_shot_grid(self, nbytes: int) -> Grid:
        """Give the launch, and how the vectors are shared: block b's share for rank r is number b * size + r."""
        vectors = nbytes // VECTOR_BYTES
        blocks = min(self.two_shot_blocks, max(1, vectors // (self.threads * self.size)))
        return Grid(blocks, self.threads, -(-vectors // (blocks * self.size)))
