"""Ways to share worker ranks out between prompts and tokens, as the engine runs them and as the simulator has them."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from dejavu.config import ServeConfig, make_config
from dejavu.errors import UsageError
from dejavu.planning.lengths import Lengths
from dejavu.planning.paper import PaperInputs, ideal_token_devices
from dejavu.planning.setup import PipelineRole, PipelineSetup, Setup
from dejavu.planning.times import FixedTimes

from .passes import PassTimes

OTHERS = CHUNKED, DATA_PARALLEL = "chunked", "data-parallel"
ENOUGH_GB = 1e6  # memory is no matter of this split: the engine checks it


@dataclass(frozen=True, slots=True)
class Times:
    """Give the times of a prompt pass and of a token step through the whole model, seconds."""

    prompt_s: float
    token_s: float

    def part(self, stages: int) -> PassTimes:
        """Give the times of one of `stages` equal stages, without any overhead."""
        return PassTimes(self.prompt_s / stages, self.token_s / stages)


@dataclass(frozen=True, slots=True)
class Arrangement:
    """Say how ranks are used: `prompt_stages` 0 is colocated, `chunk` 0 runs whole prompts."""

    name: str
    stages: int  # of each colocated pipeline, or of the token pipeline
    replicas: int = 1
    prompt_stages: int = 0
    chunk: int = 0

    @property
    def depths(self) -> tuple[int, ...]:
        """Give the stages of each pipeline, in the order of their ranks."""
        return (self.prompt_stages, self.stages) if self.prompt_stages else (self.stages,) * self.replicas

    @property
    def roles(self) -> tuple[PipelineRole, ...]:
        """Give the role of each pipeline."""
        if self.prompt_stages:
            return "prompt", "token"
        return tuple("both" for _ in range(self.replicas))

    def config(self, fixed: dict[str, Any], times: Times | None, token_rows: int = 0) -> ServeConfig:
        """Make the engine's configuration; with `times` stages wait so long instead of computing.

        `token_rows` are those of a microbatch of the token pipeline alone; 0 is as anywhere.
        """
        shape: dict[str, Any] = {"prompt_chunk": self.chunk}
        if self.prompt_stages:
            shape |= {"prompt_pp": self.prompt_stages, "token_pp": self.stages}
            shape["prompt_microbatch_size"] = fixed.get("prompt_microbatch_size") or fixed["microbatch_size"]
            shape["microbatch_size"] = token_rows or fixed["microbatch_size"]
        else:
            shape |= {"pp": self.stages, "dp": self.replicas}
        if times:
            prompt_s = times.prompt_s / (self.prompt_stages or self.stages)
            shape["synthetic"] = (1e3 * prompt_s, 1e3 * times.token_s / self.stages)
        return make_config({**fixed, **shape})

    def simulated(
        self, config: ServeConfig, passes: Sequence[PassTimes], admission_s: float, cache_s: float = 0.0
    ) -> Setup:
        """Describe the arrangement to the simulator, with the times of each pipeline's passes, chunks' included."""
        chunks = -(-config.prompt_len // self.chunk) if self.chunk else 1
        pipelines = tuple(
            PipelineSetup(
                depth,
                FixedTimes(times.prompt_s * chunks, times.token_s),
                role,
                rows=shape.microbatch_size,
                prompt_chunk=config.prompt_chunk,
                max_prompt_tokens=config.max_prompt_tokens,
                hop_s=times.hop_s,
            )
            for depth, role, times, shape in zip(self.depths, self.roles, passes, config.pipeline_shapes, strict=True)
        )
        ahead = config.num_handover_rows if self.prompt_stages else None
        return Setup(pipelines, cache_s=cache_s, admission_s=admission_s, prompt_ahead=ahead)


def colocated_arrangements(workers: int, replicas: int, chunk: int) -> list[Arrangement]:
    """Give those whose pipelines do both, the paper's baseline first."""
    return [
        Arrangement("colocated", workers),
        Arrangement(CHUNKED, workers, chunk=chunk),
        Arrangement(DATA_PARALLEL, workers // replicas, replicas),
    ]


def disaggregated(split: tuple[int, int]) -> Arrangement:
    """Give a prompt pipeline beside a token pipeline."""
    prompt, token = split
    return Arrangement("disaggregated", token, prompt_stages=prompt)


def parse_split(text: str, workers: int) -> tuple[int, int]:
    """Read prompt and token stages such as 1,3."""
    try:
        prompt, token = (int(part) for part in text.split(","))
    except ValueError:
        prompt = token = 0
    if min(prompt, token) < 1 or prompt + token != workers:
        raise UsageError(f"--split {text!r}: give prompt and token stages that make up {workers} workers, such as 1,3")
    return prompt, token


def plan_split(workers: int, batch: int, prompt_len: int, mean_steps: float, times: Times) -> tuple[int, int]:
    """Split workers by the paper's closed form (section 4.2.1), each side having one at least.

    A batch of prompts takes as many passes as it has prompts; `mean_steps` are the token steps of a request.
    """
    inputs = PaperInputs(
        devices=workers,
        memory_gb=ENOUGH_GB,
        prompt_len=prompt_len,
        output_len=max(1, round(mean_steps)),
        batch=batch,
        prompt_ms=1e3 * batch * times.prompt_s,
        token_ms=1e3 * times.token_s,
        layers=workers,
        attention_size=1,
        layer_params=1,
    )
    token = min(workers - 1, max(1, -(-ideal_token_devices(inputs) // 1)))
    return workers - token, token


def closed_form_makespan(
    arrangement: Arrangement, rows: int, requests: Sequence[Lengths], times: Times
) -> float | None:
    """Give the makespan of equal requests that all arrive at once, without any overhead, or None where none is known.

    A colocated pipeline of depth D serves D microbatches in Y + N·t + (D-1)|Y-t|/D (the paper, section 4.2.1: the last
    term is the bubbles), Y being the time of all prompts of a microbatch, one pass each, and N token steps; the last
    microbatch ends (D-1)·t/D after the first.
    """
    outputs = {request.output_tokens for request in requests}
    if len(outputs) > 1 or any(request.arrival_s for request in requests) or arrangement.chunk:
        return None
    steps = outputs.pop() - 1
    if arrangement.prompt_stages:
        return split_makespan(arrangement, len(requests), steps, times) if rows == 1 else None
    depth = arrangement.stages
    cycles, rest = divmod(len(requests), depth * rows * arrangement.replicas)
    if rest:
        return None
    bubbles_s = (depth - 1) * abs(times.prompt_s - times.token_s) / depth
    cycle_s = rows * times.prompt_s + steps * times.token_s + bubbles_s
    return cycles * cycle_s + (depth - 1) * times.token_s / depth


def split_makespan(arrangement: Arrangement, count: int, steps: int, times: Times) -> float:
    """Give the makespan of two pipelines with a request for each token stage: prompts, or tokens, hold it up.

    Prompt i is done at Y·(1 + i/P), and its token row is free when the request T places before it has ended.
    """
    every_s = times.prompt_s / arrangement.prompt_stages
    ends: list[float] = []
    for index in range(count):
        prompt_end_s = times.prompt_s + index * every_s
        free_s = ends[index - arrangement.stages] if index >= arrangement.stages else 0.0
        ends.append(max(prompt_end_s, free_s) + steps * times.token_s)
    return max(ends)
