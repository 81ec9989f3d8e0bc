"""Hold simulations as machine code against the same ones with objects, pass by pass."""

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from dejavu.planning import machine_code
from dejavu.planning.lengths import Lengths
from dejavu.planning.planner import ScaledTimes
from dejavu.planning.profile import Profile, ProfileTimes, PromptTime, TokenTime
from dejavu.planning.setup import Failure, PipelineSetup, Setup, Swap
from dejavu.planning.simulator import colocated, simulate
from dejavu.planning.sweep import AverageSteps
from dejavu.planning.times import FixedTimes

PROFILE = Profile(
    "m",
    "d",
    "2026-11-22",
    4,
    tuple(PromptTime(n, b, 1, 3.16 + 0.0271 * n * b**0.9) for n in (64, 512, 2048) for b in (1, 4)),
    tuple(TokenTime(n, b, 1, 21.3 + 0.0173 * n * b) for n in (64, 512, 2048) for b in (1, 2, 8)),
)
PROFILED = ProfileTimes(PROFILE, 4, 2, 1)
TIMES = [
    FixedTimes(0.31415927, 0.02236068),
    FixedTimes(0.0132288, 0.1095445, 0.00271),
    ScaledTimes(0.00173, 0.0316228, 3),
    PROFILED,
    AverageSteps(PROFILED, 0.0271828),
]
KINDS = [["both"], ["both", "both"], ["prompt", "token"], ["prompt", "token", "token"], ["prompt", "prompt", "token"]]


@st.composite
def cases(draw):
    generator = np.random.default_rng(draw(st.integers(0, 1 << 30)))
    count = draw(st.integers(1, 40))
    gap_s = draw(st.sampled_from([0.0, 0.05, 0.7]))
    arrivals = generator.permutation(np.cumsum(generator.exponential(gap_s, count)) if gap_s else np.zeros(count))
    lengths = zip(generator.integers(1, 900, count), generator.geometric(0.02, count), arrivals, strict=True)
    chunk = draw(st.sampled_from([0, 0, 37]))
    pipelines = []
    for role in draw(st.sampled_from(KINDS)):
        stages = draw(st.integers(1, 5))
        more = {"microbatches": stages + draw(st.integers(0, 3)), "rows": draw(st.integers(1, 4))}
        more |= {"prompt_chunk": chunk, "max_prompt_tokens": draw(st.sampled_from([8192, 500]))}
        hop_s = draw(st.sampled_from([0.0, 0.0003873]))
        pipelines.append(PipelineSetup(stages, draw(st.sampled_from(TIMES)), role, hop_s=hop_s, **more))
    delays = {"cache_s": 0.0173205, "admission_s": draw(st.sampled_from([0.0, 0.0005099]))}
    setup = Setup(tuple(pipelines), prompt_ahead=draw(st.sampled_from([None, 0, 2])), **delays)
    return setup, [Lengths(int(p), int(o), float(a)) for p, o, a in lengths]


@settings(max_examples=300, deadline=None, derandomize=True)
@given(cases())
def test_same_as_objects(case):
    setup, requests = case
    code = simulate(setup, requests, machine_code=True)
    objects = simulate(setup, requests, record=True)
    for name in ("admitted_s", "first_token_s", "kv_arrived_s", "token_start_s", "finish_s"):
        np.testing.assert_allclose(getattr(code, name), getattr(objects, name), rtol=1e-9, atol=1e-9, err_msg=name)
    assert code.num_passes == objects.num_passes
    busy = [np.concatenate(result.stage_busy_s) for result in (code, objects)]
    np.testing.assert_allclose(*busy, rtol=1e-9)


def test_objects_do_what_machine_code_cannot():
    requests = [Lengths(10, 9)] * 4
    pipeline = PipelineSetup(4, FixedTimes(1.0, 0.1), swap=Swap(1.0, 20.0))
    assert simulate(colocated(pipeline), requests, machine_code=True).stall_s > 0
    failing = colocated(PipelineSetup(1, FixedTimes(1.0, 0.1)), failures=(Failure(0.5, restore_s=1.0),))
    assert simulate(failing, requests, machine_code=True).finish_s.max() > 5


def test_few_requests_load_no_compiler(monkeypatch):
    monkeypatch.setattr(machine_code.Tally, "num_requests", 0)
    assert not machine_code.is_worth_it(512)
    assert machine_code.is_worth_it(512)
    monkeypatch.setattr(machine_code, "find_spec", lambda name: None)  # as where numba is not installed
    assert not machine_code.is_worth_it(512)
