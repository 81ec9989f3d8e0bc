import io

import pytest
from rich.console import Console

from dejavu.measure.top import bar, draw_status

STATUS = {
    "state": "serving",
    "requests_total": 8,
    "requests_done": 2,
    "requests_running": 4,
    "requests_waiting": 2,
    "tokens_out": 120,
    "elapsed_s": 3.25,
    "rows": 4,
    "busy_rows": 4,
}


def drawn(status, rate=40.0, silence_s=0.0):
    console = Console(width=100, record=True, file=io.StringIO())
    console.print(draw_status("a-run", status, rate, silence_s))
    return console.export_text()


def test_what_is_there_is_shown():
    text = drawn(STATUS | {"stages": {"token 0": 0.5}, "kv_blocks": {"token": (3, 12)}})
    assert "a-run: serving, 3.2 s" in text
    assert "2 of 8 done, 4 running, 2 waiting" in text
    assert "120, 40.0 a second" in text
    assert "█" * 10 + "░" * 10 + " 50% busy" in text
    assert "3 of 12 blocks" in text


def test_what_a_run_does_not_use_is_not_shown():
    text = drawn(STATUS)
    assert not any(word in text for word in ("swaps", "replicas", "failure", "KV"))


def test_failures_are_told_in_words():
    text = drawn(STATUS | {"failures": ["rank 3 died", "rank 5 takes over"], "replication": {"lag_steps": 2}})
    text += drawn(STATUS | {"swap": {"fetches": 7, "bytes": 3 << 20}})
    assert "rank 3 died" in text
    assert "rank 5 takes over" in text
    assert "at most 2 steps behind" in text
    assert "7 fetches, 3.00 MiB in and out" in text


def test_of_many_failures_the_newest_are_shown():
    text = drawn(STATUS | {"failures": [f"rank {n} died" for n in range(50)]})
    assert "50, the newest:" in text
    assert "rank 49 died" in text
    assert "rank 42 died" in text
    assert "rank 41 died" not in text


def test_a_run_that_says_nothing_any_more_is_told_of():
    assert "no news" not in drawn(STATUS, silence_s=1.0)
    assert "for 12.0 s: the run recovers from a failure, or was killed" in drawn(STATUS, silence_s=12.0)
    assert "no news" not in drawn({"state": "starting"}, silence_s=12.0)


def test_empty_status_is_a_start():
    assert "starting" in drawn({}, 0.0)


@pytest.mark.parametrize(("value", "whole", "filled"), [(0, 0, 0), (1, 2, 10), (5, 2, 20), (-1, 2, 0)])
def test_bar_is_bounded(value, whole, filled):
    assert bar(value, whole) == "█" * filled + "░" * (20 - filled)
