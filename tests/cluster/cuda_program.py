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


def make_config(directory: Path, device: str, shape: dict[str, Any]) -> ServeConfig:
    """Serve in fewer rows than there are requests."""
    fixed = {"device": device, "dtype": "float32", "microbatch_size": 2, "row_len": 40, "stall_timeout": 30}
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


def run(device: str, shapes: str, *kinds: str) -> int:
    """Run some shapes of some kinds of model."""
    world = World()
    watch(setattr)
    made = tempfile.TemporaryDirectory(prefix="dejavu-cuda-") if world.rank == 0 else None
    path = Path(world.gather(made and made.name)[0])
    for kind in kinds:
        build = lambda: make_reference(kind, path / kind) if world.rank == 0 else None  # noqa: B023, E731
        reference = world.together(build)[0]
        assert reference
        for name in shapes.split(","):
            found = serve(world, reference, make_config(reference.directory, device, SHAPES[name]))
            if world.rank == 0:
                print(json.dumps({"kind": kind, "shape": name, **found}), flush=True)
    world.gather(None)
    if made:
        made.cleanup()
    return 0


if __name__ == "__main__":
    sys.exit(guarded(lambda: run(*sys.argv[1:])))
