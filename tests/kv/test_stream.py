"""Stream through a store in this process, and between four ranks of a job (stream_ranks.py)."""

import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from dejavu.cluster.launcher import FLAGS, ROOT_VARIABLES, THREAD_VARIABLES, find_mpirun, without_mpi
from dejavu.device import num_cuda_devices, open_device
from dejavu.errors import DeadlineError, TransferError
from dejavu.kv import (
    Handle,
    KVPool,
    LayerStreamer,
    Level,
    PoolLayout,
    RankCache,
    Resharding,
    RowMap,
    Selection,
    Window,
    fetch,
    flush,
    gather,
    message_key,
    scatter,
    stream_in,
)
from dejavu.kv.handle import group_layers
from dejavu.transport.carrier import Gathering, Transfer
from dejavu.transport.local import LocalStore

ROOT = Path(__file__).parents[2]
JOB_S = 90.0
CARRIERS = ("mpi", "ipc")
CASES = (
    "random_pairs",
    "layers_follow_their_compute",
    "a_cancelled_receive_leaves_tokens_void",
    "sides_that_disagree_fail",
    "steps_reach_the_other_side",
    "steps_of_several_rows_go_together",
    "replicas_restore_what_was_lost",
)
LAYOUT = PoolLayout(6, 2, 3, 4, 1, 2, 5, 4)
FIRST = {"a": [3, 0], "b": [5]}
SECOND = {"a": [1, 2], "b": [4]}


@pytest.fixture(scope="module", params=["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def kind(request):
    if request.param == "cuda" and num_cuda_devices() == 0:
        pytest.skip("no CUDA device")
    return request.param


@pytest.fixture(scope="module")
def device(kind):
    with open_device(kind) as device:
        yield device


@pytest.fixture(params=list(Gathering))
def store(device, request):
    with LocalStore(device, 1 << 20, gathering=request.param) as store:
        yield store


@pytest.fixture
def pools(device):
    """Give two pools of one layout, whose rows have other blocks; the first is full of numbers, the second of zeros."""
    rows = [RowMap(1, 2, 2, 4) for _ in range(2)]
    first, second = (KVPool(device, RankCache(0, LAYOUT), each, torch.float32) for each in rows)
    with first, second:
        first.tensor[:] = torch.arange(first.tensor.numel()).view(LAYOUT.shape) + 1.0
        second.tensor.zero_()
        for i, key in enumerate("ab"):
            first.admit(key, 0, i, FIRST[key])
            second.admit(key, 0, i, SECOND[key])
        yield first, second


def run(command, directory, num_ranks):
    """Run a job, and give its output; what the ranks left in `directory` says how it went."""
    environment = dict.fromkeys((*ROOT_VARIABLES, *THREAD_VARIABLES), "1") | without_mpi(os.environ)
    line = [str(find_mpirun(environment["PATH"])), *FLAGS, "-n", str(num_ranks), sys.executable, *command]
    log = directory / "output"
    with log.open("wb") as output:
        process = subprocess.Popen(line, cwd=ROOT, env=environment, stdout=output, stderr=output)
        try:
            process.wait(JOB_S)
        except subprocess.TimeoutExpired:
            process.terminate()
            process.wait(10)
    return f"{log.read_text()}\nmpirun ended with {process.returncode}"


@pytest.fixture(scope="module")
def job(kind, tmp_path_factory):
    """Run all cases in one job, as starting one takes longer than the cases."""
    directory = tmp_path_factory.mktemp("ranks")
    return directory, run(["-m", "tests.kv.stream_ranks", str(directory), kind, *CARRIERS], directory, 4)


@pytest.mark.parametrize("carrier", CARRIERS)
@pytest.mark.parametrize("case", CASES)
def test_ranks(job, carrier, case):
    directory, output = job
    results = {path.suffix: path.read_text() for path in directory.glob(f"{carrier}-{case}.*")}
    assert results == dict.fromkeys((".0", ".1", ".2", ".3"), "ok"), "\n".join([*results.values(), output])


def test_the_example(tmp_path):
    path = ROOT / "examples" / "stream_cache.py"
    assert len(path.read_text().splitlines()) < 30
    assert re.search("^10240 bytes, 20 tokens, sum 2560\r?$", run([str(path)], tmp_path, 2), re.MULTILINE)
    assert path.read_text() in (ROOT / "docs" / "dejavulib.md").read_text()


def test_a_flushed_block_comes_back(device, store, pools):
    first, second = pools
    stream = device.compute_stream
    out = [flush(store, 0, key, first.block(block), stream=stream) for key, block in enumerate(FIRST["a"])]
    for each in out:
        each.wait(5)
        assert each.moved_bytes == each.nbytes == LAYOUT.block_bytes
    landing = second.begin([(0, 0, 0, 4)])
    back = fetch(store, 0, 0, second.block(SECOND["a"][0]), stream=stream, landing=landing)
    back.wait(5)
    assert (second.length("a"), second.length("b")) == (4, 0)
    fetch(store, 0, 1, second.block(SECOND["a"][1]), stream=stream, landing=second.begin([(0, 0, 4, 8)])).wait(5)
    assert second.length("a") == 8
    assert torch.equal(second.tensor[SECOND["a"]], first.tensor[FIRST["a"]])
    assert second.tensor[SECOND["b"]].count_nonzero() == 0


def test_a_scattered_region_is_gathered_elsewhere(device, store, pools):
    first, second = pools
    region = Selection.of({"b": (1, 3), "a": (2, 7)}, 3, 5)
    stream = device.compute_stream
    scatter(store, 0, 9, first, first.region(region), stream=stream).wait(5)
    second.rows.mark_valid(0, 0, 2)
    landing = second.begin(second.spans(region), 3, 5)
    handle = gather(store, 0, 9, second, second.region(region), stream=stream, landing=landing)
    handle.wait(5)
    assert handle.nbytes == 7 * 2 * 2 * LAYOUT.token_bytes
    expected = torch.zeros(LAYOUT.shape)
    for key, (start, stop) in {"b": (1, 3), "a": (2, 7)}.items():
        for token in range(start, stop):
            here, there = FIRST[key][token // 4], SECOND[key][token // 4]
            expected[there, 1:3, :, token % 4] = first.tensor[here, 1:3, :, token % 4].cpu()
    assert torch.equal(second.tensor.cpu(), expected)
    assert (second.length("a"), second.length("b")) == (2, 0)  # layer 2 is still missing
    landing = second.begin(second.spans(region), 2, 3)
    landing.commit()
    assert (second.length("a"), second.length("b")) == (7, 0)


def test_work_of_the_stream_comes_first_and_ordered_work_later(device, pools):
    first, second = pools
    flag = device.allocate_host_exportable(4)
    with (
        LocalStore(device, 1 << 20) as store,
        device.create_stream() as before,
        device.create_stream() as after,
        flag,
        device.allocate_host(LAYOUT.block_bytes) as seen,
    ):
        device.wait_flag(flag, 1, stream=before)
        device.fill(first.block(3), 7, stream=before)
        out = flush(store, 0, 1, first.block(3), stream=before)
        back = fetch(store, 0, 1, second.block(0), stream=before)
        back.order(after)
        device.copy(seen, second.block(0), stream=after)
        assert not out.done
        assert not back.done
        with pytest.raises(DeadlineError, match=f"0 of {LAYOUT.block_bytes} bytes"):
            back.wait(0.05)
        device.write_flag(flag, 1, stream=device.compute_stream)
        after.synchronize(5)
        assert (seen.tensor() == 7).all()
        assert out.done
        assert back.done


def test_what_cannot_be_fetched_leaves_tokens_void(device, store, pools):
    _, second = pools
    second.rows.mark_valid(0, 0, 8)
    handle = fetch(store, 0, 77, second.block(2), stream=device.compute_stream, landing=second.begin([(0, 0, 4, 8)]))
    assert handle.done
    with pytest.raises(TransferError, match="key 77"):
        handle.wait(5)
    assert second.length("a") == 4
    full = flush(store, 0, 1, device.allocate(2 << 20), stream=device.compute_stream)
    with pytest.raises(TransferError, match="does not fit"):
        full.wait(5)


def test_a_layer_streamer_waits_for_its_layers(device, pools):
    side = pools[0].side
    with LocalStore(device, 1 << 20) as store:
        streamer = LayerStreamer(
            store,
            pools[0],
            Resharding(side, side),
            Selection.of({"a": (0, 8)}),
            transfer=1,
            stream=device.compute_stream,
        )
        with pytest.raises(AssertionError, match="layer_done"):
            streamer.handle.wait(1)
        for layer in (2, 3, 4):
            assert not streamer.handle.done
            streamer.layer_done(layer)
        streamer.handle.wait(5)
        with pytest.raises(AssertionError, match="gathering"):
            LayerStreamer(
                store,
                pools[0],
                Resharding(side, side),
                Selection.of({}),
                transfer=1,
                stream=device.compute_stream,
                level=Level.NAIVE,
            )


@pytest.mark.parametrize(
    ("message_bytes", "sizes"), [(1, [640] * 3), (640, [640] * 3), (641, [1280, 640]), (1 << 20, [1920])]
)
def test_small_layers_leave_together(device, pools, message_bytes, sizes):
    side, stream = pools[0].side, device.compute_stream
    selection = Selection.of({"a": (0, 8)})
    with LocalStore(device, 1 << 20) as store:
        common = {"transfer": 1, "stream": stream, "message_bytes": message_bytes}
        streamer = LayerStreamer(store, pools[0], Resharding(side, side), selection, **common)
        left = []
        for layer in (2, 3, 4):
            before = store.free_bytes
            streamer.layer_done(layer)
            left.append(before - store.free_bytes)
        assert [-(-size // 256) * 256 for size in sizes] == [size for size in left if size]
        assert left[-1]
        streamer.handle.wait(5)
        back = stream_in(store, pools[1], Resharding(side, pools[1].side), selection, **common)
        back.wait(5)
        assert pools[1].length("a") == 8


class Slow(Transfer):
    """End when the test says so."""

    def __init__(self, nbytes):
        self.nbytes = nbytes
        self.ended = None  # or (error,)
        self.is_cancelled = False

    moved_bytes = property(lambda self: self.nbytes if self.ended == (None,) else 0)
    done = property(lambda self: self.ended is not None)
    error = property(lambda self: self.ended[0] if self.ended else None)

    def wait(self, deadline_s=None):
        if self.ended is None:
            raise DeadlineError("slow")

    def order(self, stream, deadline_s=None):
        pass

    def cancel(self):
        self.is_cancelled = True


def test_the_failure_of_one_part_cancels_the_others_and_comes_out_when_they_have_ended():
    handle, parts = Handle(9, 3), [Slow(3) for _ in range(3)]
    for part in parts:
        handle.start(lambda part=part: part)
    parts[0].ended = (None,)
    assert not handle.done
    parts[2].ended = (TransferError("broken"),)
    assert not handle.done
    assert handle.error is None
    assert [part.is_cancelled for part in parts] == [False, True, False]
    assert handle.moved_bytes == 3
    parts[1].ended = (TransferError("cancelled"),)
    assert handle.done
    with pytest.raises(TransferError, match="broken"):
        handle.wait()


def test_a_cancelled_handle_starts_nothing_more_and_writes_until_it_is_done(pools):
    _, second = pools
    handle, part = Handle(6, 2, second.begin([(0, 0, 0, 3)])), Slow(3)
    handle.start(lambda: part)
    handle.cancel()
    handle.start(lambda: pytest.fail("started"))
    assert part.is_cancelled
    assert not handle.done
    with pytest.raises(AssertionError, match="cancel it"):
        second.release("a")
    part.ended = (None,)  # it came too late to be stopped
    with pytest.raises(TransferError, match="cancelled"):
        handle.wait()
    assert second.release("a") == SECOND["a"]


def test_layers_are_whole_only_with_all_heads():
    windows = [Window(0, 3, 0, 2), Window(1, 3, 2, 4), Window(3, 5, 0, 4)]
    groups = group_layers(windows, 4)
    assert [(group.first_layer, group.last_layer, group.parts) for group in groups] == [(1, 3, (0, 1)), (3, 5, (2,))]
    assert group_layers([], 4) == ()


def test_keys_differ_in_every_part():
    words = [
        (t, s, r, f, last) for t in range(3) for s in range(3) for r in range(3) for f in range(3) for last in (4, 5)
    ]
    keys = [message_key(*each) for each in words]
    assert len(set(keys)) == len(keys)
    assert all(0 <= key < 2**63 for key in keys)
    assert message_key(1, 2, 3, 4, 5) == 1552153574572282278


def test_levels_add_up():
    assert [level.is_layered for level in Level] == [False, False, True, True]
    assert [level.gathering for level in Level] == [Gathering.NAIVE, *[Gathering.PACKED] * 3]
    assert np.array_equal(list(Level), ["naive", "buffered", "layered", "full"])
