"""A rank that swaps, without ranks: it is fed passes, and each checks what it reads against a naive copy of all KV."""

from __future__ import annotations

import random
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal

import torch

from dejavu.device import open_device
from dejavu.device.base import Stream
from dejavu.device.cpu_stream import CpuStream
from dejavu.engine.messages import Admission, RowWork, Work
from dejavu.engine.residency import Residency
from dejavu.engine.rows import BlockAllocator
from dejavu.engine.swapping import SwapMover
from dejavu.kv.flushed import FlushedRows
from dejavu.kv.layout import PoolLayout
from dejavu.kv.swap import Direction, Part, PoolLink
from dejavu.request import Request, SamplingParams


@dataclass(frozen=True, slots=True)
class Shape:
    """Size a rank: blocks and tokens of a row, rows and microbatches."""

    num_microbatches: int
    microbatch_size: int
    resident: int
    block_size: int
    blocks_per_row: int

    @property
    def row_len(self) -> int:
        """Count the tokens of a full row."""
        return self.block_size * self.blocks_per_row

    def layout(self, num_rows: int) -> PoolLayout:
        """Lay out a pool for so many rows: two layers of two heads of three float32."""
        return PoolLayout(num_rows * self.blocks_per_row, 4, 2, self.block_size, 0, 2, 3, 4)


@dataclass(slots=True)
class Row:
    """Hold a request, and what its KV has to be: float32 [tokens, layers, 2, heads, head_dim]."""

    admission: Admission
    tokens: torch.Tensor
    is_new: bool = True

    @property
    def prompt_left(self) -> int:
        """Count the prompt tokens that no pass has had."""
        return max(0, len(self.admission.request.prompt_token_ids) - len(self.tokens))

    @property
    def left(self) -> int:
        """Count the tokens that passes may still add."""
        request = self.admission.request
        return len(request.prompt_token_ids) + request.sampling.max_tokens - 1 - len(self.tokens)


def pause(stream: Stream, seconds: float) -> None:
    """Let a stream stand still."""
    if isinstance(stream, CpuStream):
        stream.submit(lambda: time.sleep(seconds))
        return
    with torch.cuda.stream(torch.cuda.ExternalStream(stream.handle)):
        torch.cuda._sleep(int(seconds * 1.5e9))  # cycles, about


class LateLink(PoolLink):
    """Copy a little later than asked for, so that what does not wait for it is seen."""

    def __init__(self, *parts: object, most_ms: float) -> None:
        super().__init__(*parts)  # type: ignore[arg-type]
        self.random = random.Random(5)
        self.most_ms = most_ms

    def carry(self, direction: Direction, parts: Sequence[Part], stream: Stream) -> None:
        """Sleep in the stream, then copy."""
        pause(stream, self.random.random() * self.most_ms / 1e3)
        super().carry(direction, parts, stream)


@dataclass
class SwappingRank:
    """Feed passes to a `SwapMover` with pools of its own; compute runs in the calling thread, or on a stream.

    On a GPU it runs on torch's current stream.
    """

    shape: Shape
    is_queued: bool
    kind: Literal["cpu", "cuda"] = "cpu"
    late_ms: float = 0.5
    compute_ms: float = 0.5  # at most, where it is queued
    rows: dict[tuple[int, int], Row] = field(default_factory=dict)
    seated: list[Admission] = field(default_factory=list)
    steps: list[int] = field(default_factory=list)
    new_tokens: int = 0
    serial: int = 0
    random: random.Random = field(default_factory=lambda: random.Random(6))

    def __post_init__(self) -> None:
        shape, self.device = self.shape, open_device(self.kind)
        num_rows = shape.num_microbatches * shape.microbatch_size
        self.layout = shape.layout(num_rows)
        device_layout = shape.layout(shape.resident * shape.microbatch_size)
        self.memory = self.device.allocate(device_layout.total_bytes)
        self.host = self.device.allocate_host_exportable(self.layout.total_bytes)
        self.pool = self.memory.tensor(torch.float32, device_layout.shape)
        self.host_pool = self.host.tensor(torch.float32, self.layout.shape)
        own_stream = self.is_queued and self.kind == "cpu"
        self.stream = self.device.create_stream("compute") if own_stream else self.device.compute_stream
        self.num_wrong = torch.zeros((), dtype=torch.int64, device=self.device.torch_device)
        self.link = LateLink(self.device, self.layout, self.memory, self.host, most_ms=self.late_ms)
        books = Residency(shape.num_microbatches, shape.microbatch_size, shape.blocks_per_row, shape.resident)
        self.flushed = FlushedRows.allocate(self.device, shape.num_microbatches, shape.microbatch_size)
        self.mover = SwapMover(self.device, books, self.link, self.stream, self.flushed)
        self.blocks = BlockAllocator(self.layout.num_blocks)
        self.steps = [0] * shape.num_microbatches

    def admit(self, microbatch: int, row: int, prompt: int, output: int, *, handed_over: bool) -> None:
        """Let a request take a free row; with its prompt's KV in host memory, if it was handed over."""
        self.serial += 1
        needed = -(-(prompt + output - 1) // self.shape.block_size)
        blocks = self.blocks.take(needed, 0)
        request = Request(str(self.serial), (1,) * prompt, SamplingParams(max_tokens=output))
        outputs, num_cached = ((7,), prompt) if handed_over else ((), 0)
        admission = Admission(self.serial, microbatch, row, blocks, request, outputs=outputs, num_cached=num_cached)
        tokens = torch.randn(prompt if handed_over else 0, 2, 2, 2, 3)
        self.rows[microbatch, row] = Row(admission, tokens)
        if handed_over:
            self.mover.lanes.flush_stream.synchronize()  # as what lands there is ordered behind it
            put(self.host_pool, blocks, 0, tokens)
            self.seated.append(admission)

    def free(self, place: tuple[int, int]) -> None:
        """End a request: its row and its blocks may be another one's at once."""
        admission = self.rows.pop(place).admission
        self.blocks.give(admission.blocks)
        self.seated = [seat for seat in self.seated if seat is not admission]

    def run(self, microbatch: int, new: dict[int, int]) -> None:
        """Take a pass of so many new tokens of rows; those that have no further tokens are freed."""
        rows = {row: self.rows[microbatch, row] for row in new}
        admissions = tuple(row.admission for row in rows.values() if row.is_new)
        works = tuple(
            RowWork(
                serial=row.admission.serial,
                row=index,
                num_new=new[index],
                context=len(row.tokens),
                is_prompt=row.prompt_left > 0,
                samples=row.prompt_left <= new[index],
                prompt_len=len(row.admission.request.prompt_token_ids),
            )
            for index, row in rows.items()
        )
        seated = tuple(seat for seat in self.seated if seat not in admissions)
        self.seated = []
        work = Work(self.steps[microbatch], microbatch, works, admissions, (1,) * sum(new.values()), seated)
        self.steps[microbatch] += 1
        for admission in admissions:
            self.mover.books.admit(admission)
        self.mover.begin(work)
        for index, row in rows.items():
            self.compute(microbatch, index, row, torch.randn(new[index], 2, 2, 2, 3))
        self.mover.end(work)
        for index, row in rows.items():
            row.is_new = False
            if row.left == 0:
                self.free((microbatch, index))

    def compute(self, microbatch: int, index: int, row: Row, new: torch.Tensor) -> None:
        """Queue a row's part of a pass: compare all its tokens so far, then write the new ones."""
        blocks, before = self.mover.books.find(microbatch, index), row.tokens
        self.new_tokens += len(new)
        row.tokens = torch.cat([before, new])

        def work() -> None:
            found = take(self.pool, blocks, len(before))
            self.num_wrong += (found != before.to(found.device)).sum()
            put(self.pool, blocks, len(before), new)

        if self.is_queued:
            pause(self.stream, self.random.random() * self.compute_ms / 1e3)
        if isinstance(self.stream, CpuStream):
            self.stream.submit(work)
        else:
            work()

    def check_successor(self) -> None:
        """Make sure that host memory holds what a process that came now would take it to hold."""
        self.mover.look()
        lengths = self.flushed.lengths()
        for place, row in self.rows.items():
            # Of a serial that is not named there is what it was handed over with.
            length = lengths.get(row.admission.serial, row.admission.num_cached)
            assert length <= len(row.tokens)
            assert torch.equal(take(self.host_pool, row.admission.blocks, length), row.tokens[:length]), place

    def check(self) -> None:
        """Make sure that passes have read what they should, and that host memory holds it when all is flushed."""
        self.mover.settle()
        self.check_successor()
        lengths = self.flushed.lengths()
        assert all(lengths.get(r.admission.serial, len(r.tokens)) == len(r.tokens) for r in self.rows.values())
        assert int(self.num_wrong) == 0
        for place, row in self.rows.items():
            if not torch.equal(take(self.host_pool, row.admission.blocks, len(row.tokens)), row.tokens):
                raise AssertionError(f"host memory of row {place}")

    def moved_bytes(self, direction: Direction) -> int:
        """Add up what has moved."""
        return sum(moved.nbytes for moved in self.mover.lanes.moved if moved.direction == direction)

    def close(self) -> None:
        """Give everything back."""
        self.mover.close()
        del self.pool, self.host_pool
        self.memory.close()
        self.host.close()
        self.flushed.close()
        self.device.close()


def take(pool: torch.Tensor, blocks: Sequence[int], count: int) -> torch.Tensor:
    """Read a row's first tokens, each where its block is: [tokens, layers, 2, heads, head_dim]."""
    block, place = places(pool, blocks, 0, count)
    return pool[block, :, :, place]


def put(pool: torch.Tensor, blocks: Sequence[int], start: int, tokens: torch.Tensor) -> None:
    """Write a row's tokens from `start` on, each where its block is."""
    block, place = places(pool, blocks, start, start + len(tokens))
    pool[block, :, :, place] = tokens.to(pool.device)


def places(pool: torch.Tensor, blocks: Sequence[int], start: int, stop: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Give the block, and the place in it, of each token."""
    positions, size = torch.arange(start, stop, device=pool.device), pool.shape[3]
    return torch.tensor(list(blocks), device=pool.device)[positions // size], positions % size


def run_at_random(rank: SwappingRank, seed: int, turns: int) -> None:
    """Admit, cancel and hand over requests, and take passes, by chance."""
    chance, shape = random.Random(seed), rank.shape
    for _ in range(turns):
        for place in [(m, r) for m in range(shape.num_microbatches) for r in range(shape.microbatch_size)]:
            if place in rank.rows and chance.random() < 0.03:
                rank.free(place)
            elif place not in rank.rows and chance.random() < 0.5:
                prompt = chance.randint(1, shape.row_len - 1)
                output = chance.randint(2, shape.row_len - prompt + 1)
                rank.admit(*place, prompt, output, handed_over=chance.random() < 0.5)
        order = list(range(shape.num_microbatches))
        if chance.random() < 0.3:
            chance.shuffle(order)
        for microbatch in order:
            rows = {r: row for (m, r), row in rank.rows.items() if m == microbatch}
            chunk = chance.choice((0, 0, 2))
            prompts = {r: min(row.prompt_left, chunk or row.prompt_left) for r, row in rows.items() if row.prompt_left}
            steps = {r: 1 for r in rows if r not in prompts}
            if new := prompts | steps if chunk else prompts or steps:
                rank.run(microbatch, new)
