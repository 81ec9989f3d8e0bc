"""Check the search against brute force, its memory sums by hand, and profiles against what was saved."""

from dataclasses import replace
from pathlib import Path

import pytest

from dejavu.config import make_config
from dejavu.errors import CapacityError, ConfigError, TopologyError
from dejavu.model.table import MODELS
from dejavu.planning.lengths import Lengths
from dejavu.planning.planner import (
    GivenTimes,
    Goal,
    Layout,
    Machine,
    ProfiledTimes,
    Task,
    make_setup,
    misfit,
    needed_bytes,
    plan,
    serve_profile,
)
from dejavu.planning.profile import Profile, PromptTime, TokenTime, interpolate, load_profile
from dejavu.planning.shape import ModelShape, shape_of
from dejavu.planning.simulator import simulate
from dejavu.planning.sweep import sweep

SHAPE = ModelShape(num_layers=12, layer_params=1_000_000, attention_size=100, outer_params=500_000)
REQUESTS = tuple(Lengths(40, 20 + 7 * (i % 5)) for i in range(24))
TIMES = GivenTimes(prompt_ms=60, token_ms=10, prompt_len=40, batch=1)
TASK = Task(SHAPE, Machine(4, 1e9), TIMES, REQUESTS, batches=(1, 2, 4))

PROFILE = Profile(
    model="opt-66b",
    device="a device",
    date="2026-11-22",
    num_layers=64,
    prompt=tuple(PromptTime(n, b, tp, n * b * 0.5 / tp) for n in (128, 512) for b in (1, 4) for tp in (1, 2)),
    token=tuple(TokenTime(n, b, tp, (60 + n * b * 0.01) / tp) for n in (0, 512) for b in (1, 4) for tp in (1, 2)),
    memory_bytes=10**11,
    bandwidths_gbps={"host": 55.0},
)


def test_best_is_that_of_brute_force():
    scores = {}
    for batch in (1, 2, 4):
        for layout in [
            *(Layout(4 // r, replicas=r, batch=batch) for r in (1, 2, 4)),
            *(Layout(4 - p, prompt_stages=p, batch=batch) for p in (1, 2, 3)),
        ]:
            scores[layout] = simulate(make_setup(TASK, layout), REQUESTS).requests_per_s
    found = plan(TASK)
    assert {each.layout for each in found.ranked} == set(scores)
    assert found.best.score == pytest.approx(max(scores.values()))
    assert [each.score for each in found.ranked] == pytest.approx(sorted(scores.values(), reverse=True), rel=1e-9)
    assert not found.best.reason
    assert all(each.reason for each in found.ranked[1:])


def test_memory_by_hand():
    # 12 layers on 4 stages: 3·1e6 + 0.5e6 numbers of 2 bytes; KV 2·3·100·2 bytes a token, rows of 40+48 tokens
    assert needed_bytes(TASK, Layout(4, batch=2)) == 7_000_000 + 1200 * 88 * 2 * 4
    assert needed_bytes(TASK, Layout(4, batch=2, swap=True)) == 7_000_000 + 1200 * 88 * 2 * 2
    # the prompt side has all 12 layers: 12.5e6 numbers, 4800 bytes a token, one microbatch
    assert needed_bytes(TASK, Layout(3, prompt_stages=1, batch=2)) == 25_000_000 + 4800 * 88 * 2
    # a token stage has 3 of 12 layers, and the KV of 8 microbatches more than its 4, from the prompt side
    assert needed_bytes(TASK, Layout(4, prompt_stages=8, batch=2)) == 7_000_000 + 1200 * 88 * 2 * 12


def test_swapping_is_tried_where_memory_is_short():
    need = needed_bytes(TASK, Layout(4, batch=4, swap=True))
    short = replace(TASK, machine=Machine(4, need, host_bandwidth=1e12))
    assert misfit(short, Layout(4, batch=4))
    found = plan(short)
    swapped = next(each for each in found.ranked if each.layout == Layout(4, batch=4, swap=True))
    assert swapped.result is not None
    assert any(text.startswith("swapping pays") for text in found.verdicts)
    slow = plan(replace(short, machine=Machine(4, need, host_bandwidth=1e5)))
    assert any(text.startswith("swapping does not pay") for text in slow.verdicts)


def test_long_prompts_favour_disaggregation_and_short_ones_do_not():
    """The bubbles come from prompts that take much longer than a step."""
    machine = Machine(4, 1e8)
    few = Task(SHAPE, machine, GivenTimes(60, 10, 40, 1), (Lengths(40, 200),) * 24, batches=(1,))
    only_split = replace(few, machine=Machine(4, needed_bytes(few, Layout(2, prompt_stages=2))))
    verdicts = plan(only_split).verdicts
    assert any("disaggregation does not pay" in text for text in verdicts)
    many = replace(only_split, times=GivenTimes(4000, 10, 40, 1), requests=(Lengths(40, 400),) * 24)
    many = replace(many, machine=Machine(4, needed_bytes(many, Layout(2, prompt_stages=2))))
    assert any("disaggregation pays" in text for text in plan(many).verdicts)


def test_goodput_counts_only_what_meets_the_limits():
    found = plan(TASK, Goal(ttft_s=0.2, tpot_s=0.02))
    assert found.goal.name == "goodput"
    for each in found.ranked:
        result = each.result
        good = sum(t <= 0.2 and p <= 0.02 for t, p in zip(result.ttft_s, result.tpot_s, strict=True))
        assert each.score == pytest.approx(good / result.makespan_s)
    assert any("TTFT" in each.reason for each in found.ranked)


def test_says_why_nothing_fits():
    with pytest.raises(CapacityError, match=r"no layout fits: even the leanest needs .* GB and a device has") as caught:
        plan(replace(TASK, machine=Machine(4, 1e6)))
    assert "\n" not in str(caught.value)


def test_shape_of_a_known_model():
    """OPT-66B: 64 layers of 12·h² + 13·h numbers, h = 9216, as its paper's table gives."""
    shape = shape_of(MODELS["opt-66b"])
    hidden = 9216
    assert (shape.num_layers, shape.attention_size) == (64, hidden)
    assert shape.layer_params == 12 * hidden**2 + 13 * hidden


def test_plans_are_profiles_that_serve_takes():
    for layout in (Layout(4, tp=2, batch=8), Layout(2, replicas=3), Layout(3, tp=2, prompt_stages=2, batch=5)):
        config = make_config(serve_profile(layout, "opt-13b"))
        assert config.num_workers == layout.num_devices
        assert config.model == "opt-13b"
        shapes = config.pipeline_shapes
        assert {shape.microbatch_size for shape in shapes} == {layout.batch}
        prompt_devices = sum(shape.pp * shape.tp for shape in shapes if shape.role == "prompt")
        assert prompt_devices == layout.prompt_devices
        assert len(shapes) == layout.replicas + (layout.prompt_stages > 0)
        assert config.num_handover_rows == layout.handover_rows  # what both take where nobody says


def test_plans_that_swap_are_profiles_that_serve_takes():
    need = needed_bytes(TASK, Layout(4, batch=4, swap=True))
    found = plan(replace(TASK, machine=Machine(4, need, 1e12)))
    assert found.best.layout.swap
    config = make_config(serve_profile(found.best.layout))
    assert config.swap
    assert config.resident_of(config.pipeline_shapes[-1]) == 2


def test_plans_that_swap_say_so():
    for layout in (Layout(4, batch=2, swap=True), Layout(3, prompt_stages=1, batch=2, swap=True)):
        config = make_config(serve_profile(layout))
        assert config.swap
        token_side = config.pipeline_shapes[-1]
        assert config.resident_of(token_side) == 2
    assert not make_config(serve_profile(Layout(4))).swap
    unknown = plan(replace(TASK, batches=(1,)))
    assert "swapping was not tried: the bandwidth of the host link is not known" in unknown.verdicts
    tiny = plan(replace(TASK, machine=Machine(4, 15e6, host_bandwidth=1e12), batches=(1, 64)))
    assert any(text == "swapping does not pay: no such layout fits" for text in tiny.verdicts), tiny.verdicts


# -- profiles ----------------------------------------------------------------------------------------------------------


def test_profile_comes_back(tmp_path):
    path = tmp_path / "profile.yaml"
    PROFILE.save(path)
    assert load_profile(path) == PROFILE


def test_profile_interpolates():
    assert PROFILE.prompt_ms(512, 4) == pytest.approx(1024)
    assert PROFILE.prompt_ms(320, 2.5) == pytest.approx(400)  # bilinear in length and batch
    assert PROFILE.prompt_ms(1024, 1) == pytest.approx(512)  # drawn out
    assert PROFILE.token_ms(256, 4, tp=2) == pytest.approx((60 + 256 * 4 * 0.01) / 2)
    with pytest.raises(ConfigError, match="tensor degree 8"):
        PROFILE.token_ms(256, 4, tp=8)


def test_interpolation_never_falls_below_what_was_measured_by_more_than_its_share():
    assert interpolate([(10.0, 5.0)], 99) == 5.0
    assert interpolate([(100.0, 5.0), (200.0, 15.0)], 10) > 0


def test_stage_times_of_a_profile():
    """A stage of 4 holds a quarter of the layers; a slow-down is the prompt's alone."""
    times = ProfiledTimes(PROFILE, 64).stage(4, 1, 1.5)
    assert times.prompt_s(1024, 4) == pytest.approx(1.5 * 256 * 4 * 0.5 / 4 / 1e3)
    assert times.token_s(4, 200) == pytest.approx((60 + 192 * 4 * 0.01) / 4 / 1e3)  # 192: the middle of 128 … 255
    assert times.token_s(4, 130) == times.token_s(4, 255)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("date: 1\nspeed: 3\n", "unknown key 'speed'"),
        ("model: x\n", "has no 'device'"),
        ("[1, 2]", "holds no mapping"),
        ("a: [", "is not YAML"),
    ],
)
def test_malformed_profiles(tmp_path, change, message):
    path = tmp_path / "profile.yaml"
    path.write_text(change)
    with pytest.raises(ConfigError, match=message) as caught:
        load_profile(path)
    assert "\n" not in str(caught.value)
    assert str(path) in str(caught.value)


def test_negative_time_in_a_profile(tmp_path):
    path = tmp_path / "profile.yaml"
    PROFILE.save(path)
    path.write_text(path.read_text().replace("ms: 64.0", "ms: -64.0", 1))
    with pytest.raises(ConfigError, match=r"ms in prompt of .*\[0\] is -64.0"):
        load_profile(path)


def test_missing_profile():
    with pytest.raises(ConfigError, match="cannot read profile"):
        load_profile(Path("/nowhere/profile.yaml"))


# -- sweep -------------------------------------------------------------------------------------------------------------


def test_sweep_covers_what_fits():
    task = replace(TASK, machine=Machine(1, 20e6), batches=(1, 2))
    rows = sweep(task, range(1, 5), cost_per_hour=3600.0)
    assert not [row for row in rows if row.machines == 1]  # 25 MB of weights
    assert {row.layout for row in rows if row.machines == 4} == {"colocated", "data-parallel", "disaggregated"}
    for row in rows:
        assert row.cost == pytest.approx(row.makespan_s * row.machines)
        base = next(r for r in rows if (r.machines, r.batch, r.layout) == (row.machines, row.batch, "colocated"))
        assert row.speedup == pytest.approx(base.makespan_s / row.makespan_s)
        used = row.replicas * (row.token_stages + row.prompt_stages)
        assert used == row.machines


def test_sweep_is_the_same_in_processes():
    task = replace(TASK, batches=(2,))
    assert sweep(task, (2, 3), processes=2) == sweep(task, (2, 3))


def test_unsupported_tensor_degree_is_not_tried():
    task = Task(replace(SHAPE, kv_heads=3), Machine(4, 1e12), ProfiledTimes(PROFILE, 12), REQUESTS, batches=(1,))
    assert {each.layout.tp for each in plan(task).ranked} == {1}
    with pytest.raises(TopologyError):
        MODELS["opt-66b"].check_tensor_parallel(5)
