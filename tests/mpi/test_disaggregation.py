"""Process prompts in one pipeline, generate tokens in another: transformers' tokens, in any combination."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from itertools import product
from random import Random
from typing import Any

import pytest

from dejavu.config import ServeConfig
from dejavu.engine.controller import Controller
from dejavu.engine.messages import Work
from dejavu.engine.worker import Worker
from dejavu.measure.records import TransferRecord
from dejavu.request import Completion, FinishReason, Request
from dejavu.topology import required_ranks
from tests.model_zoo import KINDS

pytestmark = [pytest.mark.mpi(min_size=7), pytest.mark.timeout(60)]

TRANSPORTS = ("ipc", "mpi", "rma", "tcp")
LEVELS = ("layered", "buffered", "naive")


def combinations() -> list[dict[str, Any]]:
    """Draw combinations that 7 ranks can run; every transport, level and kind of model is among them."""
    random = Random(4)
    shapes = [
        dict(zip(("prompt_pp", "token_pp", "prompt_tp", "token_tp"), shape, strict=True))
        for shape in product((1, 2, 3, 4), (1, 2, 3, 4), (1, 2), (1, 2))
        if shape[0] * shape[2] + shape[1] * shape[3] <= 6
    ]
    return [
        {
            **shape,
            "kind": list(KINDS)[index % len(KINDS)],
            "transport": TRANSPORTS[index % len(TRANSPORTS)],
            "stream_level": LEVELS[index % len(LEVELS)],
            "microbatch_size": random.choice((1, 2, 3)),
            "prompt_microbatch_size": random.choice((1, 2, 4)),
            "handover_rows": random.choice((1, 3)),
            "block_size": random.choice((0, 4, 16)),
            "num_microbatches": shape["token_pp"] + random.choice((0, 1)),
        }
        for index, shape in enumerate(random.sample(shapes, len(shapes)) + random.sample(shapes, 32 - len(shapes)))
    ]


def make_config(directory: Any, combination: dict[str, Any]) -> ServeConfig:
    """Serve in fewer rows than there are requests."""
    shape = {name: value for name, value in combination.items() if name != "kind"}
    fixed = {"dtype": "float32", "threads": 1, "row_len": 40, "num_requests": 1, "prompt_len": 1, "output_len": 1}
    return ServeConfig(model=str(directory), stall_timeout=20, **fixed, **shape)


def generate(controller: Controller, requests: tuple[Request, ...]) -> list[Any]:
    """Serve requests, and check that every block of both pipelines comes back."""
    completions = controller.generate(requests)
    controller.wait_clean()
    for lane in controller.seating.lanes:
        assert len(lane.table.blocks.free) == lane.table.num_blocks
        assert not lane.table.occupants
    return completions


@pytest.mark.parametrize("combination", combinations(), ids=lambda c: "-".join(str(value) for value in c.values()))
def test_same_as_transformers(world, reference_of, combination):
    reference = reference_of(combination["kind"])
    config = make_config(reference.directory, combination)
    assert required_ranks(config) <= world.size
    completions, outcome = world.serve(config, lambda controller: generate(controller, reference.requests))
    assert [tuple(c.token_ids) for c in completions] == list(reference.token_ids)
    assert [c.finish_reason for c in completions] == list(reference.reasons)
    handed_over = [c for c in completions if len(c.token_ids) > 1]
    assert all(c.first_token_s <= c.token_start_s <= c.finish_s for c in handed_over)
    assert all(c.was_handed_over and c.handover_s >= 0 and c.row_wait_s >= 0 for c in handed_over)
    moves = [move for report in outcome.reports.values() for move in report.transfers]
    first_token_rank = 1 + config.prompt_pp * config.prompt_tp
    assert {(move.kind, move.transport) for move in moves} == {("handover", config.transport)}
    assert all(move.source < first_token_rank <= move.target and move.start_s <= move.end_s for move in moves)
    check_bytes(completions, moves)


def check_bytes(completions: Sequence[Completion], moves: Sequence[TransferRecord]) -> None:
    """Hold what went from rank to rank against the prompts; one whose first token ends it may be on its way by then."""
    goes_on = [c for c in completions if c.request.sampling.max_tokens > 1]
    surely = Counter(len(c.request.prompt_token_ids) for c in goes_on if len(c.token_ids) > 1)
    possibly = Counter(len(c.request.prompt_token_ids) for c in goes_on)
    for link in {(move.source, move.target) for move in moves}:
        sizes = [move.bytes for move in moves if (move.source, move.target) == link]
        per_token = min(sizes) // min(surely)
        assert all(size % per_token == 0 for size in sizes)
        assert surely <= Counter(size // per_token for size in sizes) <= possibly


@pytest.mark.parametrize("transport", TRANSPORTS)
def test_cancel_at_any_time_frees_both_sides(world, reference_of, transport):
    reference = reference_of("llama")
    shape = {"prompt_pp": 2, "token_pp": 2, "prompt_tp": 1, "token_tp": 2, "microbatch_size": 1, "handover_rows": 2}
    config = make_config(reference.directory, {**shape, "transport": transport})

    def drive(controller: Controller) -> list[Any]:
        sampling = replace(reference.requests[0].sampling, max_tokens=8, ignore_eos=True, logprobs=None)
        requests = [replace(r, request_id=str(i), sampling=sampling) for i, r in enumerate(reference.requests)]
        for request in requests:
            controller.submit(request)
        controller.cancel("3")  # before it is seated
        controller.poll()
        controller.cancel("0")  # in its prompt
        ends: dict[str, FinishReason] = {}
        for event, completion in controller.events():
            if len(completion.token_ids) == 1 and event.request_id in ("1", "4"):
                controller.cancel(event.request_id)  # in its hand-over
            if len(completion.token_ids) == 3 and event.request_id == "2":
                controller.cancel("2")  # while it generates
            if event.finish_reason:
                ends[event.request_id] = event.finish_reason
        return [ends, [r.request_id for r in requests], *generate(controller, (replace(requests[5], request_id="x"),))]

    (ends, ids, last), _ = world.serve(config, drive)
    assert sorted(ends) == sorted(ids)
    assert {i for i, reason in ends.items() if reason is FinishReason.CANCELLED} >= {"0", "3"}
    assert {i for i, reason in ends.items() if reason is FinishReason.LENGTH} >= set("56789")
    assert last.finish_reason is FinishReason.LENGTH
    assert len(last.token_ids) == 8


@pytest.mark.parametrize("swap", [False, True])
def test_a_pass_that_outlives_its_request_writes_into_no_other(world, reference_of, monkeypatch, swap):
    """The last pass of a cancelled request is held up in the first token stage, while others wait for its blocks."""
    reference = reference_of("llama")
    shape = {"prompt_pp": 1, "token_pp": 2, "microbatch_size": 1, "num_microbatches": 2, "handover_rows": 1}
    shape |= {"swap": True, "resident": 1} if swap else {}
    config = make_config(reference.directory, shape)
    sampling = replace(reference.requests[0].sampling, max_tokens=12, ignore_eos=True, logprobs=3)
    prompts = {"long": (5, 6, 7), "other": (8, 9), "next": (10, 11), "last": tuple(range(20, 36))}
    requests = {name: Request(name, prompt, sampling) for name, prompt in prompts.items()}
    step, late = Worker.step, len(prompts["long"]) + 3

    def slow_step(worker: Worker, work: Work) -> None:
        if worker.channel.rank == 2 and any(row.serial == 0 and row.context == late for row in work.rows):
            time.sleep(0.4)
        step(worker, work)

    def drive(controller: Controller) -> Any:
        for request in requests.values():
            controller.submit(request)
        ends = {}
        for event, completion in controller.events():
            if event.request_id == "long" and len(completion.token_ids) == 4:
                controller.cancel("long")
            if event.finish_reason:
                ends[event.request_id] = completion
        return [ends, *generate(controller, (replace(requests["last"], request_id="again"),))]

    monkeypatch.setattr(Worker, "step", slow_step)
    (ends, again), _ = world.serve(config, drive)
    assert ends["long"].finish_reason is FinishReason.CANCELLED
    assert ends["last"].token_ids == again.token_ids
    for found, expected in zip(ends["last"].logprobs, again.logprobs, strict=True):
        assert found.top == tuple((token, pytest.approx(value, abs=1e-4)) for token, value in expected.top)


def test_synthetic_stages_give_the_same_tokens_in_both_arrangements(world):
    fixed = {"model": "gpt2", "load_format": "dummy", "synthetic": (3.0, 1.0), "num_requests": 6, "output_len": 9}
    requests = tuple(
        Request(str(i), (5 * i + 1, 7), replace(Request("", (1,)).sampling, max_tokens=9, ignore_eos=True))
        for i in range(6)
    )
    results = []
    for shape in ({"pp": 2}, {"prompt_pp": 2, "token_pp": 3}, {"pp": 1, "dp": 3}):
        config = ServeConfig(**fixed, **shape, stall_timeout=20)
        completions, _ = world.serve(config, lambda controller: generate(controller, requests))
        results.append([c.token_ids for c in completions])
    assert results[0] == results[1] == results[2]
