"""Ranks that die or hang while they serve: the run goes on in place, and every output is what it is without failure."""

import fcntl
import json
import os
import re
import secrets
import signal
import subprocess
import sys
import tempfile
import time
from contextlib import suppress
from dataclasses import asdict
from functools import cache
from pathlib import Path

import numpy as np
import pytest

from dejavu.cluster.injection import FAULTS, Fault
from dejavu.kv.disk import HEAD, HEADER_BYTES, find_rows, tokens_begin, unpack_header
from dejavu.kv.layout import PoolLayout
from dejavu.measure.failures import FailureRecord
from dejavu.measure.lines import make_line, read_line
from dejavu.measure.records import StepRecord, read_csv
from dejavu.measure.report.page import run_page
from dejavu.measure.report.runs import read_run
from dejavu.transport.lifeline import process_state
from tests.measure.trace_processor import loaded
from tests.model_zoo import make_checkpoint

pytestmark = pytest.mark.timeout(200)

REPOSITORY = Path(__file__).parents[2]
DEADLINE_S = 150
GRACE_S = 0.5
MARK = "DEJAVU_TEST_MARK"
SHARED_MEMORY = Path("/dev/shm")

REQUESTS = [
    {
        "prompt_token_ids": [(7 * n + 11 * t) % 190 + 3 for t in range(3 + 5 * n % 17)],
        "max_tokens": 18 + 4 * (n % 3),
        "ignore_eos": True,
        "temperature": 0.8 * (n % 2),
        "seed": n,
    }
    for n in range(6)
]


def serve(directory, *arguments, faults=()):
    """Serve with faults."""
    return start("serve", *arguments, "--out", directory, faults=faults)


def start(command, *arguments, faults=()):
    """Run a command as a user does; give what ended, and what its processes left behind."""
    mark, environment = marked(faults)
    program = [sys.executable, "-m", "dejavu.cli.main", command, *map(str, arguments)]
    done = subprocess.run(
        program, env=environment, cwd=REPOSITORY, capture_output=True, text=True, timeout=DEADLINE_S, check=False
    )
    done.left = processes(mark)
    return done


def marked(faults):
    """Give what marks the processes of a job, and their environment."""
    prefixes = ("OMPI_", "PMIX_", "PRTE_", "DEJAVU_")
    environment = {name: value for name, value in os.environ.items() if not name.startswith(prefixes)}
    mark = secrets.token_hex(8)
    environment |= {MARK: mark, "COLUMNS": "200"}
    environment |= {"PYTHONPATH": os.pathsep.join([str(REPOSITORY), os.environ.get("PYTHONPATH", "")])}
    return mark, environment | {FAULTS: json.dumps([asdict(fault) for fault in faults])}


def processes(mark):
    """List the processes of a job."""
    return [path for path in Path("/proc").glob("[0-9]*") if has_mark(path, f"{MARK}={mark}".encode())]


def has_mark(process, mark):
    try:
        return mark in (process / "environ").read_bytes().split(b"\0")
    except OSError:
        return False


def left_in_shared_memory(before):
    """Give what is there since, and of no job that still runs, as those of other tests may, nor just about to go."""
    deadline_s = time.monotonic() + GRACE_S
    while left := [path for path in SHARED_MEMORY.glob("dejavu*") if path not in before and is_unclaimed(path)]:
        if time.monotonic() > deadline_s:
            break
        time.sleep(0.05)
    return left


def is_unclaimed(path):
    try:
        file = os.open(path, os.O_RDONLY)
    except FileNotFoundError:
        return False
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    finally:
        os.close(file)
    return True


def read_outputs(directory):
    lines = (directory / "outputs.jsonl").read_text().splitlines()
    return {output["request_id"]: output["token_ids"] for output in map(json.loads, lines)}


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    """Give a directory with a small Llama and a workload, and what is asked of every run."""
    directory = tmp_path_factory.mktemp("recovery")
    make_checkpoint("llama", directory / "model")
    (directory / "workload.jsonl").write_text("".join(json.dumps(request) + "\n" for request in REQUESTS))
    own = ["--model", directory / "model", "--workload", directory / "workload.jsonl", "--no-progress", "--threads", 1]
    return directory, [*own, "--microbatch-size", 2, "--block-size", 8]


@pytest.fixture(scope="module")
def expected(base):
    """Give the outputs of a run without failure."""
    directory, arguments = base
    done = serve(directory / "whole", *arguments, "--pp", 2)
    assert done.returncode == 0, done.stderr
    assert not (directory / "whole" / "failures.csv").exists()
    return read_outputs(directory / "whole")


CASES = {
    # a process; a device, whose KV comes back from its replica; a spare; a process that is stopped
    "process-device-spare-hang": (
        ["--pp", 2, "--spares", 4, "--replicate", "ring", "--hang-timeout", 0.5],
        [
            Fault(2, "kill", step=3),
            Fault(1, "kill", step=7, loses_memory=True),
            Fault(5, "kill", step=9),
            Fault(2, "stop", step=12),
        ],
        {"stage 1": 2, "stage 0": 1, "spare": 1},
        0,
    ),
    # two at once, then a device without a replica, then the one that replaced it
    "two-at-once-lost-replacement": (
        ["--pp", 3, "--spares", 4],
        [
            Fault(1, "kill", step=3),
            Fault(3, "kill", step=3),
            Fault(2, "kill", step=7, loses_memory=True),
            Fault(2, "kill", step=11),
        ],
        {"stage 0": 1, "stage 2": 1, "stage 1": 2},
        1,
    ),
    # prompt and token workers; a device of the token side before any replica has its prompts, and one after
    "prompt-token-lost": (
        ["--prompt-pp", 1, "--token-pp", 2, "--spares", 4, "--replicate", "ring"],
        [
            Fault(3, "kill", step=0, loses_memory=True),
            Fault(1, "kill", step=1),
            Fault(3, "kill", step=3),
            Fault(2, "kill", step=8, loses_memory=True),
        ],
        {"prompt stage 0": 1, "token stage 1": 2, "token stage 0": 1},
        0,
    ),
    # swapped KV without replicas: a process, and a device; in host memory is what was flushed
    "swapped": (
        ["--pp", 2, "--num-microbatches", 3, "--swap", "--spares", 2],
        [Fault(2, "kill", step=5), Fault(1, "kill", step=9, loses_memory=True)],
        {"stage 0": 1, "stage 1": 1},
        0,
    ),
    # the controller, both tensor ranks of a stage, and the one that became the controller
    "controller-tensor-ranks": (
        ["--tp", 2, "--spares", 4],
        [Fault(0, "kill", step=4), Fault(1, "kill", step=7), Fault(2, "kill", step=10), Fault(0, "kill", step=14)],
        {"stage 0 tensor rank 0": 1, "stage 0 tensor rank 1": 1, "controller": 2},
        0,
    ),
}


@pytest.fixture(scope="module")
def recovered(base):
    """Give what runs a case, each once."""
    directory, arguments = base

    @cache
    def run(name):
        options, faults, _, _ = CASES[name]
        return serve(directory / name, *arguments, *options, faults=faults)

    return run


@pytest.mark.parametrize("name", CASES)
def test_every_output_is_that_of_a_run_without_failure(base, expected, recovered, name):
    directory, _ = base
    options, faults, targets, least_recomputed = CASES[name]
    shared = set(SHARED_MEMORY.iterdir())
    done = recovered(name)
    said = f"{done.stdout}\n{done.stderr}"
    assert done.returncode == 0, said
    assert read_outputs(directory / name) == expected
    records = read_csv(directory / name / "failures.csv", FailureRecord)
    found = {target: sum(record.target == target for record in records) for target in targets}
    assert (found, len(records)) == (targets, len(faults)), said
    for record in records:
        assert record.injected_s <= record.detected_s <= record.rebuilt_s <= record.restored_s <= record.resumed_s
        assert record.recovery_s == pytest.approx(record.resumed_s - record.injected_s)
    recomputed = sum(record.prompts_recomputed for record in records)
    assert recomputed >= least_recomputed if least_recomputed else recomputed == 0, said
    assert sum(record.prompts_avoidable + record.steps_beyond for record in records) == 0, said
    assert sum(record.bytes_restored > 0 for record in records) == ("--replicate" in options)
    is_cut_off = name == "prompt-token-lost"  # prompts that no replica had come again from those who computed them
    assert (sum(record.prompts_handed_over for record in records) > 0) == is_cut_off, said
    assert said.count("serving again after") + said.count("serving went on after") == len(faults)
    assert done.left == []
    assert left_in_shared_memory(shared) == []


def test_perfetto_opens_the_trace_of_a_run_that_lost_ranks(base, recovered, tmp_path):
    directory, _ = base
    name = "prompt-token-lost"
    recovered(name)
    failures = read_csv(directory / name / "failures.csv", FailureRecord)
    events = json.loads((directory / name / "trace.json").read_text())["traceEvents"]
    with loaded(directory / name / "trace.json", tmp_path) as perfetto:
        assert not list(perfetto.query("select name from stats where severity != 'info' and value > 0"))
        found = {row.name for row in perfetto.query("select name from slice where category = 'failure'")}
        lost = {f"{failure.target} (rank {failure.rank})" for failure in failures}
        assert found == {f"{who} {what}" for who in lost for what in ("lost", "recovered")}
        slices = list(perfetto.query("select slice.id from slice join thread_track on track_id = thread_track.id"))
        arrows = list(perfetto.query("select id from flow"))
    assert len(slices) == sum(event["ph"] == "X" for event in events)
    assert len(arrows) == sum(event["ph"] in "tf" for event in events) > 0


def test_used_spare_is_replaced_while_serving(base, expected, tmp_path):
    """A process that joined takes a place as any spare does, the controller's too; requests wait where they have to."""
    _, arguments = base
    faults = [Fault(1, "kill", step=3), Fault(0, "kill", tokens=60)]
    shared = set(SHARED_MEMORY.iterdir())
    done = serve(tmp_path / "run", *arguments, "--pp", 2, "--spares", 1, "--on-failure", "wait", faults=faults)
    said = f"{done.stdout}\n{done.stderr}"
    assert done.returncode == 0, said
    assert read_outputs(tmp_path / "run") == expected
    records = read_csv(tmp_path / "run" / "failures.csv", FailureRecord)
    assert [record.target for record in records] == ["stage 0", "controller"], said
    assert "rank 3 takes over" in said  # the spare
    assert "rank 4 takes over" in said  # the process that was started in its place
    assert "starting it again" not in said, said
    assert done.left == []
    assert left_in_shared_memory(shared) == []


def test_without_a_spare_left_the_run_ends_with_who_died(base, tmp_path):
    _, arguments = base
    faults = [Fault(1, "kill", step=2), Fault(2, "kill", step=5)]
    done = serve(tmp_path / "run", *arguments, "--pp", 2, "--spares", 1, faults=faults)
    assert done.returncode == 1
    result = json.loads((tmp_path / "run" / "result.json").read_text())
    assert result["error"].startswith("stage 1 (rank 2) died, and no spare is left to take over"), done.stderr
    assert "Traceback" not in done.stderr, done.stderr
    assert done.left == []


def test_fail_inject_compares_with_a_run_without_failure(tmp_path):
    """Stages that wait instead of computing; the controller and the only stage die."""
    options = ["--model", "gpt2", "--synthetic", "20,10", "--spares", 2, "--num-requests", 2, "--output-len", 60]
    faults = ["--kill", "both:0@step=4", "--kill", "controller@t=0.3"]
    done = start("fail-inject", *options, *faults, "--no-progress", "--out", tmp_path / "run")
    assert done.returncode == 0, f"{done.stdout}\n{done.stderr}"
    last = json.loads(done.stdout.splitlines()[-1])
    assert (last["bench"], sorted(row["target"] for row in last["rows"])) == ("fail-inject", ["controller", "stage 0"])
    assert "All 2 outputs are the same." in done.stdout
    names = {path.name for path in (tmp_path / "run").iterdir()}
    assert names >= {"failures.csv", "latency.csv", "progress.csv", "progress.png", "whole", "failure"}
    assert done.left == []


def test_lost_run_is_started_again_where_it_was(base, expected, tmp_path):
    """By the supervisor, with what the keeper has kept of KV and weights: it outlives ranks that end in good order."""
    _, arguments = base
    faults = [Fault(0, "kill", step=5)]
    done = serve(tmp_path / "run", *arguments, "--pp", 2, "--on-failure", "respawn", faults=faults)
    said = f"{done.stdout}\n{done.stderr}"
    assert done.returncode == 0, said
    assert said.count("starting it again where it was") == 1
    assert "requests go on where they were: 0 prompts computed again" in said
    assert read_outputs(tmp_path / "run") == expected
    assert done.left == []


def test_lost_run_goes_on_by_hand(base, expected, tmp_path):
    """What was given out stays; the rest is computed again, for nobody has kept its KV."""
    _, arguments = base
    faults = [Fault(1, "kill", step=6)]
    done = serve(tmp_path / "run", *arguments, "--pp", 2, faults=faults)
    assert done.returncode == 1, done.stderr
    journal = (tmp_path / "run" / "journal.jsonl").read_text()
    assert journal.count('["token"') > len(REQUESTS)
    so_far = read_run(tmp_path / "run")
    assert {step.rank for step in so_far.steps} >= {2}
    assert "This run was cut off: all below is what it had recorded so far, " in run_page(so_far)
    again = start("serve", "--resume", tmp_path / "run")
    assert again.returncode == 0, again.stderr
    assert re.search(r"requests go on where they were: [1-9]\d* prompts computed again", again.stdout)
    assert (tmp_path / "run" / "journal.jsonl").read_text().startswith(journal)
    steps = read_csv(tmp_path / "run" / "steps.csv", StepRecord)
    assert steps[: len(so_far.steps)] == so_far.steps
    assert not (tmp_path / "run" / "parts").exists()
    assert read_outputs(tmp_path / "run") == expected
    assert done.left == again.left == []


ALL_KILLED = {
    # stages that swap behind a prompt pipeline; and stages of which one has a request's first token broken on its disk
    "swapped-disaggregated": (["--prompt-pp", 1, "--token-pp", 2, "--num-microbatches", 3, "--swap"], 2, 0),
    "broken": (["--pp", 2], 1, 1),
}


@pytest.mark.parametrize("case", ALL_KILLED)
def test_run_goes_on_after_the_host_was_started_again(base, expected, tmp_path, case):
    """Every process is killed at once, the keeper and the supervisor too, and clocks begin anew."""
    _, arguments = base
    options, rank, num_recomputed = ALL_KILLED[case]
    run, kv = tmp_path / "run", tmp_path / "kv"
    kill_all(run, *arguments, *options, "--kv-disk", kv, rank=rank)
    restart_clock(run / "journal.jsonl")
    if num_recomputed:
        break_first_token(next(kv.glob("*/0.1.0.kv")))
    again = start("serve", "--resume", run)
    said = f"{again.stdout}\n{again.stderr}"
    assert again.returncode == 0, said
    assert f"requests go on where they were: {num_recomputed} prompts computed again" in said, said
    assert ("fail their checksums" in said) == bool(num_recomputed), said
    assert read_outputs(run) == expected
    assert list(kv.iterdir()) == []
    assert again.left == []


def kill_all(directory, *arguments, rank):
    """Serve until a rank has stopped by itself after some steps; kill every process of the job."""
    mark, environment = marked([Fault(rank, "stop", step=12)])
    program = [sys.executable, "-m", "dejavu.cli.main", "serve", *map(str, arguments), "--out", str(directory)]
    deadline = time.monotonic() + DEADLINE_S
    with (
        tempfile.TemporaryDirectory(prefix="dv", ignore_cleanup_errors=True) as files,
        (directory.parent / "said").open("w") as said,
        subprocess.Popen(
            program, env={**environment, "TMPDIR": files}, cwd=REPOSITORY, stdout=said, stderr=said
        ) as job,
    ):
        while not any(map(is_stopped, processes(mark))):
            assert job.poll() is None, (directory.parent / "said").read_text()
            assert time.monotonic() < deadline
            time.sleep(0.02)
        time.sleep(0.5)  # others have passed on what they had
        refused = start("serve", "--resume", directory)
        assert (refused.returncode, "is still going on" in refused.stderr) == (2, True), refused.stderr
        while left := processes(mark):
            for path in left:
                with suppress(ProcessLookupError):
                    os.kill(int(path.name), signal.SIGKILL)
            job.poll()
    assert (directory / "journal.jsonl").read_text().count('["token"') > len(REQUESTS)


def is_stopped(process):
    try:
        return process_state(int(process.name)) == "T"
    except OSError:
        return False


def restart_clock(journal):
    """Have a journal say that its run began on another start of the host, whose clock was far ahead of this one's."""
    first, rest = journal.read_bytes().split(b"\n", 1)
    kind, origin_s, wall_s, _ = read_line(first + b"\n")
    journal.write_bytes(make_line([kind, origin_s + 1e6, wall_s, "another"]).encode() + rest)


def break_first_token(path):
    """Change a bit of the first token of some request of which the file has more than two."""
    data = bytearray(path.read_bytes())
    layout = PoolLayout(**unpack_header(data[:HEADER_BYTES])[1]["layout"])
    size = layout.block_size
    row = next(iter(find_rows(np.frombuffer(data, HEAD, layout.num_blocks * size, HEADER_BYTES), size).values()))
    data[tokens_begin(layout) + row.blocks[0] * size * layout.bytes_per_token + 5] ^= 16
    path.write_bytes(data)


def test_what_cannot_go_on_is_refused(base, expected, tmp_path):
    directory, _ = base
    for arguments, said in (
        ([tmp_path / "none"], "holds no run that could go on"),
        ([directory / "whole"], "has ended well: there is nothing to go on with"),
        ([directory / "whole", "--pp", 4], "leave out pp"),
    ):
        done = start("serve", "--resume", *arguments)
        assert (done.returncode, said in " ".join(done.stderr.split())) == (2, True), done.stderr
