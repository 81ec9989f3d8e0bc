import json
import os
import time
from importlib import import_module

import pytest

main = import_module("dejavu.cli.main").main


def write_status(run, age_s, **values):
    run.mkdir(parents=True)
    path = run / "status.json"
    path.write_text(json.dumps({"state": "serving", "elapsed_s": 3.0} | values))
    then_s = time.time() - age_s
    os.utime(path, (then_s, then_s))


@pytest.fixture
def top(capsys, monkeypatch, tmp_path):
    """Run `dejavu top` in an empty directory; give its exit code, stdout and stderr."""
    monkeypatch.chdir(tmp_path)

    def call(*arguments):
        code = main(["top", *arguments])
        captured = capsys.readouterr()
        return code, captured.out, captured.err

    return call


def test_the_newest_run_is_shown_also_within_another_ones_directory(top, tmp_path):
    runs = tmp_path / "results" / "runs"
    write_status(runs / "plain", 30, tokens_out=11)
    write_status(runs / "injected", 20, state="starting")
    write_status(runs / "injected" / "failure", 1, tokens_out=22)
    code, out, _ = top()
    assert code == 0
    assert "failure: serving" in out
    assert "22, " in out
    assert "no news" not in out
    assert "no news" in top("plain", "--once")[1]


def test_of_a_run_that_has_ended_no_news_is_expected(top, tmp_path):
    write_status(tmp_path / "run", 60)
    (tmp_path / "run" / "result.json").write_text("{}")
    assert "no news" not in top("run")[1]


def test_without_a_run_one_line_says_so(top):
    code, _, err = top()
    assert (code, err.count("\n")) == (2, 1)
    assert "holds no runs" in err
