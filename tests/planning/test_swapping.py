"""Say whether swapping pays: by hand, and against the simulator."""

import json
import shlex
from importlib import import_module

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dejavu.errors import UsageError
from dejavu.planning.lengths import Lengths
from dejavu.planning.setup import PipelineSetup, Setup, Swap
from dejavu.planning.simulator import simulate
from dejavu.planning.swapping import SwapCase
from dejavu.planning.times import FixedTimes

main = import_module("dejavu.cli.main").main


def test_by_hand():
    """Fetches of 0.5 s a token in all 10 rows: 6 to 8 tokens take 3, 3.5 and 4 s, beside steps of 3.2 s."""
    case = SwapCase(5, 3, 10, 3.2, 0.05, 1.0)
    assert case.speedup == pytest.approx(2 * 3 * 3.2 / (3.2 + 3.5 + 4.0))
    assert case.pays
    assert case.pays_by_formula
    assert not SwapCase(40, 3, 10, 3.2, 0.05, 1.0).pays
    assert SwapCase(40, 3, 10, 3.2, 0.05, 1.0).pays_by_formula


@given(
    st.integers(1, 60),
    st.integers(1, 60),
    st.integers(1, 9),
    st.floats(0.01, 10),
    st.floats(0, 1e3),
    st.floats(0.1, 10),
)
def test_pays_where_it_is_at_least_as_fast(prompt, output, batch, token_s, token_bytes, bandwidth):
    case = SwapCase(prompt, output, batch, token_s, token_bytes, bandwidth, 1.5)
    steps_s = sum(max(token_s, (prompt + i) * batch * token_bytes / bandwidth) for i in range(1, output + 1))
    assert case.pays == (case.speedup >= 1)
    assert case.speedup == pytest.approx(1.5 * output * token_s / steps_s)


@pytest.mark.parametrize("bandwidth", [4e3, 12e3, 1e9])
def test_simulator_agrees(bandwidth):
    """With long outputs, and prompts that take next to nothing, the simulated gain is the closed form's."""
    case = SwapCase(20, 400, 4, 1.0, 10.0, bandwidth)
    times, requests = FixedTimes(1e-6, 1.0), [Lengths(20, 400)] * 16
    plain = simulate(Setup((PipelineSetup(4, times, rows=2),)), requests)
    swapped = simulate(Setup((PipelineSetup(4, times, rows=4, swap=Swap(10.0, bandwidth)),)), requests)
    assert plain.makespan_s / swapped.makespan_s == pytest.approx(case.speedup, rel=0.05)


@pytest.mark.parametrize(("gbps", "word"), [(50, "pays"), (1, "does not pay")])
def test_command(capsys, gbps, word):
    """A stage of 10 of opt-13b's layers: 204,800 bytes a token; 16 rows of 100 to 200 tokens, steps of 20 ms."""
    line = "plan --swap --devices 4 --model opt-13b --prompt-len 100 --output-len 100 --batch 8 --token-ms 80"
    assert main(shlex.split(f"{line} --prompt-ms 1 --host-gbps {gbps}")) == 0
    output = capsys.readouterr().out
    assert f"swapping {word}: token steps of 20 ms" in output
    (row,) = json.loads(output.rstrip("\n").rsplit("\n", 1)[-1])["rows"]
    assert (row["batch_without"], row["batch_with"], row["token_ms"]) == (8, 16, 20.0)
    assert row["last_fetch_ms"] == pytest.approx(1e3 * 200 * 16 * 204_800 / (gbps * 1e9))
    assert row["pays"] == (word == "pays")


@pytest.mark.parametrize("more", ["--devices 2 --host-gbps 5", "--devices 41 --host-gbps 5", "--devices 4"])
def test_command_refuses_what_has_no_answer(capsys, more):
    assert main(shlex.split(f"plan --swap --model opt-13b --prompt-ms 1 --token-ms 80 {more}")) == 2
    assert capsys.readouterr().err.count("\n") == 1


def test_a_link_that_moves_nothing_is_refused():
    with pytest.raises(UsageError):
        SwapCase(1, 1, 1, 1.0, 1.0, 0.0)
