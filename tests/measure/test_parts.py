"""Records in files that grow: bit for bit, whole rows whatever was cut off, in order over processes and hosts."""

import math
import random

from dejavu.measure.parts import PARTS, keep_chunk, parts_of, read_steps, read_transfers, remove_parts
from dejavu.measure.recorder import FileRecorder
from dejavu.measure.records import StepRecord, TransferRecord


def step(rank, number, start_s, kind="token"):
    return StepRecord(rank, rank - 1, 0, number % 3, number, kind, 4, 2**40, start_s, start_s + 0.1, math.pi, 0.25)


def transfer(rank, start_s):
    return TransferRecord(rank, "replica", "tcp", rank, 3, 2**41, start_s, start_s + 1 / 3)


def test_rows_come_back_bit_for_bit_in_the_order_of_their_begin(tmp_path):
    recorders = [FileRecorder(tmp_path) for _ in range(3)]
    steps = [step(1 + n % 3, n, n / 7, ("prompt", "token", "mixed")[n % 3]) for n in range(40)]
    moved = [transfer(1 + n % 2, n / 3) for n in range(20)]
    for n, record in enumerate(steps):
        recorders[n % 3].add_step(record)
        if n % 8 == 0:
            recorders[n % 3].flush()
    for n, record in enumerate(random.Random(3).sample(moved, len(moved))):  # they end in another order
        recorders[n % 2].add_transfers([record])
    for recorder in recorders:
        recorder.close()
        assert (recorder.steps, recorder.transfers, list(recorder.chunks())) == ([], [], [])
    assert list(read_steps(tmp_path)) == steps
    assert list(read_transfers(tmp_path)) == moved
    remove_parts(tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_a_process_that_dies_leaves_what_it_had_flushed(tmp_path):
    recorder = FileRecorder(tmp_path)
    recorder.add_step(step(1, 0, 0.0))
    assert list(read_steps(tmp_path)) == []
    recorder.flush()
    recorder.add_step(step(1, 1, 1.0))
    assert list(read_steps(tmp_path)) == [step(1, 0, 0.0)]
    recorder.close()
    (file,) = (tmp_path / PARTS).glob("*.steps")
    file.write_bytes(file.read_bytes()[:-1])  # cut off amid a write
    assert list(read_steps(tmp_path)) == [step(1, 0, 0.0)]


def test_a_host_that_does_not_see_the_directory_hands_its_files_in(tmp_path):
    recorder = FileRecorder(tmp_path / "elsewhere")
    for n in range(10_000):
        recorder.add_step(step(1, n, float(n)))
    recorder.add_transfers([transfer(1, 0.5)])
    recorder.flush()
    assert not (tmp_path / "elsewhere").exists()
    parts_of(tmp_path)
    chunks = list(recorder.chunks())
    assert len(chunks) > 2
    for chunk in (*chunks[:2], *chunks):  # asked for again, after a failure amid it
        keep_chunk(tmp_path, *chunk)
    recorder.close()
    assert list(read_steps(tmp_path)) == [step(1, n, float(n)) for n in range(10_000)]
    assert list(read_transfers(tmp_path)) == [transfer(1, 0.5)]
