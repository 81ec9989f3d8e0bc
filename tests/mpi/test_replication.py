"""Serve with replication over real ranks: the same tokens, and replicas that hold what their owners do."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import Any

import pytest

from dejavu.config import ServeConfig
from dejavu.engine.controller import Controller
from dejavu.request import Completion, Request
from tests.mpi.replicas import watch

pytestmark = [pytest.mark.mpi(min_size=7), pytest.mark.timeout(60)]

CASES = [
    {"pp": 3, "block_size": 4},
    {"pp": 2, "tp": 2, "replicate_every": 3},
    {"pp": 3, "prompt_chunk": 5, "replica_transport": "tcp", "block_size": 16},
    {"dp": 2, "pp": 2, "num_microbatches": 3, "replica_transport": "mpi"},
    {"prompt_pp": 1, "token_pp": 3, "block_size": 4},
    {"prompt_pp": 2, "token_pp": 2, "token_tp": 2, "replica_transport": "tcp"},
    {"pp": 1},
    {"pp": 2, "num_microbatches": 4, "swap": True, "block_size": 4, "replica_transport": "tcp"},
]


def make_config(directory: Any, case: dict[str, Any]) -> ServeConfig:
    fixed = {"dtype": "float32", "threads": 1, "row_len": 40, "num_requests": 1, "prompt_len": 1, "output_len": 1}
    shape = {"replicate": "ring", "microbatch_size": 2, "stall_timeout": 20, **case}
    return ServeConfig(model=str(directory), **fixed, **shape)


@pytest.mark.parametrize("case", CASES, ids=lambda case: "-".join(f"{k}={v}" for k, v in case.items()))
def test_replicas_hold_what_their_owners_do(world, reference_of, monkeypatch, case):
    reference = reference_of("llama")
    config = make_config(reference.directory, case)
    watch(monkeypatch.setattr)
    (completions, lanes), outcome = world.serve(config, lambda controller: drive(controller, reference.requests))
    replicated = {place: step for lane in lanes for place, step in lane.items()}
    assert [tuple(c.token_ids) for c in completions] == list(reference.token_ids)
    check_acknowledged(config, replicated, outcome)
    check_bytes(config, outcome)


def drive(
    controller: Controller, requests: Sequence[Request]
) -> tuple[list[Completion], list[dict[tuple[int, int], int]]]:
    """Serve, and give the books of acknowledgements, to which the last are added as the ranks end."""
    return controller.generate(requests), [lane.replicated for lane in controller.seating.lanes]


def owners(config: ServeConfig, outcome: Any) -> list[int]:
    """Give the ranks that have a replica: all that generate tokens."""
    first = 1 + config.prompt_pp * (config.prompt_tp or config.tp)
    return sorted(rank for rank in outcome.reports if rank >= first)


def check_acknowledged(config: ServeConfig, replicated: dict[tuple[int, int], int], outcome: Any) -> None:
    """Hold the last acknowledged step of each rank and microbatch against the last one that there was."""
    for rank in owners(config, outcome):
        last = Counter({s.microbatch: s.step for s in sorted(outcome.reports[rank].steps, key=lambda s: s.step)})
        for microbatch, step in last.items():
            assert step - replicated[rank, microbatch] < config.replicate_every, (rank, microbatch)


def check_bytes(config: ServeConfig, outcome: Any) -> None:
    """Hold the bytes of every transfer against the tokens of its pass; prompts that came from elsewhere come on top."""
    transfers = [transfer for report in outcome.reports.values() for transfer in report.transfers]
    for rank in owners(config, outcome):
        own = [transfer for transfer in transfers if (transfer.kind, transfer.source) == ("replica", rank)]
        steps = outcome.reports[rank].steps
        assert own
        if config.replicate_every > 1:
            continue
        per_token = min(transfer.bytes for transfer in own)
        assert all(transfer.bytes % per_token == 0 for transfer in own)
        if not config.is_disaggregated:
            assert Counter(t.bytes // per_token for t in own) == Counter(step.num_tokens for step in steps)
