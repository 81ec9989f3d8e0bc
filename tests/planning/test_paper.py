"""Check the paper's closed form against its two worked cases, and its conditions against plain sums."""

from dataclasses import replace

import pytest

from dejavu.errors import CapacityError, UsageError
from dejavu.planning.paper import PaperInputs, colocated_ms, disaggregation_pays, plan_paper
from dejavu.planning.swapping import swapping_pays

CASE = PaperInputs(
    devices=4,
    memory_gb=80,
    devices_per_machine=2,
    prompt_len=1000,
    output_len=220,
    dtype_bytes=2,
    batch=8,
    prompt_ms=6000,
    token_ms=80,
    layers=64,
    attention_size=9216,
    layer_params=1019215872,
)
SECOND = replace(CASE, devices=8, prompt_ms=20000, stream_slowdown=1.2)


@pytest.mark.parametrize(("inputs", "split"), [(CASE, (1, 3)), (SECOND, (4, 4))])
def test_worked_cases(inputs, split):
    plan = plan_paper(inputs)
    assert (plan.prompt_devices, plan.token_devices) == split
    assert plan.pays


def test_memory_of_a_machine_is_that_of_its_devices():
    assert plan_paper(replace(CASE, memory_gb=160, devices_per_machine=1)) == plan_paper(CASE)
    # 80e9 // (1019215872·2 + 2·1000·8·9216·2) = 34 layers in a machine: the 64 need two, and one is left for prompts
    with pytest.raises(CapacityError, match=r"no valid split.*at least 2 for prompts"):
        plan_paper(replace(CASE, devices_per_machine=1))


def test_least_devices_by_hand():
    # tokens: 64·2·1220·8·9216·2 = 23.03e9 of KV leave 136.97e9 for layers of 2.038e9: 67 layers, one machine
    plan = plan_paper(CASE)
    assert (plan.min_prompt_devices, plan.min_token_devices) == (1, 1)
    # 0.5 of that memory: 80e9 - 23.03e9 hold 27 layers, so three machines
    assert plan_paper(replace(SECOND, devices_per_machine=1)).min_token_devices == 3


def test_times_per_microbatch():
    plan = plan_paper(CASE)
    assert plan.colocated_ms == pytest.approx(6000 + 220 * 80 + 3 * (6000 - 80) / 4)
    assert plan.disaggregated_ms == pytest.approx(max(4 * 6000 / 1, 220 * 4 * 80 / 3))


def test_balance_without_rounding_is_exact():
    """D·N·t/(mY+Nt) is 3 exactly here, whatever binary fractions make of 0.1 and 1.1."""
    inputs = replace(CASE, devices=4, output_len=330, prompt_ms=10.0, token_ms=0.1, stream_slowdown=1.1)
    assert plan_paper(inputs).token_devices == 3


@pytest.mark.parametrize("slowdown", [1.0, 1.3, 1.74, 1.75, 1.9, 2.5])
@pytest.mark.parametrize("ratio", [0.5, 1.5, 3.0, 80.0])
def test_pays_where_the_ideal_split_beats_the_bubbles(slowdown, ratio):
    """The condition says exactly when the balanced split's time, (mY + Nt), is less than the colocated one."""
    inputs = replace(CASE, prompt_ms=80 * ratio, stream_slowdown=slowdown)
    balanced_ms = slowdown * inputs.prompt_ms + inputs.output_len * inputs.token_ms
    assert disaggregation_pays(inputs) == (balanced_ms < colocated_ms(inputs) - 1e-9)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"devices": 1}, "leaves none for prompts"),
        ({"memory_gb": 1}, "one layer and its prompt KV take"),
        ({"batch": 100}, "leaves no room for a layer"),
    ],
)
def test_says_why_no_split_is_valid(change, message):
    with pytest.raises(CapacityError, match=message) as caught:
        plan_paper(replace(CASE, **change))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("change", [{"token_ms": -80}, {"devices": 0}, {"memory_gb": float("nan")}, {"batch": -1}])
def test_refuses_impossible_numbers(change):
    (name,) = change
    with pytest.raises(UsageError, match=f"--{name.replace('_', '-')} "):
        replace(CASE, **change)


@pytest.mark.parametrize(("output_len", "bandwidth"), [(10, 1.0), (10, 2.0), (50, 5.0), (50, 9.0), (50, 30.0)])
def test_swapping_pays_by_the_sum(output_len, bandwidth):
    token_s, batch, size = 1.5, 2, 0.7
    total = 0.0
    for step in range(1, output_len + 1):
        total += max(token_s, step * batch * size / bandwidth)
    assert swapping_pays(output_len, token_s, batch, size, bandwidth) == (2 * output_len * token_s >= total)
