"""What a benchmark that is stopped early leaves and says."""

import csv
import json

from dejavu.benchmarks.driver import PARTIAL, finish, keep_rows, show_partial
from dejavu.cluster.launcher import RUN_DIR
from dejavu.measure.report.runs import read_run
from dejavu.measure.run_directory import RunDirectory

ROWS = [{"case": f"c{n}", "gbps": 1.5 * n, "wrong": 0} for n in range(3)]


def test_a_benchmark_that_is_stopped_shows_the_rows_it_had(tmp_path, monkeypatch, capsys):
    directory = RunDirectory.create("bench", tmp_path / "run")
    monkeypatch.setenv(RUN_DIR, str(directory.path))
    for count in (1, 2):
        keep_rows("links", ROWS[:count])
    assert read_run(directory.path).tables["links"][1]["gbps"] == "1.5"  # whatever happens to all processes
    show_partial(directory, "stopped by SIGTERM", name="links")
    *_, said, line = capsys.readouterr().out.splitlines()
    assert said == "These are the 2 cases that were done when the benchmark ended early: stopped by SIGTERM"
    assert json.loads(line) == {"bench": "links", "run": str(directory.path), "rows": ROWS[:2], "partial": True}
    with (directory.path / "links.csv").open() as file:
        assert [row["case"] for row in csv.DictReader(file)] == ["c0", "c1"]
    assert not (directory.path / PARTIAL).exists()


def test_one_that_ends_well_or_has_no_rows_says_nothing_of_it(tmp_path, monkeypatch, capsys):
    directory = RunDirectory.create("bench", tmp_path / "run")
    monkeypatch.setenv(RUN_DIR, str(directory.path))
    show_partial(directory, "no rank could start", name="links")
    keep_rows("links", ROWS[:2])
    capsys.readouterr()
    assert finish(directory, "links", ROWS, {}) == 0
    assert "partial" not in capsys.readouterr().out
    assert not (directory.path / PARTIAL).exists()
    assert len((directory.path / "links.csv").read_text().splitlines()) == 4
