"""What streaming a prompt's KV layer by layer costs its pass, beside prompts that end with their first token.

Both kinds take turns on an engine that serves nothing else meanwhile, so each pass is measured alone.
"""

import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from dejavu.measure.records import StepRecord
from dejavu.request import Request

from .driver import Row

if TYPE_CHECKING:
    from dejavu.engine.controller import Controller

ROUNDS = 16
STAYS, GOES_ON = 1, 2  # output tokens of a request that ends with its first one, and of one that is handed over


@dataclass(frozen=True, slots=True)
class Probe:
    """Hold when one prompt was processed alone, on the run's clock, and whether its KV was streamed meanwhile."""

    streams: bool
    start_s: float
    end_s: float

    def pass_s(self, steps: Sequence[StepRecord], prompt_stages: int) -> float:
        """Give what its pass computed for in all prompt stages."""
        own = [step for step in steps if step.stage < prompt_stages and self.start_s <= step.start_s < self.end_s]
        return sum(step.compute_end_s - step.start_s for step in own if step.tp_rank == 0)


def probe(controller: "Controller", make_request: Callable[[str, int, int], Request]) -> tuple[Probe, ...]:
    """Serve prompts one at a time: a pair in each round, whose order changes from round to round.

    `make_request` takes a name, the number of a prompt and the output tokens.
    """
    orders = [(STAYS, GOES_ON), (GOES_ON, STAYS)] * (ROUNDS // 2)
    return tuple(
        probe_one(controller, make_request(f"probe-{outputs}", number, outputs))
        for number, order in enumerate(orders)
        for outputs in order
    )


def probe_one(controller: "Controller", request: Request) -> Probe:
    """Serve one request alone."""
    start_s = controller.clock.now_s()
    controller.generate([request])
    controller.wait_clean()
    return Probe(request.sampling.max_tokens == GOES_ON, start_s, controller.clock.now_s())


def streaming_cost(steps: Sequence[StepRecord], probes: Sequence[Probe], prompt_stages: int) -> Row:
    """Give the medians of a prompt pass alone and with its KV streamed, ms, and of the pairs' ratios, percent.

    All are None where nothing was probed.
    """
    if not probes:
        return dict.fromkeys(("prompt_pass_ms", "streamed_prompt_pass_ms", "streaming_cost_percent"))
    plain, streamed = (
        [each.pass_s(steps, prompt_stages) for each in probes if each.streams == streams] for streams in (False, True)
    )
    ratios = [with_it / without for without, with_it in zip(plain, streamed, strict=True)]
    return {
        "prompt_pass_ms": 1e3 * statistics.median(plain),
        "streamed_prompt_pass_ms": 1e3 * statistics.median(streamed),
        "streaming_cost_percent": 100 * (statistics.median(ratios) - 1),
    }
