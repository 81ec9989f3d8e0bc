"""The validation benchmark: overheads out of made-up records, differences by hand, wrong tokens, and a small run."""

import json
import subprocess
import sys

import pytest
from click.testing import CliRunner

from dejavu.benchmarks import validate
from dejavu.benchmarks.predicted import (
    CASES,
    Overheads,
    calibration,
    calibration_requests,
    compare,
    count_wrong,
    draw_requests,
    make_requests,
    measure_overheads,
    predict,
    simulated,
)
from dejavu.errors import UsageError
from dejavu.measure.records import StepRecord
from dejavu.planning.lengths import Lengths
from dejavu.planning.simulator import simulate
from dejavu.request import Completion
from tests.documentation import unexplained

TIMES_MS = 50.0, 16.0


def completions_of(result, requests):
    """Let requests end as a simulation says, with the tokens of synthetic stages for 500 words."""
    done = []
    for index, request in enumerate(requests):
        completion = Completion(request, admitted_s=result.admitted_s[index], finish_s=result.finish_s[index])
        last = request.prompt_token_ids[-1]
        for place in range(request.sampling.max_tokens):
            last = (last * 31 + (len(request.prompt_token_ids) + place) * 17 + 7) % 500
            completion.token_ids.append(last)
        done.append(completion)
    return done


def test_overheads_come_back_out_of_records():
    """A simulated calibration run, whose records have the overheads that were put in."""
    true = Overheads(prompt_s=0.003, token_s=0.002, hop_s=0.0007, admission_s=0.0011)
    case = calibration(3)
    lengths = calibration_requests(case, TIMES_MS)
    result = simulate(simulated(case.config(TIMES_MS), true), lengths, record=True)
    gap_s = 0.0004  # of each pass's overhead after its end
    steps = [StepRecord(*[getattr(s, n) for n in StepRecord.__slots__]) for s in result.steps]
    for step in steps:
        step.end_s -= gap_s
    found = measure_overheads(steps, completions_of(result, make_requests(lengths)), TIMES_MS)
    assert found.prompt_s == pytest.approx(true.prompt_s, abs=1e-6)
    assert found.token_s == pytest.approx(true.token_s, abs=1e-6)
    assert found.hop_s == pytest.approx(true.hop_s, abs=1e-6)
    assert found.admission_s == pytest.approx(true.admission_s, abs=1e-6)
    for step in steps:
        step.end_s += 0.001
    assert found.with_passes(steps, TIMES_MS).token_s == pytest.approx(true.token_s + 0.001, abs=1e-6)
    assert found.with_passes([], TIMES_MS) == found


def test_differences_are_of_the_prediction():
    case = next(case for case in CASES if case.name == "pp2")
    lengths = draw_requests(case, TIMES_MS, 9, 0)
    result = predict(case.config(TIMES_MS), lengths, Overheads())
    completions = completions_of(result, make_requests(lengths))
    same = compare(result, completions)
    assert {name: value for name, value in same.items() if "difference" in name} == pytest.approx(
        {
            "requests_per_s_difference_percent": 0,
            "p95_normalized_latency_s_difference_percent": 0,
            "makespan_s_difference_percent": 0,
        }
    )
    for completion in completions:  # all take twice as long
        completion.finish_s += completion.finish_s - completion.request.arrival_s
    slower = compare(result, completions)
    assert slower["requests_per_s_difference_percent"] == pytest.approx(100)
    assert slower["p95_normalized_latency_s_difference_percent"] == pytest.approx(-50)


def test_wrong_tokens_are_counted():
    lengths = [Lengths(5, 6, 0.1), Lengths(1, 3, 0.1)]
    result = predict(calibration(2).config(TIMES_MS), lengths, Overheads())
    completions = completions_of(result, make_requests(lengths))
    assert count_wrong(completions, 500) == 0
    completions[0].token_ids[2] += 1  # this one, and what should have come of it
    del completions[1].token_ids[-1]
    assert count_wrong(completions, 500) == 3


def test_poisson_arrivals_do_not_outrun_the_engine():
    case = next(case for case in CASES if case.name == "dp4-poisson")
    lengths = draw_requests(case, TIMES_MS, 200, 0)
    at_once = predict(case.config(TIMES_MS), [each._replace(arrival_s=0.1) for each in lengths], Overheads())
    rate = (len(lengths) - 1) / (lengths[-1].arrival_s - lengths[0].arrival_s)
    assert rate == pytest.approx(0.7 * at_once.requests_per_s, rel=0.2)


def test_unknown_configurations_are_refused():
    with pytest.raises(UsageError, match="'pp9', which is none of pp1, "):
        CliRunner().invoke(validate.command, ["--cases", "pp1,pp9"], standalone_mode=False, catch_exceptions=False)


def test_a_small_run(tmp_path):
    out = tmp_path / "run"
    arguments = ["--cases", "pp2", "--num-requests", "3", "--prompt-ms", "20", "--token-ms", "8", "--out", str(out)]
    command = [sys.executable, "-m", "dejavu.cli.main", "bench", "validate", *arguments]
    done = subprocess.run(command, capture_output=True, text=True, timeout=100, check=False)
    assert done.returncode == 0, done.stderr
    rows = json.loads(done.stdout.splitlines()[-1])["rows"]
    assert unexplained("planning.md", "bench validate", rows[0]) == []
    assert [row["configuration"] for row in rows] == ["pp2", "recovery"]
    assert (rows[0]["requests"], rows[0]["wrong"]) == (3, 0)
    assert rows[0]["predicted_requests_per_s"] == pytest.approx(rows[0]["requests_per_s"], rel=0.5)
    assert all(row["requests"] is None and row["note"].startswith("waived") for row in rows[1:])
    assert (out / "validate.csv").exists()
    assert len((out / "requests.csv").read_text().splitlines()) == 1 + 3
