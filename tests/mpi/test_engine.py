"""Serve every family over every split of real MPI ranks, and compare tokens and log-probabilities with transformers."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from dejavu.config import ServeConfig
from dejavu.request import Completion
from tests.model_zoo import KINDS

if TYPE_CHECKING:
    from tests.mpi.reference import Reference

pytestmark = [pytest.mark.mpi(min_size=7), pytest.mark.timeout(100)]

SPLITS = [(tp, pp) for tp in (1, 2) for pp in (1, 2, 3)]
SCHEDULES = [  # block_size, prompt_chunk, max_prompt_tokens, microbatches beyond one per stage
    (0, 0, 8192, 1),
    (4, 5, 8192, 0),
    (4, 0, 20, 1),
    (0, 6, 8192, 2),
    (16, 1, 8192, 0),
]
CASES = [
    (kind, *split, SCHEDULES[(kind_index + split_index) % len(SCHEDULES)])
    for kind_index, kind in enumerate(KINDS)
    for split_index, split in enumerate(SPLITS)
]


def make_config(reference: Reference, tp: int, pp: int, schedule: tuple[int, int, int, int]) -> ServeConfig:
    """Serve in fewer rows than there are requests."""
    block_size, prompt_chunk, max_prompt_tokens, extra = schedule
    return ServeConfig(
        model=str(reference.directory),
        dtype="float32",
        tp=tp,
        pp=pp,
        threads=1,
        microbatch_size=2,
        num_microbatches=pp + extra,
        row_len=40,
        num_requests=1,
        prompt_len=1,
        output_len=1,
        block_size=block_size,
        prompt_chunk=prompt_chunk,
        max_prompt_tokens=max_prompt_tokens,
        stall_timeout=20,
    )


@pytest.mark.parametrize("kind", KINDS)
def test_reference_leaves_no_doubt(reference_of, kind):
    """A token is the likeliest by far more than what rounding moves, and the texts are not one token over and over."""
    reference = reference_of(kind)
    assert reference.smallest_gap > 1e-3
    assert len({token for tokens in reference.token_ids for token in tokens}) > 8


@pytest.mark.parametrize(
    ("kind", "tp", "pp", "schedule"), CASES, ids=lambda v: "-".join(map(str, v)) if isinstance(v, tuple) else None
)
def test_same_as_transformers(world, reference_of, kind, tp, pp, schedule):
    reference = reference_of(kind)
    completions = world.generate(make_config(reference, tp, pp, schedule), reference.requests)
    assert [c.request.request_id for c in completions] == [r.request_id for r in reference.requests]
    assert [tuple(c.token_ids) for c in completions] == list(reference.token_ids)
    assert [c.finish_reason for c in completions] == list(reference.reasons)
    for completion, logprobs in zip(completions, reference.logprobs, strict=True):
        check_logprobs(completion, logprobs)


def check_logprobs(completion: Completion, expected: tuple[tuple[float, ...], ...]) -> None:
    """Compare the log-probabilities of the whole vocabulary, where they were asked for."""
    if completion.request.sampling.logprobs is None:
        assert completion.logprobs == []
        return
    assert len(completion.logprobs) == len(expected)
    for token_id, found, row in zip(completion.token_ids, completion.logprobs, expected, strict=True):
        assert found.chosen == pytest.approx(row[token_id], abs=1e-4)
        assert sorted(token for token, _ in found.top) == list(range(len(row)))
        assert max(abs(value - row[token]) for token, value in found.top) < 1e-4
