"""The engine on a GPU: the CPU's tokens, for every family and shape, and clear words where memory is short."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import pytest

from dejavu.cluster.launcher import Terminal, build_launch, find_mpirun
from dejavu.device import num_cuda_devices
from tests.model_zoo import KINDS

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.timeout(400),
    pytest.mark.skipif(num_cuda_devices() == 0, reason="needs a CUDA device"),
]
ROOT = Path(__file__).parents[2]
HALF_KINDS, HALF_SHAPES = ("opt", "llama"), ("stages", "tensor")
SHAPES = ("one", "stages", "tensor", "split", "replicated", "received")


@pytest.fixture(scope="module")
def results() -> dict[tuple[str, str], dict[str, Any]]:
    """Run every family in every shape, in one job of three ranks that share the GPUs there are."""
    return run_program(SHAPES, KINDS)


def run_program(shapes: Sequence[str], kinds: Iterable[str]) -> dict[tuple[str, str], dict[str, Any]]:
    """Run families in shapes, in one job; give what was found by family and shape."""
    program = (sys.executable, "-m", "tests.cluster.cuda_program", "cuda", ",".join(shapes), *kinds)
    launch = build_launch(
        3,
        program,
        mpirun=find_mpirun(os.environ["PATH"]),
        environment={**os.environ, "PYTHONPATH": str(ROOT)},
        terminal=Terminal(200, color=False),
    )
    done = subprocess.run(
        launch.command, env=dict(launch.environment), cwd=ROOT, capture_output=True, text=True, timeout=380, check=False
    )
    lines = [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]
    assert lines, done.stdout + done.stderr
    return {(line["kind"], line["shape"]): line for line in lines}


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("kind", KINDS)
def test_same_as_transformers_on_the_cpu(results, kind, shape):
    """Greedy and sampled tokens are equal in float32; several ranks share a GPU where there are fewer than ranks."""
    check(results[kind, shape])


def check(found: dict[str, Any]) -> None:
    """Demand the reference's tokens and log-probabilities."""
    assert "failure" not in found, found["failure"]
    assert found["wrong"] == []
    assert found["requests"] == 10
    assert found["error"] < 1e-3


@pytest.mark.gpu2
@pytest.mark.skipif(num_cuda_devices() < 2, reason="needs two CUDA devices")
def test_hand_over_by_nccl():
    """NCCL takes one rank a GPU, so two GPUs are needed."""
    for found in run_program(["split-nccl"], ["gpt2", "llama"]).values():
        check(found)


@pytest.mark.parametrize("shape", HALF_SHAPES)
@pytest.mark.parametrize("kind", HALF_KINDS)
def test_other_splits_give_the_same_tokens_in_16_bits(results, kind, shape):
    """Where the two likeliest tokens are further apart than rounding moves them."""
    found = results[kind, f"{shape} float16"]
    assert found["wrong"] == 0
    assert found["tokens"] > 10


def test_rows_that_do_not_fit_are_refused_with_the_number_that_would(tmp_path):
    arguments = ["--model", "opt-1.3b", "--load-format", "dummy", "--device", "cuda", "--microbatch-size", "100000"]
    command = [sys.executable, "-m", "dejavu.cli.main", "serve", *arguments, "--row-len", "2048"]
    done = subprocess.run(
        [*command, "--out", str(tmp_path / "run"), "--no-progress"], capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 2, done.stdout + done.stderr
    assert "rows would fit" in done.stderr
