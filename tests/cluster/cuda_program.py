"""Serve small models of every family on GPUs, several ranks to one where need be; one line of JSON for each case.

Start it under mpirun with 3 ranks: `cuda_program.py DEVICE SHAPES KIND...`, shapes with commas between. A line says
which requests gave other tokens than transformers on the CPU, in float32, and by how much log-probabilities differ at
most.
"""

from __future__ import annotations

import json
import sys
import tempfile
from pathlib import Path
from statistics import stdev
from typing import Any

from dejavu.cluster.process import guarded
from dejavu.config import ServeConfig
from dejavu.request import Completion
from tests.mpi.reference import Reference, make_reference
from tests.mpi.replicas import watch
from tests.mpi.world import World

SHAPES: dict[str, dict[str, Any]] = {
    "one": {"pp": 1},
    "stages": {"pp": 2, "num_microbatches": 3, "prompt_chunk": 5},
    "tensor": {"tp": 2},
    "split": {"prompt_pp": 1, "token_pp": 1, "block_size": 16},
    "replicated": {"pp": 2, "replicate": "ring", "block_size": 16},
    "received": {"pp": 2, "replicate": "ring", "replica_transport": "tcp"},
    "split-nccl": {"prompt_pp": 1, "token_pp": 1, "block_size": 16, "transport": "nccl"},  # a GPU for each rank
}


HALF_KINDS, HALF_SHAPES = ("opt", "llama"), ("stages", "tensor")  # that also run in 16 bits
CLEAR_GAP = 0.05  # between the two likeliest tokens, of all logits' standard deviation: beyond rounding to 16 bits


def make_config(directory: Path, device: str, shape: dict[str, Any], dtype: str = "float32") -> ServeConfig:
    """Serve in fewer rows than there are requests."""
    fixed = {"device": device, "dtype": dtype, "microbatch_size": 2, "row_len": 40, "stall_timeout": 30}
    made_up = {"num_requests": 1, "prompt_len": 1, "output_len": 1}
    return ServeConfig(model=str(directory), **fixed, **made_up, **shape)


def compare(reference: Reference, completions: list[Completion]) -> dict[str, Any]:
    """Count the requests with wrong tokens, and find the largest error of a log-probability."""
    pairs = list(zip(completions, reference.token_ids, strict=True))
    wrong = [c.request.request_id for c, expected in pairs if tuple(c.token_ids) != expected]
    return {"wrong": wrong, "requests": len(pairs), "error": largest_error(reference, completions)}


def largest_error(reference: Reference, completions: list[Completion]) -> float:
    """Give the largest difference of a log-probability, over all tokens that both sides have in common."""
    errors = [0.0]
    for completion, rows, expected in zip(completions, reference.logprobs, reference.token_ids, strict=True):
        for token, other, found, row in zip(completion.token_ids, expected, completion.logprobs, rows, strict=False):
            errors += [abs(value - row[place]) for place, value in found.top]
            if token != other:
                break
    return max(errors)


def serve(world: World, reference: Reference, config: ServeConfig) -> dict[str, Any]:
    """Serve the reference's requests and compare; a failure of any rank is a result too."""
    try:
        return compare(reference, world.generate(config, reference.requests) or [])
    except AssertionError as error:
        return {"wrong": [], "requests": 0, "error": float("inf"), "failure": str(error)}


def compare_splits(world: World, reference: Reference, device: str) -> list[dict[str, Any]]:
    """Serve in 16 bits on one rank and in other shapes, and count the requests whose clear tokens differ."""
    configs = [make_config(reference.directory, device, SHAPES[name], "float16") for name in ("one", *HALF_SHAPES)]
    alone, *others = [world.generate(config, reference.requests) or [] for config in configs]
    pairs = [[(a, b) for i, (a, b) in enumerate(zip(alone, o, strict=True)) if i in reference.greedy] for o in others]
    counts = [[clear_tokens(a, b) for a, b in found] for found in pairs]
    return [
        {"shape": f"{name} float16", "wrong": sum(n is None for n in found), "tokens": sum(n or 0 for n in found)}
        for name, found in zip(HALF_SHAPES, counts, strict=True)
    ]


def clear_tokens(alone: Completion, other: Completion) -> int | None:
    """Count the tokens up to the first that differs; None if that one was clear. Without log-probabilities, 0."""
    count = 0
    for row, token, found in zip(alone.logprobs, alone.token_ids, other.token_ids, strict=False):
        if token != found:
            values = sorted(value for _, value in row.top)
            return None if values[-1] - values[-2] > CLEAR_GAP * stdev(values) else count
        count += 1
    return count


def run(device: str, shapes: str, *kinds: str) -> int:
    """Run some shapes of some kinds of model."""
    names = shapes.split(",")
    world = World()
    watch(setattr)
    made = tempfile.TemporaryDirectory(prefix="dejavu-cuda-") if world.rank == 0 else None
    path = Path(world.gather(made and made.name)[0])
    for kind in kinds:
        build = lambda: make_reference(kind, path / kind) if world.rank == 0 else None  # noqa: B023, E731
        reference = world.together(build)[0]
        assert reference
        for name in names:
            found = serve(world, reference, make_config(reference.directory, device, SHAPES[name]))
            if world.rank == 0:
                print(json.dumps({"kind": kind, "shape": name, **found}), flush=True)
        also_half = kind in HALF_KINDS and {"one", *HALF_SHAPES} <= set(names)
        for line in compare_splits(world, reference, device) if also_half else []:
            if world.rank == 0:
                print(json.dumps({"kind": kind, **line}), flush=True)
    world.gather(None)
    if made:
        made.cleanup()
    return 0


if __name__ == "__main__":
    sys.exit(guarded(lambda: run(*sys.argv[1:])))
