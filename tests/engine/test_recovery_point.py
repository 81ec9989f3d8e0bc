"""What may be lost, and what must not be, by what replicas have acknowledged."""

import pytest

from dejavu.engine.messages import Admission
from dejavu.engine.recovery_point import ALL_TOKENS, Repeated, Restored
from dejavu.request import Request, SamplingParams

REQUEST = Request("a", (5, 6, 7), SamplingParams(max_tokens=9))


@pytest.mark.parametrize(
    ("restored", "begun", "excused"),
    [
        (Restored(True), 4, 0),  # nobody lost memory
        (Restored(False, acknowledged=(9, 6)), 4, 2),
        (Restored(False, acknowledged=(9, 6), most_behind=(5, 1)), 4, 1),
        (Restored(False, acknowledged=(9, 12)), 4, 0),  # a rank was ahead of what the controller knew
        (Restored(False, acknowledged=(9, 3)), 4, ALL_TOKENS),  # no replica had it
        (Restored(False, acknowledged=(9, 6)), None, ALL_TOKENS),  # it is not known when it began
        (Restored(False, acknowledged=(-1, -1)), 4, ALL_TOKENS),
    ],
)
def test_steps_behind_what_was_acknowledged_are_excused(restored, begun, excused):
    assert restored.excuses(1, begun, last=8) == excused


@pytest.mark.parametrize(
    ("num_cached", "excused", "expected"),
    [
        (7, 0, Repeated()),
        (6, 1, Repeated(tokens=1, steps=1)),
        (5, 1, Repeated(tokens=2, steps=2, steps_beyond=1)),
        (2, ALL_TOKENS, Repeated(prompts=1, tokens=4, steps=4)),
        (0, 1, Repeated(prompts=1, tokens=4, steps=4, prompts_avoidable=1, steps_beyond=3)),
    ],
)
def test_what_is_lost_without_an_excuse_is_told_apart(num_cached, excused, expected):
    repeated = Repeated()
    repeated.count(Admission(0, 1, 0, (0,), REQUEST, outputs=(1, 2, 3, 4, 5), num_cached=num_cached), 7, excused)
    assert repeated == expected


def test_parts_of_a_prompt_count_as_one_where_none_is_left():
    for num_cached, prompts in ((0, 1), (2, 0)):
        repeated = Repeated()
        repeated.count(Admission(0, 1, 0, (0,), REQUEST, num_cached=num_cached), 2, ALL_TOKENS)
        assert repeated == Repeated(prompts=prompts)
