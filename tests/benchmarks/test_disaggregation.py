"""The disaggregation benchmark: its closed forms, what it reads out of step records, what it says, and a whole run."""

import csv
import json
import subprocess
import sys
from dataclasses import replace

import pytest

from dejavu.benchmarks.arrangements import (
    Times,
    closed_form_makespan,
    colocated_arrangements,
    disaggregated,
    parse_split,
    plan_split,
)
from dejavu.benchmarks.comparison import compare, complaint, count_wrong, shorter_prompts, simulated_gain
from dejavu.benchmarks.disaggregation import Served, Workload, make_options, output_lengths
from dejavu.benchmarks.passes import PassTimes, fit_admission, fit_passes
from dejavu.benchmarks.streaming_cost import Probe, streaming_cost
from dejavu.errors import UsageError
from dejavu.measure.records import StepRecord
from dejavu.measure.summary import Limits
from dejavu.measure.trace import Tracks
from dejavu.planning.lengths import Lengths
from dejavu.planning.simulator import simulate
from dejavu.request import Completion, Request
from tests.documentation import unexplained

GIVEN = {"workers": 4, "split": None, "dp": 2, "chunk": None, "synthetic": "200,20", "model": None, "dtype": "float32"}
GIVEN |= {"threads": 1, "transport": "ipc", "microbatch_size": 1, "num_requests": 24, "prompt_len": 64, "seed": 3}
GIVEN |= {"output_len": 10, "outputs": "lmsys", "rates": "5,10", "ttft": None, "tpot": None, "serve_options": ""}
GIVEN |= {"token_microbatch_size": 0, "beside": "chunked,data-parallel"}


def options(**changes):
    return make_options({**GIVEN, **changes}, synthetic=True)


@pytest.mark.parametrize("prompt_s", [0.2, 0.8])
@pytest.mark.parametrize("split", [(1, 3), (2, 2)])
@pytest.mark.parametrize("rows", [1, 2])
def test_closed_forms_are_what_the_simulator_gives_without_overhead(prompt_s, split, rows):
    given, times = options(microbatch_size=rows), Times(prompt_s, 0.02)
    requests = [Lengths(64, 12)] * 24
    known = 0
    for arrangement in [*colocated_arrangements(4, 2, 16), disaggregated(split)]:
        config = arrangement.config(given.fixed, times)
        passes = [times.part(depth) for depth in arrangement.depths]
        simulated_s = simulate(arrangement.simulated(config, passes, 0.0), requests).makespan_s
        closed_s = closed_form_makespan(arrangement, rows, requests, times)
        known += closed_s is not None
        assert closed_s is None or closed_s == pytest.approx(simulated_s, rel=0.02)
    assert known == (3 if rows == 1 else 2)


def test_no_closed_form_for_mixed_lengths_arrivals_or_half_a_cycle():
    baseline, times = colocated_arrangements(4, 2, 16)[0], Times(0.2, 0.02)
    assert closed_form_makespan(baseline, 1, [Lengths(64, 12), Lengths(64, 13)] * 4, times) is None
    assert closed_form_makespan(baseline, 1, [Lengths(64, 12, float(i)) for i in range(4)], times) is None
    assert closed_form_makespan(baseline, 1, [Lengths(64, 12)] * 5, times) is None


def test_times_come_back_out_of_the_records_of_passes():
    given, times = options(), PassTimes(0.05, 0.005, 0.001)
    lengths = [Lengths(64, output) for output in output_lengths(given)]
    baseline = colocated_arrangements(4, 2, 16)[0]
    setup = baseline.simulated(baseline.config(given.fixed, Times(0.2, 0.02)), [times], 0.002)
    result = simulate(setup, lengths, record=True)
    fitted = fit_passes(result.steps, 0, 4)
    assert fitted.prompt_s == pytest.approx(times.prompt_s)
    assert fitted.token_s == pytest.approx(times.token_s)
    assert fitted.hop_s == pytest.approx(times.hop_s, rel=0.1)
    assert fit_admission(result.steps, [0], result.admitted_s.tolist(), 9.0) == pytest.approx(0.002, rel=0.1)


def test_the_split_is_the_papers_and_leaves_each_side_a_rank():
    assert plan_split(4, 1, 64, 10, Times(0.2, 0.02)) == (2, 2)
    assert plan_split(4, 1, 64, 10, Times(0.001, 0.02)) == (1, 3)
    assert plan_split(4, 1, 64, 1, Times(9.0, 0.001)) == (3, 1)
    assert parse_split("1,3", 4) == (1, 3)
    for text in ("1,2", "4,0", "x", "1,2,1"):
        with pytest.raises(UsageError, match="--split"):
            parse_split(text, 4)


def test_options_that_cannot_be():
    for name, value in {"dp": 3, "rates": "5,-1", "synthetic": "200", "split": "9,9", "beside": "x"}.items():
        with pytest.raises(UsageError, match=f"--{name}"):
            options(**{name: value})


def test_a_model_computes_unless_times_are_given_too():
    assert options().times == Times(0.2, 0.02)
    assert options(synthetic="none").model == "demo"
    computed = make_options({**GIVEN, "model": "opt-125m"}, synthetic=False)
    assert (computed.times, computed.model) == (None, "opt-125m")
    assert "synthetic" not in disaggregated((2, 2)).config(computed.fixed, None).model_fields_set


def test_other_tokens_are_counted():
    done = tuple(Completion(Request(str(i), (1,)), token_ids=[i, 7]) for i in range(3))
    workload = Workload(0.0, (), done, 0.0)
    assert count_wrong(workload, workload) == 0
    other = tuple(replace(completion, token_ids=[0, 7]) for completion in done)
    assert count_wrong(replace(workload, completions=other), workload) == 2


def test_options_of_serve_are_handed_on():
    given = options(serve_options=("--load-format", "dummy", "--kv-memory=512M"), ttft=250.0)
    assert given.more == {"load_format": "dummy", "kv_memory": "512M"}
    assert given.limits == Limits(ttft_s=0.25)
    for arrangement in [*colocated_arrangements(4, 2, 16), disaggregated((1, 3))]:
        assert arrangement.config(given.fixed, given.times).kv_memory == 512 << 20
    for line, message in {"--pp 3": "--pp is what", "--kv-memroy 3": "kv_memory", "x": "is no list of options"}.items():
        with pytest.raises(UsageError, match=message):
            options(serve_options=tuple(line.split()))


def test_the_token_side_can_have_more_rows():
    given = options(microbatch_size=2)
    split = disaggregated((1, 3))
    config = split.config(given.fixed, given.times, token_rows=5)
    assert [shape.microbatch_size for shape in config.pipeline_shapes] == [2, 5]
    passes = [given.times.part(depth) for depth in split.depths]
    assert [pipeline.rows for pipeline in split.simulated(config, passes, 0.0).pipelines] == [2, 5]
    assert split.config(given.fixed, given.times).microbatch_size == 2


def test_streaming_is_timed_on_the_passes_of_prompts_alone():
    def step(stage, start_s, seconds):
        return StepRecord(1, stage, 0, 0, 0, "prompt", 1, 9, start_s, start_s + seconds, start_s + 5)

    probes = [Probe(True, 0.0, 1.0), Probe(False, 1.0, 2.0), Probe(False, 3.0, 4.0), Probe(True, 4.0, 5.0)]
    steps = [step(0, 0.1, 0.02), step(1, 0.3, 0.03), step(2, 0.5, 0.9)]  # the third stage is a token stage
    steps += [step(0, 1.1, 0.02), step(1, 1.3, 0.02), step(0, 2.5, 9.0)]  # the last one is between two probes
    steps += [step(0, 3.1, 0.02), step(1, 3.3, 0.02), step(0, 4.1, 0.02), step(1, 4.3, 0.022)]
    row = streaming_cost(steps, probes, 2)
    assert row["prompt_pass_ms"] == pytest.approx(40)
    assert row["streamed_prompt_pass_ms"] == pytest.approx(46)
    assert row["streaming_cost_percent"] == pytest.approx((25 + 5) / 2)
    assert set(streaming_cost(steps, [], 0).values()) == {None}


def serve_by_simulation(arrangement, given, times):
    lengths = tuple(Lengths(64, output) for output in output_lengths(given))
    config = arrangement.config(given.fixed, times)
    passes = [times.part(depth) for depth in arrangement.depths]
    result = simulate(arrangement.simulated(config, passes, 0.001), lengths, record=True)
    moments = ("admitted_s", "first_token_s", "kv_arrived_s", "token_start_s", "finish_s")
    done = [
        Completion(
            Request(str(i), (1,)), token_ids=[1, 2], **{name: float(getattr(result, name)[i]) for name in moments}
        )
        for i in range(len(lengths))
    ]
    workload = Workload(0.0, lengths, tuple(done), 0.0)
    steps = tuple(replace(step, stage=step.rank - 1) for step in result.steps)  # counted through all pipelines
    return Served(arrangement, config, Tracks({}), (workload,), steps)


def test_shorter_prompts_are_judged_by_measured_times_where_none_were_asked_for():
    given, times = options(num_requests=48), Times(0.4, 0.02)
    served = [
        serve_by_simulation(each, given, times) for each in (colocated_arrangements(4, 2, 16)[0], disaggregated((2, 2)))
    ]
    for part in (1.0, 0.25, 0.0625):
        assert simulated_gain(served, None, part) == pytest.approx(simulated_gain(served, times, part), rel=0.05)
    assert simulated_gain(served, None, 1.0) > 1.1
    assert simulated_gain(served, None, 0.0625) < 0.9
    assert "it loses where prompts are 1/" in shorter_prompts(served, None)


def test_few_ties_are_let_be_in_16_bit_formats():
    rows = [{"arrangement": "colocated", "wrong": 0, "requests": 9}, {"arrangement": "x", "wrong": 3, "requests": 10}]
    computed = make_options({**GIVEN, "model": "gpt2", "dtype": "float16"}, synthetic=False)
    assert complaint(rows, computed) is None
    assert complaint(rows, replace(computed, dtype="float32")) == "3 of 10 requests got other tokens than the baseline"
    assert complaint(rows, options(dtype="float16")) is not None
    assert complaint([rows[0], rows[1] | {"wrong": 6}], computed) is not None


def test_a_loss_is_said():
    rows = [
        {
            "arrangement": name,
            "throughput_requests_per_s": rate,
            "goodput_requests_per_s": rate / 2,
            "p50_normalized_latency_s": 1.0,
            "speedup": rate / 4,
        }
        for name, rate in (("colocated", 4.0), ("chunked", 5.0), ("disaggregated", 3.0))
    ]
    said = compare(rows, "all at once")
    assert "loses to the colocated pipeline (0.75 times" in said
    assert "loses to the best colocated layout, chunked (0.60 times" in said
    assert "within the limits" not in said
    assert "within the limits: colocated 2, chunked 2.5, disaggregated 1.5" in compare(rows, "all", Limits(1.0))


def test_all_arrangements_serve_the_same_tokens(tmp_path):
    out = tmp_path / "run"
    arguments = ["--workers", "2", "--synthetic", "24,6", "--num-requests", "4", "--output-len", "4", "--rates", "40"]
    command = [sys.executable, "-m", "dejavu.cli.main", "bench", "disaggregation", *arguments, "--out", str(out)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=100, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    result = json.loads(done.stdout.strip().splitlines()[-1])
    rows = result["rows"]
    arrangements = ("colocated", "chunked", "data-parallel", "disaggregated")
    assert [(row["arrangement"], row["rate"]) for row in rows] == [(a, r) for a in arrangements for r in (None, 40.0)]
    assert all(row["same_tokens"] and row["wrong"] == 0 and row["requests"] == 4 for row in rows)
    assert all(0 < row["idle_mean"] <= row["idle_max"] < 1 for row in rows)
    for name in ("p95_handover_ms", "p95_row_wait_ms"):
        assert all((row[name] is not None) == (row["arrangement"] == "disaggregated") for row in rows)
    assert all(row["goodput_requests_per_s"] == pytest.approx(row["throughput_requests_per_s"]) for row in rows)
    assert all(row["speedup"] == 1 for row in rows if row["arrangement"] == "colocated")
    assert all(abs(row["simulated_difference_percent"]) < 40 for row in rows)  # a tiny run on a busy machine
    assert len(result["verdicts"]) == 3
    assert unexplained("benchmarks.md", "bench disaggregation", rows[0]) == []
    with (out / "disaggregation.csv").open(newline="") as file:
        assert list(csv.DictReader(file).fieldnames or ()) == list(rows[0])
    assert (out / "disaggregation.png").read_bytes().startswith(b"\x89PNG")
    for name in ("colocated", "disaggregated"):
        events = json.loads((out / f"trace-{name}.json").read_text())["traceEvents"]
        assert {event["ph"] for event in events} >= {"X", "M"}
