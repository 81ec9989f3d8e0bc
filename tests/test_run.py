"""The runner of all tests: a failure on any rank, and a rank that is lost, must fail the run."""

import os
import subprocess
import sys

import pytest

PROGRAM = """
import os
from mpi4py import MPI

def test_everywhere():
    assert MPI.COMM_WORLD.size == 2

def test_{kind}():
    if MPI.COMM_WORLD.rank == 1:
        {action}
"""


def run(tmp_path, kind, action):
    (tmp_path / "test_ranks.py").write_text(PROGRAM.format(kind=kind, action=action))
    pytest_options = ["-p", "no:hypothesispytest", f"--rootdir={tmp_path}"]
    options = ["--only", "mpi", "--ranks", "2", "--junit", str(tmp_path / "junit"), "--deadline", "50"]
    return subprocess.run(
        [sys.executable, "-m", "tests.run", *options, "--mpi-tests", str(tmp_path), *pytest_options],
        env={**os.environ, "PYTHONDONTWRITEBYTECODE": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=80,
        check=False,
    )


@pytest.mark.parametrize(
    ("kind", "action", "code", "shown"),
    [
        ("passes", "pass", 0, "===== 2 passed in"),
        ("fails", "assert 2 + 2 == 5, 'told by rank 1'", 1, "===== 1 failed, 1 passed in"),
        ("dies", "os._exit(0)", 1, "FAILED on rank 1: (ended before its tests did)"),
    ],
)
def test_one_rank_decides(tmp_path, kind, action, code, shown):
    done = run(tmp_path, kind, action)
    assert done.returncode == code, done.stdout
    assert shown in done.stdout, done.stdout
    assert "\x1b[" not in done.stdout
    if kind == "fails":
        assert "FAILED on rank 1: test_ranks::test_fails" in done.stdout
        assert "told by rank 1" in done.stdout
