"""Processes that join a run: their death is told as fast as that of a first one, by whoever watches them."""

import json

import pytest

from tests.cluster.test_serve import REPOSITORY, run

pytestmark = pytest.mark.timeout(150)
SOON_MS = 1000.0  # on a busy machine; a quiet one takes 1 to 20


def test_death_of_who_joined_is_told_by_its_lock(tmp_path):
    """A first process, one that joined, and one that such a one watches, die while mpirun stands still."""
    done = run([REPOSITORY / "tests/cluster/recruit_program.py", tmp_path], ranks=3)
    said = f"{done.stdout}\n{done.stderr}"
    told = {path.name: json.loads(path.read_text()) for path in tmp_path.glob("told-*")}
    # processes 2, 3 (which joined) and 0 die; 4 joins last
    assert sorted(told) == ["told-0-0", "told-0-1", "told-1-0", "told-1-1", "told-2-1", "told-2-4"], said
    for number in range(3):
        losses = [loss for name, loss in told.items() if name.startswith(f"told-{number}-")]
        assert any(loss["by_lock"] for loss in losses), told  # who is first revokes, which may tell the other one
        assert max(loss["ms"] for loss in losses) < SOON_MS, told
    assert done.left == []
