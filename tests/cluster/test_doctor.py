import subprocess

import pytest

from dejavu.cluster.doctor import Fact, NotApplicable, State, examine, run_two_ranks, serves_on_cpu
from dejavu.errors import ModelError


def raising(error):
    def find():
        raise error

    return find


@pytest.mark.parametrize(
    ("find", "expected"),
    [
        (lambda: "there", Fact("x", State.OK, "there")),
        (raising(NotApplicable("no device")), Fact("x", State.NOT_APPLICABLE, "no device")),
        (raising(ModelError("no\nmodel")), Fact("x", State.MISSING, "no model", "install it")),
        (raising(ImportError()), Fact("x", State.MISSING, "ImportError", "install it")),
        (
            raising(subprocess.TimeoutExpired("x", 20.0)),
            Fact("x", State.MISSING, "no answer within 20 s", "install it"),
        ),
    ],
)
def test_whatever_a_check_does_is_a_fact(find, expected):
    assert examine(("x", find, "install it")) == expected


def test_a_needed_capability_decides_and_an_accelerator_does_not():
    facts = [Fact("mpirun", State.OK, ""), Fact("NCCL", State.MISSING, "", "")]
    assert serves_on_cpu(facts)
    assert not serves_on_cpu([*facts, Fact("torch", State.MISSING, "", "")])


def test_two_ranks_meet(monkeypatch):
    for name in ("OMPI_COMM_WORLD_RANK", "PMIX_RANK"):
        monkeypatch.delenv(name, raising=False)
    assert "there and back" in run_two_ranks()
