"""Token steps of a stage beside the transfers of swapping, at several loads of the link: what do they cost the step?

Each load is a context: that at which the fetch of a microbatch takes so many percent of a step. Three ways take turns:
the steps alone; with the engine's mover, which fetches, flushes and waits; and with nothing but contiguous copies of as
many bytes, which say what any transfer costs. Steps are timed on the device, from the third round of the microbatches
on: a request that has just been admitted is fetched when its first step is there, which no schedule could foresee.
"""

import statistics
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, closing
from dataclasses import dataclass, replace
from itertools import count

import torch

from dejavu.device import Device
from dejavu.engine.messages import Admission, RowWork, Work
from dejavu.engine.residency import Residency
from dejavu.engine.swapping import SwapMover
from dejavu.kv.swap import PoolLink
from dejavu.model.batch import Batch
from dejavu.model.decoder import StageModel
from dejavu.model.weights import dummy_stage
from dejavu.request import Request, SamplingParams

from .driver import Row
from .swap_memory import RESIDENT, Settings, SwapMemory

LEAD_ROUNDS = 2  # of the microbatches, before a turn is timed
PROBE_CONTEXT = 64  # for the first look at how long a step takes


def measure_steps(device: Device, settings: Settings, bandwidth: float) -> Iterator[Row]:
    """Give a row for each load of a link that carries `bandwidth` bytes a second to the device."""
    if device.properties.kind == "cpu":
        torch.set_num_threads(1)  # its copies need a core, too
    weights = dummy_stage(settings.spec, settings.shard, getattr(torch, settings.dtype), device.torch_device)
    stage = StageModel(settings.spec, settings.shard, weights)
    with ExitStack() as held, torch.inference_mode():
        probe = Steps(device, stage, replace(settings, context=PROBE_CONTEXT), held)
        step_s = [probe.time(probe.run_alone).step_s for _ in range(2)][-1]
    for load in settings.loads:
        num_bytes = load / 100 * step_s * bandwidth
        context = max(1, round(num_bytes / settings.batch / settings.layout(1).bytes_per_token))
        with ExitStack() as held, torch.inference_mode():
            yield measure_load(Steps(device, stage, replace(settings, context=context), held), load)


def measure_load(steps: "Steps", load: float) -> Row:
    """Time the three ways in turns; the first turn does not count."""
    ways = steps.run_alone, steps.run_copied, steps.run_swapped
    turns = [[steps.time(way) for way in ways] for _ in range(steps.settings.repeats + 1)][1:]
    alone, copied, swapped = zip(*turns, strict=True)
    return {
        "operation": "step",
        "bytes": steps.memory.fetch_bytes,
        "load_percent": load,
        "link_percent": 100 * statistics.median(turn.fetch_s / turn.step_s for turn in swapped),
        "alone_ms": 1e3 * statistics.median(turn.step_s for turn in alone),
        "step_ms": 1e3 * statistics.median(turn.step_s for turn in swapped),
        "slowdown_percent": slowdown(swapped, alone),
        "plain_slowdown_percent": slowdown(copied, alone),
        "stall_ms": 1e3 * statistics.median(turn.stall_s for turn in swapped),
        "wrong": steps.count_wrong(),
    }


@dataclass(frozen=True, slots=True)
class Turn:
    """Hold the seconds of a turn's timed steps, in the mean: a step, its fetch, and what it waited for its own."""

    step_s: float
    fetch_s: float = 0.0
    stall_s: float = 0.0


def slowdown(turns: Sequence[Turn], alone: Sequence[Turn]) -> float:
    """Give the median over the turns of how much longer steps took than alone, in percent."""
    ratios = [turn.step_s / other.step_s for turn, other in zip(turns, alone, strict=True)]
    return 100 * (statistics.median(ratios) - 1)


class Steps:
    """Run token steps of a stage round robin over microbatches of which two are on the device, in a context."""

    def __init__(self, device: Device, stage: StageModel, settings: Settings, held: ExitStack) -> None:
        """Take memory, and ready the stage's graphs."""
        self.device, self.stage = device, stage
        self.num_lead = LEAD_ROUNDS * settings.microbatches
        self.settings = replace(settings, steps=settings.steps + self.num_lead)
        self.memory = memory = SwapMemory(device, self.settings, held)
        dtype, size = getattr(torch, settings.dtype), settings.spec.hidden_size
        self.pool = memory.on_device.tensor(dtype, memory.device_layout.shape)
        self.hidden = torch.randn(settings.batch, size, device=device.torch_device).to(dtype)
        books = Residency(settings.microbatches, settings.batch, self.settings.row_blocks, RESIDENT)
        link = PoolLink(device, memory.layout, memory.on_device, memory.on_host)
        self.mover = held.enter_context(closing(SwapMover(device, books, link, device.compute_stream)))
        self.copies = PlainCopies(memory, held)
        self.marks = [held.enter_context(closing(device.create_event(timing=True))) for _ in range(2)]
        self.turns = count()
        stage.warm_up(self.pool, [settings.batch])

    def time(self, way: Callable[[Work], None]) -> Turn:
        """Run a turn in one way, and time what follows its first rounds by the device's clock."""
        works, (start, stop) = make_works(self.settings, next(self.turns)), self.marks
        timed = works[self.num_lead :]
        for work in works[: self.num_lead]:
            way(work)
        start.record(self.device.compute_stream)
        for work in timed:
            way(work)
        stop.record(self.device.compute_stream)
        self.device.synchronize()
        return Turn(stop.elapsed_ms(start) / 1e3 / len(timed), *self.take_moved(timed))

    def take_moved(self, timed: Sequence[Work]) -> tuple[float, float]:
        """Give the seconds that timed steps' fetches took and those that steps stalled, in the mean, and forget them.

        There is one fetch a step in these rounds.
        """
        self.mover.settle()
        fetches = [move for move in self.mover.lanes.moved if move.direction == "fetch"][-len(timed) :]
        stalls_ms = [self.mover.stalls_ms.get((work.microbatch, work.step), 0.0) for work in timed]
        self.mover.lanes.moved.clear()
        self.mover.stalls_ms.clear()
        return sum(move.end_s - move.start_s for move in fetches) / len(timed), sum(stalls_ms) / 1e3 / len(timed)

    def run_alone(self, work: Work) -> None:
        """Queue a step in the slot that its number gives it."""
        slot = work.microbatch % RESIDENT
        parts = self.memory.parts(0, slot, 0, 0)
        self.compute(work, [list(part.device) for part in parts])

    def run_swapped(self, work: Work) -> None:
        """Queue a step as a worker does."""
        self.mover.begin(work)
        self.compute(work, [self.mover.books.find(work.microbatch, row.row) for row in work.rows])
        self.mover.end(work)

    def run_copied(self, work: Work) -> None:
        """Queue a step beside one contiguous copy of a microbatch's KV into the other slot."""
        slot = work.microbatch % RESIDENT
        self.copies.arrived[slot].wait(self.device.compute_stream)
        self.run_alone(work)
        self.copies.run(slot)

    def compute(self, work: Work, blocks: list[list[int]]) -> None:
        """Queue the stage's layers."""
        batch = Batch(
            token_ids=torch.tensor(work.token_ids, dtype=torch.int64),
            num_new=[row.num_new for row in work.rows],
            context=[row.context for row in work.rows],
            blocks=blocks,
            logit_rows=list(range(len(work.rows))),
        )
        self.stage.forward(batch, None if self.settings.shard.is_first else self.hidden, self.pool)

    def count_wrong(self) -> int:
        """Count the bytes on the device that differ from what host memory has of the microbatches that are in."""
        wrong, books = 0, self.mover.books
        for slot, microbatch in enumerate(books.slots):
            if microbatch is not None:
                for index, row in books.rows[microbatch].items():
                    part = self.memory.parts(microbatch, slot, 0, row.present)[index]
                    wrong += self.memory.count_wrong([part]) if row.present else 0
        return wrong


class PlainCopies:
    """Copy contiguous bytes into the two slots in turn, each behind the step that used the slot."""

    def __init__(self, memory: SwapMemory, held: ExitStack) -> None:
        self.memory, device = memory, memory.device
        self.stream = held.enter_context(closing(device.create_stream("plain-copies")))
        self.computed = held.enter_context(closing(device.create_event()))
        self.arrived = [held.enter_context(closing(device.create_event())) for _ in range(RESIDENT)]
        for event in self.arrived:
            event.record(self.stream)

    def run(self, slot: int) -> None:
        """Queue the copy into a slot behind the step that was just queued."""
        memory, slot_bytes = self.memory, self.memory.device_layout.total_bytes // RESIDENT
        self.computed.record(memory.device.compute_stream)
        self.computed.wait(self.stream)
        views = (pool.view(slot * slot_bytes, memory.fetch_bytes) for pool in (memory.on_device, memory.on_host))
        memory.device.copy(*views, stream=self.stream)
        self.arrived[slot].record(self.stream)


def make_works(settings: Settings, turn: int) -> list[Work]:
    """Make a turn's token steps of rows whose prompts are in host memory, round robin over the microbatches.

    Each turn's steps belong to requests of their own: rows never grow beyond their blocks.
    """
    return [make_work(settings, turn, *divmod(index, settings.microbatches)) for index in range(settings.steps)]


def make_work(settings: Settings, turn: int, step: int, microbatch: int) -> Work:
    """Make a step of all rows of a microbatch; the first one of a turn brings its requests."""
    rows, admissions = [], []
    for row in range(settings.batch):
        serial = (turn * settings.microbatches + microbatch) * settings.batch + row
        first = (microbatch * settings.batch + row) * settings.row_blocks
        blocks = tuple(range(first, first + settings.row_blocks))
        request = Request(str(serial), (1,) * settings.context, SamplingParams(max_tokens=settings.steps + 1))
        admissions.append(Admission(serial, microbatch, row, blocks, request, (), (1,), settings.context))
        rows.append(RowWork(serial, row, 1, settings.context + step, False, True, settings.context))
    number = turn * settings.steps + step
    return Work(number, microbatch, tuple(rows), () if step else tuple(admissions), (1,) * settings.batch)
