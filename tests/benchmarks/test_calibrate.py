"""The calibration as a user starts it: rows for every engine, and a file that the library reads."""

import json

import yaml
from click.testing import CliRunner

from dejavu.benchmarks import calibrate
from dejavu.transport.calibration import Engine, Route, read_calibration
from tests.documentation import unexplained


def test_every_route_is_measured_and_written(tmp_path, monkeypatch):
    monkeypatch.setattr(calibrate, "COUNTS", (2, 16))
    monkeypatch.setattr(calibrate, "SIZES", (1024,))
    path, out = tmp_path / "made.yaml", tmp_path / "run"
    arguments = ["--device", "cpu", "--repeats", "1", "--out-file", str(path), "--out", str(out)]
    done = CliRunner().invoke(calibrate.command, arguments, standalone_mode=False)
    assert done.return_value == 0, (done.output, done.exception)
    rows = json.loads(done.output.splitlines()[-1])["rows"]
    assert unexplained("benchmarks.md", "bench calibrate", rows[0]) == []
    assert [(row["route"], row["pieces"]) for row in rows] == [(r, n) for r in ("out", "in", "device") for n in (2, 16)]
    assert all(row[f"{engine}_us"] > 0 for row in rows for engine in (*Engine, "packed"))
    assert {row["wrong"] for row in rows} == {0}
    made = read_calibration(path)
    assert set(made.points) == {Route.OUT, Route.IN, Route.DEVICE}
    for row in rows:
        nbytes = row["pieces"] * row["piece_bytes"]
        assert made.choose(Route(row["route"]), row["pieces"], nbytes).value == row["chosen"]
    assert yaml.safe_load(path.read_text())["device"]
