"""Sums of tensor groups and mailboxes on GPUs: the cases of `sum_ranks.py`, on two GPUs and on a shared one."""

import os
import subprocess
import sys

import pytest

from dejavu.device import num_cuda_devices
from tests.transport.pair import MPIRUN, ROOT

LIMIT_S = 120


def run_ranks(*cases, environment=()):
    """Run cases on two ranks, and give what they printed."""
    kept = {k: v for k, v in os.environ.items() if not k.startswith(("OMPI_", "PMIX_", "PRTE_"))}
    kept |= {"OMPI_ALLOW_RUN_AS_ROOT": "1", "OMPI_ALLOW_RUN_AS_ROOT_CONFIRM": "1", **dict(environment)}
    command = [*MPIRUN.split(), sys.executable, "-m", "tests.transport.sum_ranks", *cases]
    done = subprocess.run(command, cwd=ROOT, env=kept, capture_output=True, text=True, timeout=LIMIT_S, check=False)
    return done.stdout + done.stderr


@pytest.fixture(params=[pytest.param(1, marks=pytest.mark.gpu), pytest.param(2, marks=pytest.mark.gpu2)])
def environment(request):
    if num_cuda_devices() < request.param:
        pytest.skip(f"{num_cuda_devices()} CUDA devices of {request.param}")
    return {"CUDA_VISIBLE_DEVICES": "0"}.items() if request.param == 1 else ()


def test_sums_are_the_same_bits_on_every_rank_eager_and_replayed(environment):
    output = run_ranks("sums", environment=environment)
    assert "passed sums" in output, output


def test_hidden_states_arrive_in_mailboxes(environment):
    output = run_ranks("mailboxes", environment=environment)
    assert "passed mailboxes" in output, output


def test_a_kernel_gives_up_on_a_rank_that_is_late(environment):
    output = run_ranks("late", environment=environment)
    assert "gave up in time" in output, output
    assert "passed late" in output, output


def test_an_abort_lets_go_of_a_rank_that_died(environment):
    output = run_ranks("death", environment=environment)
    assert "let go after" in output, output
