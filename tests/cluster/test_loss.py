"""Lose a worker with and without its memory: a spare goes on with what the keeper or the replica has."""

import json
import os
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from contextlib import contextmanager
from pathlib import Path

import pytest

from dejavu.cluster.launcher import JOB, find_mpirun
from dejavu.cluster.leftovers import job_processes, processes
from dejavu.cluster.segments import SHARED_MEMORY, directory_of
from dejavu.device.keeper import SOCKET
from dejavu.device.keeper_line import keeper_directory
from dejavu.measure.failures import FailureRecord
from dejavu.measure.records import TransferRecord, read_csv
from tests.cluster.test_recovery import left_in_shared_memory
from tests.cluster.test_serve import FAULT_TOLERANT, REPOSITORY, read_outputs, run

pytestmark = pytest.mark.timeout(150)
SHAPE = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "vocab_size": 199,
    "hidden_size": 48,
    "num_hidden_layers": 6,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "intermediate_size": 96,
    "max_position_embeddings": 512,
    "tie_word_embeddings": False,
}
REQUESTS = 6
PROMPT_LEN, OUTPUT_LEN = 20, 30


@pytest.fixture(scope="module")
def options(tmp_path_factory):
    directory = tmp_path_factory.mktemp("model")
    (directory / "config.json").write_text(json.dumps(SHAPE))
    numbers = {"--num-requests": REQUESTS, "--prompt-len": PROMPT_LEN, "--output-len": OUTPUT_LEN, "--threads": 1}
    shape = {"--pp": 2, "--microbatch-size": 3, "--block-size": 16, "--stall-timeout": 30}
    given = {"--model": directory, "--load-format": "dummy", "--dtype": "float32", **numbers, **shape}
    return ["--no-progress", *(str(word) for pair in given.items() for word in pair)]


@pytest.fixture(scope="module")
def expected(options, tmp_path_factory):
    path = tmp_path_factory.mktemp("undisturbed") / "run"
    done = run(["-m", "dejavu.cli.main", "serve", *options, "--out", path])
    assert done.returncode == 0, done.stderr
    return tokens(path)


def tokens(path: Path):
    return {name: output["token_ids"] for name, output in read_outputs(path).items()}


CASES = {
    "process": ("process", 2, ["--replicate", "ring"]),
    "memory": ("memory", 1, ["--replicate", "ring", "--replicate-every", "4"]),
    "memory of another host": ("memory", 2, ["--replicate", "ring", "--replica-transport", "tcp"]),
}


# The rank dies before it computes pass 15 of a microbatch; of every fourth, the last copy was that of 12. What the last
# step adds may be on its way to another host.
LOST = {"process": {0}, "memory": {1, 2, 3}, "memory of another host": {0, 1}}


@pytest.mark.parametrize("name", CASES)
def test_every_request_goes_on(options, expected, tmp_path, name):
    loses, rank, more = CASES[name]
    path, note, before = tmp_path / "run", tmp_path / "note", set(SHARED_MEMORY.iterdir())
    program = [REPOSITORY / "tests/cluster/loss_program.py", rank, 15, loses, note]
    done = run([*program, "serve", *options, *more, "--spares", 1, "--out", path], ranks=4)
    assert note.exists(), done.stderr
    assert json.loads((path / "result.json").read_text())["outcome"] == "ok", done.stdout + done.stderr
    assert tokens(path) == expected
    (failure,) = read_csv(path / "failures.csv", FailureRecord)
    assert failure.prompts_recomputed == 0
    assert failure.steps_lost in LOST[name], failure
    assert failure.tokens_replayed <= failure.steps_lost * REQUESTS
    assert (failure.bytes_restored > 0) == (loses == "memory")
    assert {t.kind for t in read_csv(path / "transfers.csv", TransferRecord)} == {"replica"}
    assert done.left == []
    until(lambda: left_in_shared_memory(before) == [])  # the keeper is the last to go


def test_nothing_is_left_where_mpirun_is_killed(options, tmp_path):
    """Kill a plain mpirun in the middle of a run: what its ranks shared is gone, though none of them could clear it."""
    mpirun = [find_mpirun(os.environ["PATH"]), "-n", 3, "--oversubscribe", "--bind-to", "none", *FAULT_TOLERANT]
    command = [*mpirun, sys.executable, "-m", "dejavu.cli.main", "serve", *options, "--rate", "1"]
    with started([*command, "--out", tmp_path / "run"]) as process:
        directory = directory_of(f"prterun-{socket.gethostname()}-{process.pid}")
        until(lambda: (tmp_path / "run" / "journal.jsonl").exists())
        assert list(directory.glob("sm_segment.*"))
        process.kill()
    until(lambda: not directory.exists())
    shutil.rmtree(Path(tempfile.gettempdir(), f"ompi.{process.pid}"))


@contextmanager
def started(command):
    """Start a program as a user does, and kill it at the end."""
    prefixes = ("OMPI_", "PMIX_", "PRTE_", "DEJAVU_")
    environment = {name: value for name, value in os.environ.items() if not name.startswith(prefixes)}
    environment |= {"OMPI_ALLOW_RUN_AS_ROOT": "1", "OMPI_ALLOW_RUN_AS_ROOT_CONFIRM": "1"}
    streams = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
    with subprocess.Popen(list(map(str, command)), cwd=REPOSITORY, env=environment, **streams) as process:
        try:
            yield process
        finally:
            process.kill()


def test_nothing_is_left_where_the_launcher_is_killed(options, tmp_path):
    """Kill the launcher itself in the middle of a run: its ranks and its keeper end, and their files with them."""
    command = [sys.executable, "-m", "dejavu.cli.main", "serve", *options, "--rate", "1", "--out", tmp_path / "run"]
    with started(command):
        job = until(lambda: job_of(tmp_path / "run"))
        directory = keeper_directory(job)
        until(lambda: (directory / SOCKET).exists())
        assert directory_of(job).exists()
    until(lambda: not directory.exists())
    until(lambda: not job_processes(job))
    until(lambda: not directory_of(job).exists())


def job_of(run_directory):
    """Find the name of a job by the environment of its ranks."""
    mark = f"DEJAVU_RUN_DIR={run_directory}".encode()
    for path in processes():
        try:
            words = (path / "environ").read_bytes().split(b"\0")
        except OSError:
            continue
        if mark in words:
            return next(word[len(JOB) + 1 :].decode() for word in words if word.startswith(f"{JOB}=".encode()))
    return None


def until(look):
    """Wait until a look gives something, and give that."""
    end_s = time.monotonic() + 60
    while not (found := look()):
        assert time.monotonic() < end_s
        time.sleep(0.02)
    return found
