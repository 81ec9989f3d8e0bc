"""Decide when to simulate as machine code, and turn what that gives into a result.

Loading numba and the code takes some 0.3 s, and making the code some 10 s, once on a machine: so a process begins with
objects, and turns to machine code when it has simulated, or is about to simulate, more than that is worth.
"""

from collections.abc import Sequence
from importlib.util import find_spec

import numpy as np
from numpy.typing import NDArray

from dejavu.planning.lengths import Lengths
from dejavu.planning.result import Floats, Result
from dejavu.planning.setup import Setup
from dejavu.planning.world import World, fits, make_world

WORTH = 1000  # requests: 50 ms with objects; whoever simulates so many will simulate more


class Tally:
    """Count the requests that this process has simulated."""

    num_requests = 0


def is_worth_it(num_requests: int) -> bool:
    """Tell whether this process simulates so much that machine code pays; it needs numba."""
    Tally.num_requests += num_requests
    return Tally.num_requests > WORTH and find_spec("numba") is not None


def simulate_as_machine_code(setup: Setup, requests: Sequence[Lengths]) -> Result | None:
    """Serve checked requests; None where machine code cannot simulate the setup."""
    if not fits(setup):
        return None
    from dejavu.planning.compiled import run

    order = np.argsort([request.arrival_s for request in requests], kind="stable")
    world, prompts, tokens = make_world(setup, [requests[index] for index in order.tolist()])
    return gather(setup, requests, order, world) if run(world, prompts, tokens) else None


def gather(setup: Setup, requests: Sequence[Lengths], order: NDArray[np.intp], world: World) -> Result:
    """Put what happened into the order of the requests as they were given."""

    def given(values: Floats) -> Floats:
        sorted_back = np.empty_like(values)
        sorted_back[order] = values
        return sorted_back

    work_s = zip(setup.pipelines, world.work_s.tolist(), strict=True)
    return Result(
        requests=tuple(requests),
        admitted_s=given(world.admitted_s),
        first_token_s=given(world.first_s),
        kv_arrived_s=given(world.arrived_s),
        token_start_s=given(world.begun_s),
        finish_s=given(world.finish_s),
        stage_busy_s=tuple((seconds,) * pipeline.stages for pipeline, seconds in work_s),
        stall_s=0.0,
        num_passes=int(world.num_passes.sum()),
    )


def prepare() -> None:
    """Make the machine code, where this machine does not have it yet, and keep it."""
    from dejavu.planning.setup import PipelineSetup
    from dejavu.planning.times import FixedTimes

    result = simulate_as_machine_code(Setup((PipelineSetup(1, FixedTimes(1.0, 1.0)),)), [Lengths(1, 2)])
    assert result is not None
    assert result.makespan_s == 2.0


if __name__ == "__main__":
    prepare()
