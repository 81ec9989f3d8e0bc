import pytest

from dejavu.measure.records import StepRecord
from dejavu.measure.report.charts import throughput
from dejavu.measure.report.figures import WIDTHS, legend_columns


def token_step(stage, index):
    return StepRecord(stage + 1, stage, 0, 0, index, "token", 2, 2, float(index), index + 0.4, index + 0.5)


def test_a_stage_whose_records_are_gone_hides_no_tokens():
    steps = [token_step(0, index) for index in range(10)] + [token_step(1, index) for index in range(6, 10)]
    edges, rates = throughput(steps)
    widths = edges[1:] - edges[:-1]
    assert (rates * widths).sum() == pytest.approx(20)


def test_prompts_are_no_output():
    step = token_step(0, 1)
    step.kind = "prompt"
    _, rates = throughput([step])
    assert rates.sum() == 0


def test_first_tokens_are_output():
    _, rates = throughput([token_step(0, 3)], first_tokens_s=[0.5, 0.5])
    edges, _ = throughput([token_step(0, 3)])
    assert (rates * (edges[1:] - edges[:-1])).sum() == pytest.approx(2 + 2)


def test_pipelines_side_by_side_add_up():
    steps = [token_step(stage, index) for stage in range(4) for index in range(10 if stage < 2 else 5)]
    edges, rates = throughput(steps, stages_per_copy=2)
    assert (rates * (edges[1:] - edges[:-1])).sum() == pytest.approx(2 * 10 + 2 * 5)


def test_legend_fits_the_page():
    labels = ["prompt-pp 1, token-pp 2", "pp 3", "pp 1, dp 3"]
    assert [legend_columns(labels, width) for width in WIDTHS.values()] == [3, 1]
    assert legend_columns(["prompt", "token"], WIDTHS["narrow"]) == 3
