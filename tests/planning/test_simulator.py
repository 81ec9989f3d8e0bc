"""Check both simulators against plain event loops, published results, and what must hold of any schedule."""

import json
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dejavu.errors import UsageError
from dejavu.planning.flow import Flow, StagedFlow
from dejavu.planning.lengths import Lengths
from dejavu.planning.paper_simulator import simulate_colocated, simulate_disaggregated
from dejavu.planning.setup import Failure, PipelineSetup, Replication, Setup, Swap
from dejavu.planning.simulator import colocated, simulate
from dejavu.planning.times import FixedTimes

from . import naive

DATA = Path(__file__).parent / "data"
ORACLES = json.loads((DATA / "expected.json").read_text())


def read(name):
    return [Lengths(*entry) for entry in json.loads((DATA / name).read_text())]


def requests_of(outputs, arrivals=None):
    return [
        Lengths(10, count, arrival) for count, arrival in zip(outputs, arrivals or [0.0] * len(outputs), strict=True)
    ]


# -- paper mode -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("case", ORACLES, ids=lambda case: f"{case['kind']}-{case['trace'][6]}-{case['rps']}")
def test_paper_oracles(case):
    times = {"prompt_s": case["prompt_time"] / 1e3, "token_s": case["token_time"] / 1e3, "rate": case["rps"]}
    trace = read(case["trace"])
    if case["kind"] == "colocated":
        result = simulate_colocated(trace, stages=case["num_machines"], **times)
    else:
        stages = {f"{side}_stages": case[f"num_{side}_machines"] for side in ("prompt", "token")}
        result = simulate_disaggregated(trace, **stages, cache_s=case["cache_time"] / 1e3, **times)
    latency = result.latency_per_token_s
    found = [result.makespan_s, result.throughput_requests_per_s, np.median(latency), latency.max(), latency.min()]
    wanted = [case["makespan_s"], case["throughput_requests_per_s"], *case["latency_per_token_s"].values()]
    assert found == pytest.approx(wanted, abs=1e-6, rel=0)


TIMES = st.sampled_from([0.0, 0.02, 0.0265, 0.3, 1.2]) | st.floats(0, 2)
RATES = st.sampled_from([0.0, 0.5, 3.0, 40.0])


@settings(max_examples=100, deadline=None, derandomize=True)
@given(
    st.lists(st.integers(0, 40) | st.sampled_from([200, 1500]), min_size=6, max_size=24),
    st.integers(1, 6),
    TIMES,
    TIMES,
    RATES,
)
def test_paper_colocated_is_the_queue(outputs, stages, prompt_s, token_s, rate):
    arrivals, ends, _ = naive.paper_colocated(outputs, stages, prompt_s, token_s, rate)
    result = simulate_colocated(requests_of(outputs), stages=stages, prompt_s=prompt_s, token_s=token_s, rate=rate)
    np.testing.assert_allclose(result.end_s, ends, rtol=0, atol=1e-7)
    np.testing.assert_allclose(result.arrival_s, arrivals, rtol=0, atol=1e-9)


@settings(max_examples=100, deadline=None, derandomize=True)
@given(
    st.lists(st.integers(0, 40) | st.sampled_from([200, 1500]), min_size=5, max_size=24),
    st.integers(1, 4),
    st.integers(1, 5),
    TIMES,
    TIMES,
    TIMES,
    RATES,
)
def test_paper_disaggregated_is_the_queue(outputs, prompt_stages, token_stages, prompt_s, token_s, cache_s, rate):
    arguments = prompt_stages, token_stages, prompt_s, token_s, cache_s, rate
    _, ends, tokens = naive.paper_disaggregated(outputs, *arguments)
    names = ("prompt_stages", "token_stages", "prompt_s", "token_s", "cache_s", "rate")
    result = simulate_disaggregated(requests_of(outputs), **dict(zip(names, arguments, strict=True)))
    np.testing.assert_allclose(result.end_s, ends, rtol=0, atol=1e-7)
    assert result.tokens.tolist() == tokens


def test_paper_takes_512_requests():
    result = simulate_colocated(requests_of([3] * 600), stages=2, prompt_s=0.1, token_s=0.1)
    assert len(result.end_s) == 512


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"stages": 4}, "3 requests cannot fill 4 stages"),
        ({"stages": 0}, "0 stages"),
        ({"stages": 1, "prompt_s": -1.0}, "prompt_s -1"),
        ({"stages": 1, "rate": float("inf")}, "rate inf"),
    ],
)
def test_paper_refuses(arguments, message):
    with pytest.raises(UsageError, match=message):
        simulate_colocated(requests_of([5, 5, 5]), **({"prompt_s": 0.1, "token_s": 0.1} | arguments))


# -- flow of passes through stages -------------------------------------------------------------------------------------


@settings(max_examples=100, deadline=None, derandomize=True)
@given(
    st.integers(1, 7),
    st.sampled_from([0.0, 0.0, 0.25]),
    st.lists(st.tuples(st.floats(0, 40), st.sampled_from([0.5, 1.0, 4.0]) | st.floats(0, 5)), max_size=25),
)
def test_flow_is_the_recurrence(num_stages, hop_s, passes):
    flow, staged, clocks = Flow(num_stages, hop_s), StagedFlow(num_stages, hop_s), [0.0] * num_stages
    for ready_s, duration_s in passes:
        now = ready_s - hop_s
        for stage in range(num_stages):
            now = clocks[stage] = max(now + hop_s, clocks[stage]) + duration_s
        assert flow.push(ready_s, duration_s) == pytest.approx(now, abs=1e-8)
        assert staged.push(ready_s, duration_s) == pytest.approx(now, abs=1e-8)
        assert [flow.free_s(stage) for stage in range(num_stages)] == pytest.approx(clocks, abs=1e-8)


# -- default mode: against the plain engine ----------------------------------------------------------------------------

LAYOUTS = st.sampled_from(
    [
        [("both", 1, 1)],
        [("both", 3, 1)],
        [("both", 4, 3)],
        [("both", 2, 2), ("both", 2, 2)],
        [("prompt", 1, 1), ("token", 3, 1)],
        [("prompt", 2, 2), ("token", 3, 4)],
    ]
)


@st.composite
def workloads(draw):
    outputs = draw(st.lists(st.integers(1, 12) | st.integers(60, 150), min_size=1, max_size=14))
    generator = np.random.default_rng(draw(st.integers(0, 1000)))
    gap_s = draw(st.sampled_from([0.0, 0.0, 0.3, 2.0]))
    arrivals = np.cumsum(generator.exponential(gap_s, len(outputs))).tolist() if gap_s else [0.0] * len(outputs)
    return requests_of(outputs, arrivals)


def make_setup(layout, prompt_s, token_s, hop_s=0.0, **delays):
    times = FixedTimes(prompt_s, token_s)
    pipelines = (PipelineSetup(stages, times, role, rows=rows, hop_s=hop_s) for role, stages, rows in layout)
    return Setup(tuple(pipelines), **delays)


@settings(max_examples=100, deadline=None, derandomize=True)
@given(
    workloads(),
    LAYOUTS,
    st.sampled_from([(0.31415927, 0.02236068), (0.05, 0.0479583), (0.0132288, 0.1095445)]),
    st.sampled_from([0.0, 0.0005099, 0.0387298]),
    st.sampled_from([0.0, 0.0003873]),
    st.sampled_from([None, 0, 2]),
)
def test_default_is_the_plain_engine(requests, layout, times, admission_s, hop_s, prompt_ahead):
    delays = {"cache_s": 0.0173205, "admission_s": admission_s, "prompt_ahead": prompt_ahead}
    plain = naive.Engine(requests, layout, *times, **delays, hop_s=hop_s)
    first, finish = plain.run()
    setup = make_setup(layout, *times, hop_s=hop_s, **delays)
    for way in ({"record": True}, {"machine_code": False}, {"machine_code": True}):
        result = simulate(setup, requests, **way)
        np.testing.assert_allclose(result.first_token_s, first, rtol=0, atol=1e-6)
        np.testing.assert_allclose(result.finish_s, finish, rtol=0, atol=1e-6)
        begun = [float("nan") if time is None else time for time in plain.second_begun]
        np.testing.assert_allclose(result.token_start_s, begun, rtol=0, atol=1e-6)


class GrowingTimes:
    """Let a step take longer with more rows, and with every 16 tokens of context."""

    steps_alike = False
    context_step = 16

    def prompt_s(self, num_tokens, num_rows, share):
        return 0.01 + 0.0031623 * num_tokens

    def token_s(self, num_rows, context):
        return 0.0141421 + 0.0001732 * num_rows * (1 + int(context) // 16)


@settings(max_examples=80, deadline=None, derandomize=True)
@given(
    workloads(),
    LAYOUTS,
    st.integers(0, 3),
    st.sampled_from([0, 7]),
    st.sampled_from([FixedTimes(0.2236068, 0.0316228), GrowingTimes()]),
    st.sampled_from([None, Swap(1.0, 1e5), Swap(1.0, 1e3)]),
)
def test_skipping_changes_nothing(requests, layout, extra, chunk, times, swap):
    """More microbatches than stages, chunks, hops, growing times: the plain engine does not know, recording does."""
    pipelines = tuple(
        PipelineSetup(
            s,
            times,
            role,
            s + extra,
            rows,
            prompt_chunk=chunk,
            hop_s=0.001 * extra,
            swap=None if role == "prompt" else swap,
        )
        for role, s, rows in layout
    )
    setup = Setup(pipelines, cache_s=0.0173205)  # no two things happen at once by chance
    quick, slow = simulate(setup, requests, machine_code=False), simulate(setup, requests, record=True)
    np.testing.assert_allclose(quick.finish_s, slow.finish_s, rtol=0, atol=1e-6)
    assert quick.num_passes == slow.num_passes
    np.testing.assert_allclose(np.concatenate(quick.stage_busy_s), np.concatenate(slow.stage_busy_s), atol=1e-6)


@settings(max_examples=60, deadline=None, derandomize=True)
@given(workloads(), LAYOUTS)
def test_what_holds_of_any_schedule(requests, layout):
    result = simulate(make_setup(layout, 0.2, 0.03), requests, record=True)
    for rank in {step.rank for step in result.steps}:
        steps = sorted((s for s in result.steps if s.rank == rank), key=lambda s: s.start_s)
        assert all(later.start_s >= earlier.end_s - 1e-9 for earlier, later in pairwise(steps))
        assert all(s.end_s - s.start_s == pytest.approx({"prompt": 0.2, "token": 0.03}[s.kind]) for s in steps)
    busy = sorted(busy for stages in result.stage_busy_s for busy in stages)
    spent = dict.fromkeys(range(1, 1 + sum(stages for _, stages, _ in layout)), 0.0)
    for step in result.steps:
        spent[step.rank] += step.end_s - step.start_s
    assert busy == pytest.approx(sorted(spent.values()))
    rows_in_last = [s.num_tokens for s in result.steps if s.kind == "token" and s.stage == 0]
    assert sum(rows_in_last) == sum(request.output_tokens - 1 for request in requests)
    order = sorted(range(len(requests)), key=lambda i: requests[i].arrival_s)
    assert all(result.admitted_s[a] <= result.admitted_s[b] + 1e-9 for a, b in pairwise(order))
    depth = min(stages for _, stages, _ in layout)
    for request, end in zip(requests, result.finish_s, strict=True):
        assert end >= request.arrival_s + depth * (0.2 + (request.output_tokens - 1) * 0.03) - 1e-9
    assert result.makespan_s >= max(busy) - 1e-9


def test_steps_by_hand():
    """Two stages, two requests: the second prompt follows the first, then token steps take turns."""
    result = simulate(colocated(PipelineSetup(2, FixedTimes(1.0, 0.25))), requests_of([2, 2]))
    assert result.first_token_s.tolist() == pytest.approx([2.0, 3.0])
    assert result.finish_s.tolist() == pytest.approx([3.25, 3.5])  # the first's step waits in stage 1 for a prompt
    assert result.idle_fractions[0] == pytest.approx((1 - 2.5 / 3.5, 1 - 2.5 / 3.5))


def test_fewer_requests_than_stages_work():
    assert simulate(colocated(PipelineSetup(4, FixedTimes(1.0, 0.5))), requests_of([3])).makespan_s == pytest.approx(
        8.0
    )


def test_long_prompts_go_alone():
    pipeline = PipelineSetup(1, FixedTimes(1.0, 0.1), rows=3, max_prompt_tokens=20)
    result = simulate(colocated(pipeline), requests_of([1, 1, 1]))
    assert sorted(result.finish_s) == pytest.approx([1.0, 1.0, 2.0])


def test_prompt_ahead_holds_prompts_back():
    times = FixedTimes(1.0, 1.0)
    pipelines = (PipelineSetup(1, times, "prompt"), PipelineSetup(1, times, "token"))
    free = simulate(Setup(pipelines), requests_of([11, 11, 11]))
    held = simulate(Setup(pipelines, prompt_ahead=0), requests_of([11, 11, 11]))
    assert free.first_token_s.tolist() == pytest.approx([1.0, 2.0, 3.0])
    assert held.first_token_s.tolist() == pytest.approx([1.0, 12.0, 23.0])


# -- swapping and failures ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("bandwidth", [1e3, 150.0, 40.0])
def test_swapped_steps_take_the_longer_of_compute_and_fetch(bandwidth):
    """Four microbatches of one row: a turn takes four times the longer of a step and the fetch of i tokens."""
    stages, outputs, token_s = 4, 200, 1.0
    swap = Swap(bytes_per_token=1.0, bandwidth=bandwidth)
    result = simulate(
        colocated(PipelineSetup(stages, FixedTimes(1.0, token_s), swap=swap)), requests_of([outputs] * stages)
    )
    expected = sum(stages * max(token_s, (10 + i) / bandwidth) for i in range(outputs - 1))
    assert result.finish_s.max() - result.first_token_s.max() == pytest.approx(expected, rel=0.02)
    assert (result.stall_s > 0) == (bandwidth < 200)


@pytest.mark.parametrize(("resident", "requests"), [(2, 2), (4, 4), (5, 9), (3, 3)])
def test_resident_microbatches_need_no_fetch(resident, requests):
    """Nothing is fetched where all microbatches that have a request are on the device."""
    pipeline = PipelineSetup(4, FixedTimes(1.0, 1.0), swap=Swap(1.0, 1.0, resident))
    assert simulate(colocated(pipeline), requests_of([9] * requests)).stall_s == 0


def test_fetches_by_hand():
    """One stage, three rows in turn: 10 tokens fetch in 0.5 s, when the row before the last has left and is flushed."""
    pipeline = PipelineSetup(1, FixedTimes(1.0, 0.1), microbatches=3, swap=Swap(1.0, 20.0))
    result = simulate(colocated(pipeline), requests_of([2, 2, 2]))
    # prompts end at 1, 2, 3, flushed 0.5 later; row 0's fetch begins when row 1 is, at 2.5, row 1's at 3.5, and
    # row 2 is here still
    assert result.finish_s.tolist() == pytest.approx([3.1, 4.1, 4.2])
    assert result.stall_s == pytest.approx(0.9)


def test_more_resident_microbatches_are_fetched_earlier():
    stalls = [
        simulate(
            colocated(PipelineSetup(5, FixedTimes(1.0, 0.2), swap=Swap(1.0, 90.0, resident))), requests_of([40] * 5)
        ).stall_s
        for resident in (1, 2, 4)
    ]
    assert stalls[0] > stalls[1] >= stalls[2]


@pytest.mark.parametrize(("bandwidth", "turn_s"), [(1e3, 0.1), (40.0, 0.1), (5.0, 0.2)])
def test_replication_costs_only_what_the_link_cannot_hide(bandwidth, turn_s):
    """One token of KV a step: 1 ms and 25 ms hide behind a step of 100 ms; of 200 ms, each step waits for the link."""
    pipeline = PipelineSetup(1, FixedTimes(1.0, 0.1), replication=Replication(1.0, bandwidth))
    result = simulate(colocated(pipeline), [Lengths(1, 101)])
    assert result.finish_s[0] == pytest.approx(1.0 + 100 * turn_s, abs=0.31)
    assert (result.stall_s > 0) == (turn_s > 0.1)


@pytest.mark.parametrize(("kv_lost", "end_s"), [(False, 3.45), (True, 4.35)])
def test_failure_by_hand(kv_lost, end_s):
    """Three of ten tokens are out at 1.25; work goes on at 2.75, with the KV or with a prompt that yields a token."""
    failure = Failure(1.25, detection_s=0.5, restore_s=1.0, kv_lost=kv_lost)
    result = simulate(colocated(PipelineSetup(1, FixedTimes(1.0, 0.1)), failures=(failure,)), requests_of([10]))
    assert result.finish_s[0] == pytest.approx(end_s)
    assert result.first_token_s[0] == pytest.approx(1.0)
    assert result.stage_busy_s[0][0] == pytest.approx(1.25 + (0.7 if not kv_lost else 1.6))


def test_failure_of_a_token_pipeline_sends_requests_back():
    times = FixedTimes(1.0, 0.1)
    pipelines = (PipelineSetup(1, times, "prompt"), PipelineSetup(1, times, "token"))
    lost = Setup(pipelines, failures=(Failure(1.25, pipeline=1, restore_s=0.5, kv_lost=True),))
    result = simulate(lost, requests_of([10]), record=True)
    assert result.finish_s[0] == pytest.approx(1.75 + 1.0 + 0.6)  # prompt again: token 4, then six steps
    assert [step.kind for step in result.steps if step.rank == 1] == ["prompt", "prompt"]


@settings(max_examples=60, deadline=None, derandomize=True)
@given(workloads(), LAYOUTS, st.lists(st.floats(0, 5), min_size=1, max_size=3), st.booleans())
def test_failures_delay_and_lose_nothing(requests, layout, kills, kv_lost):
    setup = make_setup(layout, 0.2, 0.03)
    failures = tuple(Failure(t, i % len(layout), 0.05, 0.1, kv_lost) for i, t in enumerate(kills))
    broken = simulate(Setup(setup.pipelines, failures=failures), requests, record=True)
    assert not np.isnan(broken.finish_s).any()
    assert (broken.first_token_s <= broken.finish_s).all()
    ranks = {1 + i: 0 for i in range(setup.num_stages)}
    for step in sorted(broken.steps, key=lambda s: s.start_s):
        assert step.start_s >= ranks[step.rank] - 1e-9
        ranks[step.rank] = step.end_s
    if not kv_lost and len(layout) == 1:
        whole = simulate(setup, requests)
        down_s = sum(0.15 + layout[0][1] * 0.2 for _ in kills)
        phase_s = 0.2 * layout[0][1]  # a pause shifts who is ready first when a request arrives, for better or worse
        assert whole.makespan_s - phase_s <= broken.makespan_s <= whole.makespan_s + down_s + phase_s


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: simulate(colocated(PipelineSetup(1, FixedTimes(1, 1))), []), "no requests"),
        (lambda: simulate(colocated(PipelineSetup(1, FixedTimes(1, 1))), [Lengths(1, -1)]), "request 0"),
        (lambda: FixedTimes(-1.0, 1.0), "prompt_ms -1000"),
        (lambda: PipelineSetup(0, FixedTimes(1, 1)), "stages 0"),
        (lambda: Swap(1.0, 0.0), "host link"),
        (lambda: Swap(1.0, 1.0, 0), "0 resident microbatches"),
        (lambda: Setup((PipelineSetup(1, FixedTimes(1, 1), "token"),)), "pipelines have to be"),
        (lambda: colocated(PipelineSetup(1, FixedTimes(1, 1)), failures=(Failure(1.0, 3),)), "no pipeline 3"),
    ],
)
def test_default_refuses(make, message):
    with pytest.raises(UsageError, match=message) as caught:
        make()
    assert "\n" not in str(caught.value)
