"""One rank of the streaming tests: `mpirun -n 4 python -m tests.kv.stream_ranks DIRECTORY DEVICE CARRIER...`.

It runs every case over every carrier, all ranks together, and writes DIRECTORY/CARRIER-CASE.RANK: "ok" or a traceback.
"""

import os
import sys
import time
import traceback
from contextlib import ExitStack
from pathlib import Path

import numpy as np
import pytest
import torch
from mpi4py import MPI

from dejavu.device import num_cuda_devices, open_device
from dejavu.device.base import Location
from dejavu.errors import DeadlineError, TransferError
from dejavu.kv import (
    CacheSide,
    KVPool,
    LayerStreamer,
    Level,
    RankCache,
    Resharding,
    RowMap,
    Selection,
    StepStreamer,
    stream_in,
    stream_out,
)
from dejavu.transport.carrier import Gathering
from tests.kv.test_plan import BACKGROUND, GARBAGE, Geometry, even, make_side, put_elements
from tests.transport.carriers import CARRIERS, Setting

NUM_RANKS = 4
DEADLINE_S = 20.0
NUM_LAYERS, NUM_HEADS = 5, 6
ROWS = {"a": 19, "b": 5, "c": 8}
SPLITS = [(pp, tp) for pp in (1, 2, 3) for tp in (1, 2, 3) if pp * tp <= 3]
BLOCK_SIZES = (1, 2, 3, 8, 32)


class World:
    def __init__(self, name, kind, directory, open_things):
        self.name = name
        self.comm = MPI.COMM_WORLD
        self.rank = self.comm.Get_rank()
        index = self.rank % num_cuda_devices() if kind == "cuda" else 0
        self.device = open_things.enter_context(open_device(kind, index))
        self.next_transfer = 100
        self.carriers = {}
        for gathering in Gathering:
            private = directory / f"{name}-{gathering}-{self.rank}"
            private.mkdir(mode=0o700)
            setting = Setting(self.device, gathering, self.rank, NUM_RANKS, private, self.comm.allgather)
            self.carriers[gathering] = open_things.enter_context(CARRIERS[name].make(setting))
        self.open = ExitStack()

    def barrier(self):
        request = self.comm.Ibarrier()
        while not request.Test():
            time.sleep(1e-3)

    def transfer(self):
        """Give a new number, the same on all ranks."""
        self.next_transfer += 1
        return self.next_transfer

    def carrier(self, level):
        return self.carriers[level.gathering]

    def stream(self):
        return self.open.enter_context(self.device.create_stream("case"))

    def pool(self, side, lengths, contents=None, *, wide=False, location=Location.DEVICE):
        """Give this rank's pool of a side, or None; `wide` seats each row in a microbatch of its own."""
        cache = next((each for each in side.ranks if each.rank == self.rank), None)
        if cache is None:
            return None
        size = cache.layout.block_size
        max_blocks = max(len(blocks) for blocks in side.rows.values())
        rows = RowMap(len(side.rows), 2, max_blocks, size) if wide else RowMap(1, len(side.rows), max_blocks, size)
        pool = self.open.enter_context(KVPool(self.device, cache, rows, torch.int32, location=location))
        for i, (key, blocks) in enumerate(side.rows.items()):
            pool.admit(key, *((i, 1) if wide else (0, i)), blocks)
            rows.mark_valid(*pool.places[key], lengths.get(key, 0))
        pool.memory.tensor()[:] = BACKGROUND if contents is None else torch.from_numpy(contents[self.rank].copy())
        return pool


def choose_ranks(side, ranks):
    """Give the side on other ranks."""
    caches = zip(side.ranks, ranks, strict=True)
    return CacheSide(tuple(RankCache(rank, each.layout) for each, rank in caches), side.rows)


def without_rows(*sides):
    return Resharding(*(CacheSide(side.ranks, {}) for side in sides))


def check(pool, expected, lengths):
    assert {key: pool.length(key) for key in pool.places} == lengths
    assert pool.memory.tensor().cpu().numpy().tobytes() == expected[pool.rank].tobytes()


def draw_case(rng):
    """Draw two sides on ranks that are not shared, and what moves."""
    splits = SPLITS[rng.integers(len(SPLITS))], (1, 1)
    while sum(pp * tp for pp, tp in splits) < NUM_RANKS and rng.random() < 0.8:
        one, other = (SPLITS[i] for i in rng.integers(len(SPLITS), size=2))
        if one[0] * one[1] + other[0] * other[1] <= NUM_RANKS:
            splits = one, other
    splits = splits[:: rng.choice((1, -1))]
    ranks = rng.permutation(NUM_RANKS).tolist()
    sides = []
    for pp, tp in splits:
        geometry = Geometry(even(NUM_LAYERS, pp), even(NUM_HEADS, tp), int(rng.choice(BLOCK_SIZES)))
        side = make_side(geometry, ROWS, 0, int(rng.integers(99)))
        sides.append(choose_ranks(side, [ranks.pop() for _ in range(pp * tp)]))
    bounds = {row: sorted(rng.integers(0, length + 1, 2).tolist()) for row, length in ROWS.items()}
    spans = {row: tuple(bounds[row]) for row in rng.permutation(list(ROWS)).tolist()}
    return *sides, spans, list(Level)[rng.integers(len(Level))]


def random_pairs(world):
    for seed in range(14):
        rng = np.random.default_rng([seed, *world.name.encode()])
        source, target, spans, level = draw_case(rng)
        selection, transfer = Selection.of(spans), world.transfer()
        sent = put_elements(source, GARBAGE, {row: (0, length) for row, length in ROWS.items()})
        sender = world.pool(source, ROWS, sent)
        receiver = world.pool(target, {row: start for row, (start, _) in spans.items()}, wide=True)
        options = {"transfer": transfer, "stream": world.device.compute_stream, "level": level}
        options["message_bytes"] = int(rng.choice((1, 300, 1 << 22)))  # a layer each, some, all of them
        common = without_rows(source, target), selection
        if receiver:
            handle = stream_in(world.carrier(level), receiver, *common, **options)
            handle.wait(DEADLINE_S)
            assert handle.moved_bytes == handle.nbytes
            expected = put_elements(target, BACKGROUND, spans)
            check(receiver, expected, {row: stop for row, (_, stop) in spans.items()})
        if sender:
            stream_out(world.carrier(level), sender, *common, **options).wait(DEADLINE_S)
        world.open.close()


def two_sides(world, splits=((2, 1), (1, 2)), block_sizes=(4, 3), location=Location.DEVICE):
    """Give two fixed sides and this rank's pool of one of them."""
    ranks = iter(range(NUM_RANKS))
    sides = []
    for (pp, tp), block_size, seed in zip(splits, block_sizes, (1, 2), strict=True):
        side = make_side(Geometry(even(4, pp), even(NUM_HEADS, tp), block_size), ROWS, 0, seed)
        sides.append(choose_ranks(side, [next(ranks) for _ in range(pp * tp)]))
    source, target = sides
    sent = put_elements(source, GARBAGE, {row: (0, length) for row, length in ROWS.items()})
    return source, target, sent, world.pool(target, {}, wide=True, location=location)


WHOLE = {row: (0, length) for row, length in ROWS.items()}


def layers_follow_their_compute(world):
    """Write each layer late, by the compute stream, after all layers were posted; the layers arrive one by one."""
    source, target, sent, receiver = two_sides(world)
    sender = world.pool(source, ROWS, {rank: np.full_like(pool, GARBAGE) for rank, pool in sent.items()})
    common, transfer = (without_rows(source, target), Selection.of(WHOLE)), world.transfer()
    options = {"transfer": transfer, "level": Level.FULL, "message_bytes": 1}
    if sender:
        layout, compute = sender.layout, world.stream()
        truth = world.open.enter_context(world.device.allocate_host(layout.total_bytes))
        truth.tensor()[:] = torch.from_numpy(sent[world.rank])
        gates = world.open.enter_context(world.device.allocate_host_exportable(4 * layout.num_layers))
        streamer = LayerStreamer(world.carrier(Level.FULL), sender, *common, stream=compute, **options)
        for i in range(layout.num_layers):
            everything = Selection.of(WHOLE, layout.first_layer + i, layout.first_layer + i + 1)
            world.device.wait_flag(gates.view(4 * i, 4), 1, stream=compute, deadline_s=DEADLINE_S)
            pieces = sender.region(everything).pieces
            pieces = type(pieces)(pieces.source, pieces.source, pieces.nbytes)
            world.device.pack(sender.memory, truth, pieces, stream=compute)
            streamer.layer_done(layout.first_layer + i)
        for i in range(layout.num_layers):
            world.barrier()  # the receivers have looked
            assert not streamer.handle.done
            world.device.write_flag(gates.view(4 * i, 4), 1, stream=world.device.compute_stream)
            world.barrier()
        streamer.handle.wait(DEADLINE_S)
    if receiver:
        handle = stream_in(world.carrier(Level.FULL), receiver, *common, stream=world.device.compute_stream, **options)
        for i in range(2):  # of each of the two stages, one layer of two
            time.sleep(0.05)
            assert not handle.done
            assert handle.moved_bytes == handle.nbytes * i // 2
            assert {receiver.length(row) for row in ROWS} == {0}
            world.barrier()
            world.barrier()
            end_s = time.monotonic() + DEADLINE_S
            while handle.moved_bytes < handle.nbytes * (i + 1) // 2 and time.monotonic() < end_s:
                time.sleep(1e-3)
        handle.wait(DEADLINE_S)
        check(receiver, put_elements(target, BACKGROUND, WHOLE, 0, 4), ROWS)


def a_cancelled_receive_leaves_tokens_void(world):
    """Send the first of two layers only; the receiver gives up, and gets everything with a second transfer."""
    source, target, sent, receiver = two_sides(world)
    sender = world.pool(source, ROWS, sent)
    common, level = (without_rows(source, target), Selection.of(WHOLE)), Level.LAYERED
    stream, carrier = world.device.compute_stream, world.carrier(level)
    how = {"stream": stream, "level": level, "message_bytes": 1}
    first, second = world.transfer(), world.transfer()
    if sender:
        streamer = LayerStreamer(carrier, sender, *common, transfer=first, **how)
        streamer.layer_done(sender.layout.first_layer)
        world.barrier()
        streamer.handle.cancel()
        assert streamer.handle.error is not None or not streamer.handle.done
        stream_out(carrier, sender, *common, transfer=second, **how).wait(DEADLINE_S)
    if receiver:
        handle = stream_in(carrier, receiver, *common, transfer=first, **how)
        end_s = time.monotonic() + DEADLINE_S
        while handle.moved_bytes < handle.nbytes // 2 and time.monotonic() < end_s:
            assert not handle.done
            time.sleep(1e-3)
        world.barrier()
        handle.cancel()
        with pytest.raises(TransferError, match="cancelled"):
            handle.wait(DEADLINE_S)
        assert handle.done
        assert {receiver.length(row) for row in ROWS} == {0}
        retry = stream_in(carrier, receiver, *common, transfer=second, **how)
        assert {receiver.length(row) for row in ROWS} == {0}
        retry.wait(DEADLINE_S)
        check(receiver, put_elements(target, BACKGROUND, WHOLE, 0, 4), ROWS)


def sides_that_disagree_fail(world):
    """Ask for another number of tokens than is sent: an error, and nothing is valid."""
    source, target, sent, receiver = two_sides(world)
    sender = world.pool(source, ROWS, sent)
    options = {"transfer": world.transfer(), "stream": world.device.compute_stream}
    carrier, resharding = world.carrier(Level.FULL), without_rows(source, target)
    if sender:
        handle = stream_out(carrier, sender, resharding, Selection.of({"a": (0, 9)}), **options)
    else:
        handle = stream_in(carrier, receiver, resharding, Selection.of({"a": (0, 8)}), **options)
    with pytest.raises((TransferError, DeadlineError)):  # the latter where the peer gave up before this side was posted
        handle.wait(3.0)
    handle.cancel()
    with pytest.raises(TransferError):
        handle.wait(DEADLINE_S)
    if receiver:
        assert receiver.length("a") == 0
    world.barrier()


def steps_reach_the_other_side(world):
    """Send step after step of rows that both sides list alike, each as the compute stream leaves it."""
    for level in (Level.FULL, Level.NAIVE):
        source, target, sent, receiver = two_sides(world, location=Location.HOST)
        sender = world.pool(source, ROWS, sent)
        common, transfer = (world.carrier(level), without_rows(source, target)), world.transfer()
        pool = sender or receiver
        streamers = {
            microbatch: StepStreamer(common[0], pool, common[1], microbatch, transfer=transfer, level=level)
            for microbatch in {microbatch for microbatch, _ in pool.places.values()}
        }
        handles = []
        for step in range(max(ROWS.values())):  # a row at a time where the receiver has it in a microbatch of its own
            for i, row in enumerate(row for row, length in ROWS.items() if step < length):
                microbatch, place = pool.places[row]
                streamer = streamers[microbatch]
                what = 3 * step + i, np.array([place]), np.array([step])
                move = streamer.send if sender else streamer.receive
                handles.append(move(*what, stream=world.device.compute_stream))
        for handle in handles:
            handle.wait(DEADLINE_S)
        if receiver:
            check(receiver, put_elements(target, BACKGROUND, WHOLE, 0, 4), ROWS)
        world.open.close()


def steps_of_several_rows_go_together(world):
    """Send the rows of a microbatch, in an order that is not theirs, at positions that differ."""
    rows = Selection.of({"c": (7, 8), "a": (16, 17), "b": (4, 5)})
    for splits in (((1, 3), (1, 1)), ((1, 1), (3, 1)), ((2, 1), (1, 2))):
        source, target, sent, _ = two_sides(world, splits)
        sender, receiver = world.pool(source, ROWS, sent), world.pool(target, {"a": 16, "b": 4, "c": 7})
        pool = sender or receiver
        common, transfer = (world.carrier(Level.FULL), without_rows(source, target)), world.transfer()
        streamer = StepStreamer(common[0], pool, common[1], 0, transfer=transfer)
        what = 5, np.array([pool.places[row][1] for row in rows.rows]), rows.start
        handle = (streamer.send if sender else streamer.receive)(*what, stream=world.device.compute_stream)
        handle.wait(DEADLINE_S)
        assert handle.nbytes == handle.moved_bytes > 0
        if receiver:
            spans = {row: (start, start + 1) for row, start in zip(rows.rows, rows.start.tolist(), strict=True)}
            check(receiver, put_elements(target, BACKGROUND, spans, 0, 4), {"a": 17, "b": 5, "c": 8})
        world.barrier()
        world.open.close()


def replicas_restore_what_was_lost(world):
    """Keep each stage's steps in the next rank's host memory, and give them back to a new pool of the stage."""
    level, stream = Level.LAYERED, world.device.compute_stream
    own, last = world.rank, (world.rank - 1) % NUM_RANKS
    stages = make_side(Geometry(even(4, NUM_RANKS), (0, NUM_HEADS), 4), ROWS, 0, 3)
    sent = put_elements(stages, BACKGROUND, WHOLE)
    alone = [CacheSide((each,), stages.rows) for each in stages.ranks]
    moved = [choose_ranks(side, [(rank + 1) % NUM_RANKS]) for rank, side in enumerate(alone)]
    pool, replica = world.pool(alone[own], ROWS, sent), world.pool(moved[last], {}, location=Location.HOST)
    there, here = without_rows(alone[own], moved[own]), without_rows(alone[last], moved[last])
    carrier, transfer = world.carrier(level), world.transfer()
    out = StepStreamer(carrier, pool, there, 0, transfer=transfer, level=level)
    back = StepStreamer(carrier, replica, here, 0, transfer=transfer, level=level)
    for step in range(max(ROWS.values())):
        rows = np.array([i for i, length in enumerate(ROWS.values()) if step < length])
        handles = [side(step, rows, np.full(len(rows), step), stream=stream) for side in (back.receive, out.send)]
        for handle in handles:
            handle.wait(DEADLINE_S)
    assert {row: replica.length(row) for row in ROWS} == ROWS
    pool.memory.tensor().fill_(BACKGROUND)
    common, options = Selection.of(WHOLE), {"transfer": world.transfer(), "stream": stream, "level": level}
    restored = stream_in(carrier, pool, without_rows(moved[own], alone[own]), common, **options)
    assert {pool.length(row) for row in ROWS} == {0}
    given = stream_out(carrier, replica, without_rows(moved[last], alone[last]), common, **options)
    for handle in (restored, given):
        handle.wait(DEADLINE_S)
    check(pool, sent, ROWS)


CASES = (
    replicas_restore_what_was_lost,
    random_pairs,
    layers_follow_their_compute,
    a_cancelled_receive_leaves_tokens_void,
    sides_that_disagree_fail,
    steps_reach_the_other_side,
    steps_of_several_rows_go_together,
)


def run_cases(world, directory):
    for case in CASES:
        result = "ok"
        try:
            case(world)
        except BaseException:
            result = traceback.format_exc()
        (directory / f"{world.name}-{case.__name__}.{world.rank}").write_text(result)
        if result != "ok":
            os._exit(1)  # the others end at their deadlines, or with the job
        world.open.close()
        world.barrier()


def main(directory, kind, *names):
    for name in names:
        with ExitStack() as open_things:
            run_cases(World(name, kind, directory, open_things), directory)


if __name__ == "__main__":
    main(Path(sys.argv[1]), *sys.argv[2:])
