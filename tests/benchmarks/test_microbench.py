"""The microbenchmark as a user starts it, and that it finds bytes that a carrier gets wrong."""

import csv
import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from dejavu.benchmarks import microbench, plots, shapes
from dejavu.benchmarks.contents import Check, move_reference
from dejavu.benchmarks.links import RankWorld
from dejavu.device import make_pieces, open_device
from dejavu.errors import UsageError
from dejavu.transport.carrier import Gathering
from dejavu.transport.local import LocalStore
from tests.documentation import unexplained

ROOT = Path(__file__).parents[2]
COLUMNS = (
    "operation,transport,optimization,source,target,bytes,pieces,post_us,latency_us_p50,latency_us_p99,"
    "bandwidth_gbps,ceiling_gbps,percent_of_ceiling,wrong"
)
TINY = {"model": "opt-125m", "batch": 2, "prompt_len": 20, "tp": 2, "pp": 12, "block_size": 16}


@pytest.fixture
def alone(monkeypatch):
    """Give this process as the only rank, without the shared memory that Open MPI would leave behind."""
    monkeypatch.setenv("OMPI_MCA_btl", "self")
    from mpi4py import MPI

    return MPI.COMM_SELF


def run_bench(*arguments, timeout=60):
    variables = {"OMPI_ALLOW_RUN_AS_ROOT": "1", "OMPI_ALLOW_RUN_AS_ROOT_CONFIRM": "1", "COLUMNS": "80"}
    environment = {k: v for k, v in os.environ.items() if not k.startswith(("OMPI_", "PMIX_", "PRTE_"))} | variables
    command = [sys.executable, "-m", "dejavu.cli.main", "bench", *arguments]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, cwd=ROOT, timeout=timeout)
    return done, done.stdout + done.stderr


def test_rows_of_links_and_stores(tmp_path):
    out = tmp_path / "run"
    sizes = ("--sizes", "4KiB,1MiB", "--repeats", "3", "--device", "cpu")
    tiny = ("--prompt-len", "20", "--batch", "2", "--pp", "12", "--transport", "local,ipc,nccl")
    done, text = run_bench("microbench", *sizes, *tiny, "--out", str(out))
    assert done.returncode == 0, text
    last = json.loads(done.stdout.splitlines()[-1])
    assert (last["bench"], last["run"]) == ("microbench", str(out))
    rows = list(csv.DictReader((out / "microbench.csv").open()))
    assert ",".join(rows[0]) == COLUMNS
    assert unexplained("benchmarks.md", "bench microbench", rows[0]) == []
    assert [row["operation"] for row in rows] == [row["operation"] for row in last["rows"]]
    assert {row["wrong"] for row in rows} == {"0"}
    assert all(float(row["bandwidth_gbps"]) > 0 and float(row["ceiling_gbps"]) > 0 for row in rows)
    by_name = {(row["operation"], row["transport"], row["optimization"]): row for row in rows}
    token = by_name["token_step", "ipc", "full"]  # one layer of 12 heads of 64, K and V, 2 bytes each
    assert (token["bytes"], token["pieces"]) == (str(2 * 2 * 768 * 2), "4")
    assert by_name["prompt", "ipc", "naive"]["bytes"] == str(2 * 20 * 2 * 768 * 2)
    assert {row["case"].split("/")[1] for row in last["waived"]} == {"nccl"}
    assert "GPU memory" in last["waived"][0]["reason"]
    assert (out / "microbench.png").read_bytes().startswith(b"\x89PNG")
    assert "waived" in done.stdout
    assert "*/nccl/*" in done.stdout


def test_list_and_filter_need_no_ranks():
    options = {**TINY, "transports": "all", "sizes": "4KiB,1GiB", "repeats": 3, "device": "cpu", "pattern": None}
    everything = [case.name for case in microbench.make_settings(options).cases]
    assert len(set(everything)) == len(everything)
    assert {"contiguous/local/any/out/1GiB", "both_ways/local/any/both/4KiB", "put_flag/ipc/any/4KiB"} <= set(
        everything
    )
    chosen = microbench.make_settings(options | {"pattern": "token_step/*/full*"}).cases
    assert {case.operation for case in chosen} == {"token_step"}
    assert [name for name in everything if name.startswith("plain")] == ["plain/nccl/any/4KiB", "plain/nccl/any/1GiB"]
    assert {case.transport for case in chosen} == {"local", "disk", "ipc", "nccl", "mpi", "rma", "tcp"}
    with pytest.raises(UsageError, match="matches no case"):
        microbench.make_settings(options | {"pattern": "nothing"})
    with pytest.raises(UsageError, match="4Kilo"):
        microbench.make_settings(options | {"sizes": "4Kilo"})
    with pytest.raises(UsageError, match="no transport 'ib'"):
        microbench.make_settings(options | {"transports": "ib"})
    with pytest.raises(UsageError, match="13 stages cannot share 12 layers"):
        microbench.make_settings(options | {"pp": 13})
    with pytest.raises(UsageError, match="no model 'gpt-9'"):
        microbench.make_settings(options | {"model": "gpt-9"})


class Spoiled:
    """Follow a transfer, and flip one bit of a byte that it has brought."""

    def __init__(self, transfer, memory, offset):
        self.transfer, self.memory, self.offset = transfer, memory, offset

    @property
    def done(self):
        if self.transfer.done:
            self.spoil()
        return self.transfer.done

    @property
    def error(self):
        return self.transfer.error

    def wait(self, deadline_s=None):
        self.transfer.wait(deadline_s)
        self.spoil()

    def spoil(self):
        if self.memory is not None:
            self.memory.tensor()[self.offset] ^= 1
            self.memory = None


class Corrupting(LocalStore):
    """Spoil each message that is taken out."""

    def receive(self, peer, key, memory, pieces, *, stream):
        transfer = super().receive(peer, key, memory, pieces, stream=stream)
        return Spoiled(transfer, memory, int(pieces.source[-1]))


class Forgetful(LocalStore):
    """Leave out the second half of the pieces of what is taken out."""

    def receive(self, peer, key, memory, pieces, *, stream):
        kept = len(pieces) // 2
        entry = self._entries[key]
        whole, entry.nbytes = entry.nbytes, int(pieces.nbytes[:kept].sum())
        try:
            return super().receive(peer, key, memory, pieces.part(0, kept), stream=stream)
        finally:
            entry.nbytes = whole


@pytest.mark.parametrize(
    ("broken", "pattern", "wrong"),
    [
        (LocalStore, "prompt/local/buffered/in", 0),
        (Corrupting, "prompt/local/buffered/in", 1),
        (Corrupting, "prompt/local/buffered/out", 1),
        (Corrupting, "token_step/local/full/in", 1),
        (Corrupting, "contiguous/local/any/out/4KiB", 1),
        (Corrupting, "microbatch/local/buffered/in", 1),
        (Corrupting, "both_ways/local/any/both/4KiB", 2),
        (Forgetful, "microbatch/local/buffered/in", 3 * 16 * 2 * 6 * 64 * 2),
    ],
)
def test_wrong_bytes_are_counted(broken, pattern, wrong, monkeypatch, alone):
    monkeypatch.setattr("dejavu.transport.local.LocalStore", broken)
    options = {**TINY, "transports": "local", "sizes": "4KiB", "repeats": 3, "device": "cpu", "pattern": pattern}
    settings = microbench.make_settings(options)
    report = microbench.Report()
    with open_device("cpu") as device:
        world = RankWorld(device, alone)
        microbench.run_cases(world, settings, list(settings.cases), ["cpu:0", "host"], report)
        world.close()
    assert [row["wrong"] for row in report.rows] == [wrong]


def test_wrong_bytes_fail_the_run(tmp_path, capsys):
    settings = microbench.make_settings(
        {**TINY, "transports": "local", "sizes": "4KiB", "repeats": 3, "device": "cpu", "pattern": "contiguous"}
    )
    row = dict.fromkeys(COLUMNS.split(","), 1.0) | {"operation": "contiguous", "transport": "ipc", "target": "cpu:0"}
    report = microbench.Report([row | {"wrong": 3, "source": "cpu:0"}])
    with open_device("cpu") as device:
        assert microbench.publish(report, settings, {}, str(tmp_path / "run"), device.properties) == 1
    assert json.loads((tmp_path / "run" / "result.json").read_text())["exit_code"] == 1
    assert json.loads(capsys.readouterr().out.splitlines()[-1])["rows"][0]["wrong"] == 3


def test_the_check_sees_what_was_written_beside_the_pieces():
    exchange = shapes.shuffled(8, 64, seed=1)
    part = make_pieces(exchange.pairs.source[:5], exchange.pairs.target[:5], 64)
    with open_device("cpu") as device:
        check = Check(device, part, 512, 512)
        source, target = device.allocate(512), device.allocate(512)
        check.fill(source, 1)
        check.poison(target, 1)
        assert check.count_wrong(target) == 5 * 64
        move_reference(target.tensor(), source.tensor(), part)
        assert check.count_wrong(target) == 0
        target.tensor()[int(exchange.pairs.target[6]) + 3] ^= 255
        assert check.count_wrong(target) == 1


def test_reference_moves_pieces_of_any_size():
    rng = np.random.default_rng(0)
    source, target = rng.integers(0, 256, 100, dtype=np.uint8), np.zeros(100, dtype=np.uint8)
    import torch

    pieces = make_pieces([10, 40, 0], [50, 0, 20], [10, 5, 15])
    move_reference(torch.from_numpy(target), torch.from_numpy(source), pieces)
    wanted = np.zeros(100, dtype=np.uint8)
    wanted[50:60], wanted[0:5], wanted[20:35] = source[10:20], source[40:45], source[0:15]
    assert np.array_equal(target, wanted)


def test_many_pieces_are_so_many():
    exchange = shapes.many_pieces()
    assert len(exchange.source) == 20_000
    assert exchange.nbytes == exchange.source_bytes
    assert not np.array_equal(exchange.source.source, exchange.target.source)


def test_lines_of_the_plot_are_carriers_and_directions():
    rows = [
        {"operation": "contiguous", "transport": "local", "source": "cuda:0", "target": "host", "bytes": 4096},
        {"operation": "contiguous", "transport": "local", "source": "host", "target": "cuda:0", "bytes": 4096},
        {"operation": "contiguous", "transport": "ipc", "source": "cuda:0", "target": "cuda:1", "bytes": 8192},
        {"operation": "contiguous", "transport": "ipc", "source": "cuda:0", "target": "cuda:1", "bytes": 4096},
        {"operation": "plain", "transport": "nccl", "source": "cuda:0", "target": "cuda:1", "bytes": 4096},
        {"operation": "prompt", "transport": "ipc", "source": "cuda:0", "target": "cuda:1", "bytes": 1},
    ]
    lines = plots.lines_of(rows)
    assert sorted(lines) == ["ipc", "local in", "local out", "nccl alone"]
    assert [row["bytes"] for row in lines["ipc"]] == [4096, 8192]


def test_gatherings_of_levels():
    cases = shapes.list_cases(["ipc"], [4096])
    assert [case.name for case in cases if case.is_naive] == [
        "prompt/ipc/naive",
        "token_step/ipc/naive",
        "microbatch/ipc/naive",
    ]
    assert set(Gathering) == {Gathering.NAIVE, Gathering.PACKED}
