"""Stages that wait: how long for which pass."""

import pytest
import torch

from dejavu.engine.messages import RowWork, Work
from dejavu.model.batch import Batch
from dejavu.model.spec import Shard
from dejavu.model.synthetic import SyntheticStage


def work(*rows):
    """Make a pass of (new tokens, context, prompt tokens): a row within its prompt processes it."""
    made = [RowWork(i, i, new, context, context < whole, True, whole) for i, (new, context, whole) in enumerate(rows)]
    return Work(0, 0, tuple(made), (), ())


@pytest.mark.parametrize(
    ("rows", "milliseconds"),
    [
        ([(40, 0, 40)], 80),  # a whole prompt
        ([(40, 0, 40), (8, 0, 8)], 80),  # two take as long together
        ([(10, 20, 40)], 20),  # a chunk takes its part
        ([(10, 0, 40), (10, 10, 40)], 20),
        ([(4, 0, 40), (1, 50, 9)], 16),  # with a token step in it, at least as long as that
        ([(30, 0, 40), (1, 50, 9)], 60),
        ([(1, 50, 9), (1, 12, 3)], 16),
    ],
)
def test_the_time_of_a_pass(rows, milliseconds):
    given = work(*rows)
    batch = Batch(torch.zeros(1), [r.num_new for r in given.rows], [r.context for r in given.rows], [], [])
    batch.prompt_share = given.prompt_share
    stage = SyntheticStage(Shard(0, 1, 1), 50, 80.0, 16.0)
    assert stage.pass_s(batch) == pytest.approx(milliseconds / 1e3)
