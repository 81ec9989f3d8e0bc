"""What `validate` serves, and what the simulator is told of it: cases, and overheads out of a run's records; pure."""

from collections.abc import Iterator, Sequence
from dataclasses import astuple, dataclass, field, replace
from itertools import pairwise
from statistics import mean
from typing import Any

import numpy as np

from dejavu.config import PipelineShape, ServeConfig, make_config
from dejavu.engine.sizing import ITEM_BYTES
from dejavu.measure.records import StepRecord
from dejavu.model.table import MODELS
from dejavu.planning.lengths import Lengths
from dejavu.planning.result import Result
from dejavu.planning.setup import PipelineSetup, Setup, Swap
from dejavu.planning.simulator import simulate
from dejavu.planning.times import FixedTimes
from dejavu.request import Completion, Request, SamplingParams

START_S = 0.1  # the first arrival: every rank is at its place by then
ROW_LEN = 1024
SHORT, LONG = (8, 48), (64, 600)  # prompt tokens, from … to
OUTPUTS = (8, 26)


@dataclass(frozen=True, slots=True)
class Case:
    """Describe one configuration and what it is to serve.

    `load` 0 lets all requests arrive at once; otherwise they arrive by chance, at this part of the throughput that the
    configuration has when they do not.
    """

    name: str
    keys: dict[str, Any] = field(default_factory=dict)
    load: float = 0.0
    prompts: tuple[int, int] = SHORT

    def config(self, times_ms: tuple[float, float]) -> ServeConfig:
        """Make the engine's configuration, with stages that wait."""
        return make_config({"synthetic": times_ms, "row_len": ROW_LEN, "num_requests": 1, **self.keys})


SWAPPED = {"model": "opt-13b", "load_format": "dummy", "dtype": "float16", "num_microbatches": 4, "swap": True}

CASES = (
    Case("pp1", {"pp": 1, "microbatch_size": 4}),
    Case("pp1-microbatches-poisson", {"pp": 1, "num_microbatches": 3, "microbatch_size": 2}, load=0.7),
    Case("pp2", {"pp": 2, "microbatch_size": 2}),
    Case("pp2-long-poisson", {"pp": 2, "microbatch_size": 3, "max_prompt_tokens": 700}, load=0.7, prompts=LONG),
    Case("pp3", {"pp": 3, "microbatch_size": 2}),
    Case("pp4-microbatches", {"pp": 4, "num_microbatches": 5, "microbatch_size": 1}),
    Case("pp4-chunked-long", {"pp": 4, "microbatch_size": 3, "prompt_chunk": 128}, prompts=LONG),
    Case("dp2-pp2", {"dp": 2, "pp": 2, "microbatch_size": 2}),
    Case("dp4-poisson", {"dp": 4, "microbatch_size": 1}, load=0.7),
    Case("prompt1-token3", {"prompt_pp": 1, "token_pp": 3, "microbatch_size": 2, "prompt_microbatch_size": 1}),
    Case(
        "prompt2-token1-held-back",
        {"prompt_pp": 2, "token_pp": 1, "microbatch_size": 3, "prompt_microbatch_size": 2, "handover_rows": 1},
    ),
    Case(
        "prompt1-token2-poisson",
        {"prompt_pp": 1, "token_pp": 2, "microbatch_size": 3, "prompt_microbatch_size": 2},
        load=0.7,
    ),
    Case("pp3-swapped", SWAPPED | {"pp": 3, "microbatch_size": 2, "synthetic_link": "4G"}),
    Case("pp3-swapped-slow-link", SWAPPED | {"pp": 3, "microbatch_size": 2, "synthetic_link": "500M"}),
    Case("prompt1-token2-swapped", SWAPPED | {"prompt_pp": 1, "token_pp": 2, "synthetic_link": "1G"}),
)

WAIVED = {
    "recovery": "waived: all engines here share a job, which would lack the killed rank from then on; "
    "the simulator's is checked by hand in tests/planning",
}


@dataclass(frozen=True, slots=True)
class Overheads:
    """Hold what the machine adds to the stages' own times, in seconds.

    `prompt_s` and `token_s` keep a stage busy with each pass, `gap_s` of them after its end; `hop_s` goes by from one
    stage to the next and back to the first, `admission_s` from the moment a request gets a row until the first stage
    can begin with it.
    """

    prompt_s: float = 0.0
    token_s: float = 0.0
    hop_s: float = 0.0
    admission_s: float = 0.0
    gap_s: float = 0.0

    def with_passes(
        self, steps: Sequence[StepRecord], times_ms: tuple[float, float], *, chunked: bool = False
    ) -> "Overheads":
        """Take the time of passes from other records, where these have passes of a kind.

        Passes with `chunked` prompts last as long as their chunks: they are taken to need what token steps need.
        """
        prompts = [step for step in steps if step.kind != "token"]
        tokens = [step for step in steps if step.kind == "token"]
        prompt_s, token_s = self.prompt_s, self.token_s
        if prompts:
            prompt_s = max(0.0, own_s(prompts) + self.gap_s - times_ms[0] / 1e3)
        if tokens:
            token_s = max(0.0, own_s(tokens) + self.gap_s - times_ms[1] / 1e3)
        return replace(self, prompt_s=token_s if chunked else prompt_s, token_s=token_s)

    @classmethod
    def average(cls, measured: Sequence["Overheads"]) -> "Overheads":
        """Average over several calibrations."""
        return cls(*(mean(values) for values in zip(*[astuple(each) for each in measured], strict=True)))


def draw_requests(case: Case, times_ms: tuple[float, float], count: int, seed: int) -> list[Lengths]:
    """Draw a case's requests; the first one arrives at START_S.

    Outputs differ in length as far as they can. Where two equal requests side by side in two pipelines end in the same
    moment, it is a matter of microseconds which pipeline gets the next one, and nobody could predict that.
    """
    generator = np.random.default_rng(seed)
    prompts = generator.integers(*case.prompts, count).tolist()
    lengths = range(*OUTPUTS)
    outputs = np.concatenate([generator.permutation(lengths) for _ in range(-(-count // len(lengths)))])[
        :count
    ].tolist()
    requests = [Lengths(prompt, output, START_S) for prompt, output in zip(prompts, outputs, strict=True)]
    if not case.load:
        return requests
    rate = case.load * predict(case.config(times_ms), requests, Overheads()).requests_per_s
    gaps = generator.exponential(1 / rate, count)
    arrivals = START_S + np.cumsum(gaps) - gaps[0]
    return [request._replace(arrival_s=at) for request, at in zip(requests, arrivals.tolist(), strict=True)]


def predict(config: ServeConfig, requests: Sequence[Lengths], overheads: Overheads) -> Result:
    """Simulate what the engine does with a configuration of synthetic stages."""
    return simulate(simulated(config, overheads), requests)


def simulated(config: ServeConfig, overheads: Overheads) -> Setup:
    """Describe a configuration to the simulator."""
    assert config.synthetic is not None
    prompt_ms, token_ms = config.synthetic
    times = FixedTimes(prompt_ms / 1e3, token_ms / 1e3 + overheads.token_s, overheads.prompt_s)
    return Setup(
        tuple(pipeline(config, shape, times, overheads.hop_s) for shape in config.pipeline_shapes),
        admission_s=overheads.admission_s,
        prompt_ahead=config.num_handover_rows if config.is_disaggregated else None,
    )


def pipeline(config: ServeConfig, shape: PipelineShape, times: FixedTimes, hop_s: float) -> PipelineSetup:
    """Describe one pipeline to the simulator."""
    return PipelineSetup(
        shape.pp,
        times,
        shape.role,
        microbatches=shape.num_microbatches,
        rows=shape.microbatch_size,
        prompt_chunk=config.prompt_chunk,
        max_prompt_tokens=config.max_prompt_tokens,
        hop_s=hop_s,
        swap=swap_of(config, shape),
    )


def swap_of(config: ServeConfig, shape: PipelineShape) -> Swap | None:
    """Describe the swapping of a pipeline to the simulator."""
    if not config.resident_of(shape):
        return None
    assert config.synthetic_link
    spec = MODELS[config.model]
    layers = -(-spec.num_layers // shape.pp)
    token_bytes = spec.kv_bytes_per_token(ITEM_BYTES[config.dtype], layers, shape.tp)
    return Swap(token_bytes, config.synthetic_link, config.resident)


def make_requests(lengths: Sequence[Lengths]) -> list[Request]:
    """Make requests of these lengths, each prompt of one token of its own."""
    return [
        Request(
            str(index),
            (index % 100 + 1,) * each.prompt_tokens,
            SamplingParams(max_tokens=each.output_tokens, ignore_eos=True),
            each.arrival_s,
        )
        for index, each in enumerate(lengths)
    ]


def count_wrong(completions: Sequence[Completion], vocab_size: int) -> int:
    """Count the tokens that are missing, or are not what a synthetic stage makes of the token before."""
    wrong = 0
    for completion in completions:
        last, position = completion.request.prompt_token_ids[-1], len(completion.request.prompt_token_ids)
        wrong += abs(completion.request.sampling.max_tokens - len(completion.token_ids))
        for place, token in enumerate(completion.token_ids, position):
            wrong += token != (last * 31 + place * 17 + 7) % vocab_size
            last = token
    return wrong


def calibration(num_workers: int) -> Case:
    """Give a pipeline of so many stages, at least two, that can be kept busy."""
    stages = max(2, num_workers)
    return Case("calibration", {"pp": stages, "num_microbatches": stages + 2, "microbatch_size": 2})


def calibration_requests(case: Case, times_ms: tuple[float, float], turns: int = 3, tokens: int = 4) -> list[Lengths]:
    """Give requests that come one by one to idle stages, then as many at once as keep all stages busy."""
    stages, rows = case.keys["pp"], case.config(times_ms).pipeline_shapes[0].num_rows
    gap_s = 1.3 * stages * (times_ms[0] + tokens * times_ms[1]) / 1e3
    lone = [Lengths(16, tokens, START_S + gap_s * turn) for turn in range(turns)]
    return lone + [Lengths(16, 3 * tokens, START_S + gap_s * turns)] * rows


def measure_overheads(
    steps: Sequence[StepRecord], completions: Sequence[Completion], times_ms: tuple[float, float]
) -> Overheads:
    """Work the overheads out of a calibration run, as means.

    A pass keeps its stage busy from its start to its end, and then for the least time to the next one's start. A lone
    request's turn through the stages takes longer than its passes: that is the hops. Its first pass begins some time
    after it got its row.
    """
    crowd_s = max(completion.request.arrival_s for completion in completions)
    stages = sorted({step.stage for step in steps})
    gap_s = mean(least_gap_s([step for step in steps if step.stage == stage]) for stage in stages)
    lone = [step for step in steps if step.start_s < crowd_s]
    turn_s = mean(turns_s([step for step in lone if step.stage == stages[0]]))
    firsts = [step.start_s for step in lone if (step.stage, step.kind) == (stages[0], "prompt")]
    seated = [completion.admitted_s for completion in completions if completion.request.arrival_s < crowd_s]
    lone_s = own_s([step for step in lone if step.kind == "token"])
    around = Overheads(
        hop_s=max(0.0, turn_s / len(stages) - lone_s - gap_s),
        admission_s=max(0.0, mean(at - admitted for at, admitted in zip(firsts, seated, strict=True))),
        gap_s=gap_s,
    )
    return around.with_passes(steps, times_ms)


def least_gap_s(steps: Sequence[StepRecord]) -> float:
    """Give the tenth percentile of the times from the end of one stage's pass to the start of its next."""
    ordered = sorted(steps, key=lambda step: step.start_s)
    return float(np.percentile([after.start_s - before.end_s for before, after in pairwise(ordered)], 10))


def turns_s(steps: Sequence[StepRecord]) -> list[float]:
    """Give the times from the start of one token pass to that of the next."""
    ordered = sorted(steps, key=lambda step: step.start_s)
    pairs = pairwise(ordered)
    return [after.start_s - before.start_s for before, after in pairs if before.kind == after.kind == "token"]


def own_s(steps: Sequence[StepRecord]) -> float:
    """Give how long stages themselves were at a pass, in the mean, without waiting for swapped KV."""
    return mean(step.end_s - step.start_s - step.swap_stall_ms / 1e3 for step in steps)


def compare(result: Result, completions: Sequence[Completion]) -> dict[str, float]:
    """Give measured beside predicted; differences are of the prediction, in percent of what was measured."""
    arrived = min(completion.request.arrival_s for completion in completions)
    makespan_s = max(completion.finish_s for completion in completions) - arrived
    measured = {
        "requests_per_s": len(completions) / makespan_s,
        "p95_normalized_latency_s": float(np.percentile([each.normalized_latency_s for each in completions], 95)),
        "makespan_s": makespan_s,
    }
    predicted = {
        "requests_per_s": result.requests_per_s,
        "p95_normalized_latency_s": float(np.percentile(result.latency_per_token_s, 95)),
        "makespan_s": result.makespan_s,
    }
    return dict(columns(measured, predicted))


def compare_requests(case: Case, result: Result, completions: Sequence[Completion]) -> Iterator[dict[str, Any]]:
    """Give a row for each request: when it got a row, its first and its last token, measured and predicted."""
    for index, each in enumerate(completions):
        row: dict[str, Any] = {"configuration": case.name, "request": each.request.request_id}
        row |= {"prompt_tokens": len(each.request.prompt_token_ids), "output_tokens": len(each.token_ids)}
        row["arrival_s"] = each.request.arrival_s
        for name in ("admitted_s", "first_token_s", "finish_s"):
            row |= {name: getattr(each, name), f"predicted_{name}": float(getattr(result, name)[index])}
        yield row


def columns(measured: dict[str, float], predicted: dict[str, float]) -> Iterator[tuple[str, float]]:
    """Put three columns for each quantity."""
    for name, value in measured.items():
        yield name, value
        yield f"predicted_{name}", predicted[name]
        yield f"{name}_difference_percent", 100 * (predicted[name] / value - 1)
