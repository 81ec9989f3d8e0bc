"""Serve more microbatches than the device holds: the same tokens as transformers', and only what has to move moves."""

from __future__ import annotations

from typing import Any

import pytest

from dejavu.config import ServeConfig
from dejavu.engine.controller import Controller
from dejavu.request import FinishReason, Request, SamplingParams
from dejavu.topology import required_ranks
from tests.model_zoo import KINDS, NUM_LAYERS
from tests.mpi.test_disaggregation import generate

pytestmark = [pytest.mark.mpi(min_size=5), pytest.mark.timeout(60)]

SHAPES: list[dict[str, Any]] = [
    {"pp": 3},
    {"pp": 1, "num_microbatches": 4, "block_size": 4},
    {"pp": 2, "num_microbatches": 4, "prompt_chunk": 5, "block_size": 4},
    {"pp": 2, "num_microbatches": 5, "resident": 3, "max_prompt_tokens": 20},
    {"pp": 2, "num_microbatches": 3, "resident": 1, "block_size": 16},
    {"pp": 1, "tp": 2, "num_microbatches": 3, "prompt_chunk": 1},
    {"pp": 1, "dp": 2, "num_microbatches": 3, "block_size": 4},
    {"pp": 3, "num_microbatches": 3, "resident": 3},  # nothing to swap
    {"pp": 3, "replicate": "ring", "replica_transport": "tcp", "block_size": 4},  # behind the flushes
    {"prompt_pp": 1, "token_pp": 3, "replicate": "ring", "replicate_every": 2},
    {"prompt_pp": 1, "token_pp": 3, "block_size": 4},
    {"prompt_pp": 2, "token_pp": 2, "num_microbatches": 4, "transport": "mpi", "stream_level": "buffered"},
    {"prompt_pp": 1, "token_pp": 1, "token_tp": 2, "num_microbatches": 3, "resident": 1, "handover_rows": 3},
]


def make_config(directory: Any, shape: dict[str, Any]) -> ServeConfig:
    """Serve in fewer rows than there are requests."""
    fixed = {"dtype": "float32", "threads": 1, "row_len": 40, "num_requests": 1, "prompt_len": 1, "output_len": 1}
    rows = {"microbatch_size": 2, "swap": True, "stall_timeout": 20}
    return ServeConfig(model=str(directory), **(fixed | rows | shape))


@pytest.mark.parametrize("index", range(len(SHAPES)), ids=lambda i: "-".join(map(str, SHAPES[i].values())))
def test_same_as_transformers(world, reference_of, index):
    reference = reference_of(list(KINDS)[index % len(KINDS)])
    config = make_config(reference.directory, SHAPES[index])
    assert required_ranks(config) <= 5
    completions, outcome = world.serve(config, lambda controller: generate(controller, reference.requests))
    assert [tuple(c.token_ids) for c in completions] == list(reference.token_ids)
    assert [c.finish_reason for c in completions] == list(reference.reasons)
    swaps = config.resident < (config.num_microbatches or config.token_pp or config.pp)
    for report in outcome.reports.values():
        is_prompt = config.is_disaggregated and report.steps[0].kind == "prompt"
        kinds = {transfer.kind for transfer in report.transfers} & {"fetch", "flush"}
        assert kinds == ({"fetch", "flush"} if swaps and not is_prompt else set())


REPLICAS: list[dict[str, Any]] = [
    {},
    {"replicate": "ring"},  # on this host: what is flushed is the replica
    {"replicate": "ring", "replica_transport": "tcp"},  # as if on another: it leaves from where it was flushed to
]


@pytest.mark.parametrize("replicas", REPLICAS, ids=lambda replicas: "-".join(replicas.values()) or "none")
def test_bytes_are_the_arithmetic(world, reference_of, replicas):
    """Three rows of a microbatch each in two slots: every step but the very first fetches its row, and flushes a token.

    After its prompt a microbatch finds the others' rows in its slot. With replicas the device gives out no byte more.
    """
    reference = reference_of("llama")
    shape = {"pp": 2, "num_microbatches": 3, "microbatch_size": 1, "block_size": 4}
    config = make_config(reference.directory, shape | replicas)
    lengths, num_tokens = (9, 12, 5), 8
    sampling = SamplingParams(max_tokens=num_tokens, ignore_eos=True)
    requests = tuple(Request(str(i), tuple(range(3, 3 + n)), sampling) for i, n in enumerate(lengths))
    _, outcome = world.serve(config, lambda controller: generate(controller, requests))
    token_bytes = (NUM_LAYERS // 2) * 2 * 2 * 8 * 4  # a stage's layers, K and V, of 2 heads of 8 float32
    for report in outcome.reports.values():
        kinds = "fetch", "flush", "replica"
        by_kind = {k: sum(t.bytes for t in report.transfers if t.kind == k) for k in kinds}
        computed = sum(step.num_tokens for step in report.steps)
        assert computed == sum(lengths) + len(lengths) * (num_tokens - 1)
        assert by_kind["flush"] == computed * token_bytes
        contexts = sum(n + step for n in lengths for step in range(num_tokens - 1))
        assert by_kind["fetch"] == (contexts - lengths[0]) * token_bytes
        assert by_kind["replica"] == (computed * token_bytes if "replica_transport" in replicas else 0)
        swaps = [t for t in report.transfers if t.kind != "replica"]
        assert all(t.end_s >= t.start_s and t.source == t.target == t.rank for t in swaps)


def test_cancel_at_any_time(world, reference_of):
    """Rows that are freed in the middle are taken by others, whose tokens are those of a run without swapping."""
    reference = reference_of("bloom")
    sampling = SamplingParams(max_tokens=8, ignore_eos=True)
    requests = [Request(str(i), r.prompt_token_ids, sampling) for i, r in enumerate(reference.requests)]

    def drive(controller: Controller) -> dict[str, tuple[int, ...]]:
        for request in requests:
            controller.submit(request)
        tokens: dict[str, tuple[int, ...]] = {}
        controller.cancel("0")
        controller.poll()
        for event, completion in controller.events():
            if len(completion.token_ids) == 3 and event.request_id in ("1", "4", "5"):
                controller.cancel(event.request_id)
            if event.finish_reason is FinishReason.LENGTH:
                tokens[event.request_id] = tuple(completion.token_ids)
        return tokens

    shapes: list[dict[str, Any]] = [
        {"pp": 2, "num_microbatches": 3},
        {"prompt_pp": 1, "token_pp": 2, "num_microbatches": 3},
    ]
    for shape in shapes:
        swapped, _ = world.serve(make_config(reference.directory, shape), drive)
        plain, _ = world.serve(make_config(reference.directory, shape | {"swap": False}), drive)
        both = swapped.keys() & plain.keys()  # a request may come to its end before its cancel is noticed
        assert {k: swapped[k] for k in both} == {k: plain[k] for k in both}
        assert both >= {str(i) for i in range(len(requests))} - {"0", "1", "4", "5"}
