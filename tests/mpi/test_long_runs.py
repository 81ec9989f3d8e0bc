"""A server that runs for days: what its ranks hold depends on the load, and not on how long it has served."""

from __future__ import annotations

import gc
import tracemalloc
from pathlib import Path

import pytest

from dejavu.cluster.engine import run_controller
from dejavu.cluster.job import prepare
from dejavu.cluster.participant import run_worker
from dejavu.config import ServeConfig
from dejavu.engine.controller import Controller
from dejavu.engine.journal import Journal
from dejavu.measure.ended import ended_file, read_ended
from dejavu.measure.parts import parts_of, read_steps, read_transfers, remove_parts
from dejavu.measure.recorder import FileRecorder
from dejavu.measure.records import StepRecord
from dejavu.request import Request, SamplingParams
from dejavu.topology import CONTROLLER

pytestmark = [pytest.mark.mpi(min_size=3), pytest.mark.timeout(100)]

CONFIG = ServeConfig(
    synthetic=(0.01, 0.01),
    synthetic_link=1e12,
    swap=True,
    pp=2,
    num_microbatches=3,
    microbatch_size=2,
    row_len=16,
    num_requests=1,
    prompt_len=1,
    output_len=1,
)
WAVES, WAVE = 12, 24  # so many requests at a time
MOST_GROWTH = 80_000  # bytes, from the second third of the time to the last; records that stay would take 100,000


class Measuring(FileRecorder):
    """Note the memory in use behind each pass."""

    def __init__(self, directory: Path) -> None:
        super().__init__(directory)
        self.traced: list[int] = []
        self.num_steps = 0

    def add_step(self, step: StepRecord) -> None:
        super().add_step(step)
        self.num_steps += 1
        if self.num_steps % 50 == 0:
            self.traced.append(in_use())


def in_use() -> int:
    """Give the bytes that Python objects take, without those that are garbage."""
    gc.collect()
    return tracemalloc.get_traced_memory()[0]


def serve_waves(controller: Controller) -> list[int]:
    """Serve many small requests, and give the memory in use behind each wave."""
    traced = []
    for wave in range(WAVES):
        for number in range(WAVE):
            request = Request(f"{wave}-{number}", (1, 2, 3), SamplingParams(max_tokens=4, ignore_eos=True))
            controller.submit(request)
        for _ in controller.events():
            pass
        traced.append(in_use())
    return traced


def test_memory_does_not_grow_with_the_requests_served(world, shared_path):
    parts_of(shared_path)

    def run(channel):
        if channel.rank != CONTROLLER:
            recorder = Measuring(shared_path)
            setup = channel.receive(CONTROLLER, 20)[1]
            tracemalloc.start()
            run_worker(channel, setup, recorder)
            return recorder.num_steps, recorder.traced
        setup = prepare(CONFIG).setup
        for rank in range(1, channel.size):
            channel.send(rank, setup)
        journal = Journal(shared_path / "journal.jsonl", None, ended_file(shared_path), segment_bytes=20_000)
        tracemalloc.start()
        traced, _ = run_controller(channel, setup, serve_waves, journal=journal)
        journal.close()
        return 0, traced

    def measured(channel):
        gc.freeze()  # what is here already needs no look
        try:
            return run(channel)
        finally:
            tracemalloc.stop()
            gc.unfreeze()

    measures = world.on_first(3, measured)
    for _, traced in measures:
        third = len(traced) // 3  # the least of each: between two flushes it rises by 80,000
        assert min(traced[-third:]) - min(traced[third:-third]) < MOST_GROWTH, traced
    if world.rank == CONTROLLER:
        check_records(shared_path, sum(num_steps for num_steps, _ in measures))
    world.gather(None)


def check_records(directory: Path, num_steps: int) -> None:
    """Find every pass and every request in the files, and of the journal the newest part alone."""
    steps = list(read_steps(directory))
    assert len(steps) == num_steps > 900
    assert {transfer.kind for transfer in read_transfers(directory)} == {"fetch", "flush"}
    names = [done.record.request_id for done in read_ended(directory)]
    assert names == [f"{wave}-{number}" for wave in range(WAVES) for number in range(WAVE)]
    assert len(list(directory.glob("journal-*"))) < 5
    remove_parts(directory)
