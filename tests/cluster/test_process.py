import gc
import json
import os
import subprocess
import sys

import pytest

from dejavu.cluster.process import describe, importing
from dejavu.errors import ModelError

PROGRAM = """
import sys, threading, time
from dejavu.cluster.process import guarded
from dejavu.errors import ModelError
def body():
    if sys.argv[1] == "fail":
        raise KeyError("row 7")
    if sys.argv[1] == "thread":
        threading.Thread(target=lambda: [][3]).start()
        time.sleep(30)
    if sys.argv[1] == "usage":
        raise ModelError("no model 'x'")
    if sys.argv[1] == "exit":
        sys.exit(5)
    return 3
sys.exit(guarded(body))
"""


def run(tmp_path, mode, **environment):
    clean = {name: value for name, value in os.environ.items() if not name.startswith(("OMPI_", "PMIX_", "PRTE_"))}
    environment = clean | {"DEJAVU_RUN_DIR": str(tmp_path)} | environment
    return subprocess.run(
        [sys.executable, "-c", PROGRAM, mode], env=environment, capture_output=True, text=True, timeout=20, check=False
    )


def result(tmp_path):
    return json.loads((tmp_path / "result.json").read_text())


def test_the_program_s_own_exit_code_passes(tmp_path):
    assert run(tmp_path, "return").returncode == 3
    assert run(tmp_path, "exit").returncode == 5
    assert not (tmp_path / "result.json").exists()


@pytest.mark.parametrize(
    ("mode", "last"), [("fail", "KeyError: 'row 7'"), ("thread", "IndexError: list index out of range")]
)
def test_exception_is_traced_with_the_rank_and_recorded(tmp_path, mode, last):
    done = run(tmp_path, mode, OMPI_COMM_WORLD_RANK="4", DEJAVU_JOB="x")
    lines = done.stderr.splitlines()
    assert done.returncode == 1
    assert lines[0] == "rank 4: Traceback (most recent call last):"
    assert lines[-1] == f"rank 4: {last}"
    assert result(tmp_path) == {"outcome": "error", "exit_code": 1, "error": f"rank 4 failed: {last}", "rank": 4}


def test_second_failure_does_not_replace_the_first(tmp_path):
    run(tmp_path, "fail", OMPI_COMM_WORLD_RANK="4")
    done = run(tmp_path, "thread", OMPI_COMM_WORLD_RANK="2")
    assert result(tmp_path)["rank"] == 4
    assert done.returncode == 1
    assert done.stderr == "rank 2: IndexError: list index out of range (after another rank had failed)\n"


def test_error_of_the_user_is_one_line_by_the_supervisor_or_else_by_the_rank(tmp_path):
    done = run(tmp_path, "usage", OMPI_COMM_WORLD_RANK="0")
    assert (done.returncode, done.stderr) == (2, "error: no model 'x'\n")
    assert result(tmp_path)["error"] == "no model 'x'"
    (tmp_path / "result.json").unlink()
    done = run(tmp_path, "usage", OMPI_COMM_WORLD_RANK="0", DEJAVU_JOB="x")
    assert (done.returncode, done.stderr) == (2, "")
    elsewhere = str(tmp_path / "not on this host")
    done = run(tmp_path, "usage", OMPI_COMM_WORLD_RANK="3", DEJAVU_JOB="x", DEJAVU_RUN_DIR=elsewhere)
    assert (done.returncode, done.stderr) == (2, "error: no model 'x'\n")


def test_result_names_the_kind_of_the_error():
    assert describe(ModelError("m"), 0).exit_code == 2
    assert describe(RuntimeError("a\nb"), 3).error == "rank 3 failed: RuntimeError: a"
    assert describe(RuntimeError(), 3).error == "rank 3 failed: RuntimeError"
    assert describe(KeyboardInterrupt(), 0).exit_code == 130


def test_no_garbage_is_looked_for_among_what_was_imported():
    made = []
    try:
        with importing():
            assert not gc.isenabled()
            made.append([made])
        assert gc.isenabled()
        assert not any(known is made[0] for known in gc.get_objects())  # it gives those that are looked through
    finally:
        gc.unfreeze()
