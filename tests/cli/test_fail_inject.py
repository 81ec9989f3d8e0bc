"""What `dejavu fail-inject` refuses before anything starts, and what it says of failures that never came."""

import pytest

from dejavu.cli.fail_inject import Aftermath
from dejavu.cli.main import main

REFUSED = {
    (): "nothing is to fail: give --kill, --stop or --random",
    ("--random", "3", "--every", "4"): "--every 4 repeats --kill and --stop",
    ("--random", "-2"): "invalid value for '--random'",
    ("--kill", "both:0@t=1", "--every", "-3"): "invalid value for '--every'",
    ("--kill", "both:0"): "write both:0@step=40, both:0@t=3.5 or both:0@tokens=500",
    ("--kill", "both:0@t=-3"): "'both:0@t=-3' does not say when",
    ("--stop", "both:5@step=3"): "there is no 'both:5' to fail: name one of controller",
    ("--kill", "spare:0@t=1"): "there is no 'spare:0' to fail",
    ("--kill", "both:0@t=1", "--hang-timeout", "0"): "hang_timeout '0' in the command line",
    ("--kill", "both:0@t=1", "--on-failure", "pray"): "'pray' is not one of 'abort', 'wait', 'respawn'",
}


@pytest.mark.parametrize("arguments", REFUSED, ids=" ".join)
def test_wrong_input_is_refused_before_anything_starts(arguments, tmp_path, capsys):
    options = ["--model", "gpt2", "--synthetic", "20,10", "--out", str(tmp_path / "run")]
    assert main(["fail-inject", *options, *arguments]) == 2
    assert REFUSED[arguments] in " ".join(capsys.readouterr().err.split())
    assert not (tmp_path / "run").exists()


def test_failures_that_never_came_are_named():
    aftermath = Aftermath(3, {"kill": 2}, ["both:1@step=900"], [])
    assert not aftermath.is_good
    said = "2 of 3 failures were caused: 2 by kill. The run had ended before both:1@step=900."
    assert aftermath.describe() == [said, "Left behind: nothing."]
