"""Split machines into prompt and token pipelines by the closed form of the DéjàVu paper (section 4.2.1, Appendix A).

Symbols: D machines, Y the time of a prompt pass and t of a token pass through the whole model, N output tokens, m the
slow-down of the prompt pass from streaming, L layers, w0 the weights and c0 the KV of one layer.
"""

from dataclasses import dataclass, fields
from fractions import Fraction
from math import ceil

from dejavu.errors import CapacityError, UsageError

GB = 10**9


@dataclass(frozen=True, slots=True)
class PaperInputs:
    """Hold what the closed form depends on. `devices` are pipeline stages, each a machine with `devices_per_machine`
    accelerators of `memory_gb` (1e9 bytes); times are of a whole pass over all layers on all of them.
    """

    devices: int
    memory_gb: float
    prompt_len: int
    output_len: int
    batch: int
    prompt_ms: float
    token_ms: float
    layers: int
    attention_size: int
    layer_params: int
    devices_per_machine: int = 1
    dtype_bytes: int = 2
    stream_slowdown: float = 1.0

    def __post_init__(self) -> None:
        for field in fields(self):
            value = getattr(self, field.name)
            if not 0 < value < float("inf"):
                option = "--" + field.name.replace("_", "-")
                raise UsageError(f"{option} {value:g} is impossible: give a finite number above 0")
        if self.stream_slowdown < 1:
            raise UsageError(f"--stream-slowdown {self.stream_slowdown:g} would speed prompts up: give 1 or more")


@dataclass(frozen=True, slots=True)
class PaperPlan:
    """Hold the split, the least that fits, and the time per microbatch (ms) with and without disaggregation."""

    prompt_devices: int
    token_devices: int
    min_prompt_devices: int
    min_token_devices: int
    pays: bool
    colocated_ms: float
    disaggregated_ms: float

    @property
    def speedup(self) -> float:
        """Give the predicted gain of disaggregation."""
        return self.colocated_ms / self.disaggregated_ms


def plan_paper(inputs: PaperInputs) -> PaperPlan:
    """Split the machines; raise CapacityError saying why where no split is valid."""
    least_prompt, least_token = min_prompt_devices(inputs), min_token_devices(inputs)
    token_devices = ceil(ideal_token_devices(inputs))
    prompt_devices = inputs.devices - token_devices
    check_split(inputs, (prompt_devices, token_devices), (least_prompt, least_token))
    prompt_ms = inputs.stream_slowdown * inputs.devices * inputs.prompt_ms / prompt_devices
    token_ms = inputs.output_len * inputs.devices * inputs.token_ms / token_devices
    return PaperPlan(
        prompt_devices,
        token_devices,
        least_prompt,
        least_token,
        disaggregation_pays(inputs),
        colocated_ms(inputs),
        max(prompt_ms, token_ms),
    )


def exact(value: float) -> Fraction:
    """Take a number as the decimal that it was written as, so that a ceiling is not off by a rounding."""
    return Fraction(str(value))


def ideal_token_devices(inputs: PaperInputs) -> Fraction:
    """Give D_t = D·N·t / (m·Y + N·t), at which both sides take equally long."""
    tokens = inputs.output_len * exact(inputs.token_ms)
    return inputs.devices * tokens / (exact(inputs.stream_slowdown) * exact(inputs.prompt_ms) + tokens)


def colocated_ms(inputs: PaperInputs) -> float:
    """Give the time per microbatch without disaggregation: Y + N·t + (D-1)(Y-t)/D, bubbles included."""
    prompt, token, devices = inputs.prompt_ms, inputs.token_ms, inputs.devices
    return prompt + inputs.output_len * token + (devices - 1) * (prompt - token) / devices


def disaggregation_pays(inputs: PaperInputs) -> bool:
    """Tell whether Y/t > (D-1) / (D(2-m) - 1); it never does where streaming costs too much (D(2-m) ≤ 1)."""
    margin = inputs.devices * (2 - exact(inputs.stream_slowdown)) - 1
    return margin > 0 and exact(inputs.prompt_ms) * margin > exact(inputs.token_ms) * (inputs.devices - 1)


def machine_bytes(inputs: PaperInputs) -> Fraction:
    """Give M, the memory of one machine."""
    return exact(inputs.memory_gb) * GB * inputs.devices_per_machine


def kv_bytes(inputs: PaperInputs, tokens: int) -> int:
    """Give the KV of one layer for a batch: 2 · tokens · b · a · f."""
    return 2 * tokens * inputs.batch * inputs.attention_size * inputs.dtype_bytes


def min_prompt_devices(inputs: PaperInputs) -> int:
    """Give ceil(L / floor(M / (c0 + w0))); raise CapacityError where not even one layer fits."""
    layer_bytes = kv_bytes(inputs, inputs.prompt_len) + inputs.layer_params * inputs.dtype_bytes
    per_machine = machine_bytes(inputs) // layer_bytes
    if per_machine < 1:
        raise CapacityError(
            f"no split fits: one layer and its prompt KV take {layer_bytes / GB:.2f} GB and a machine has "
            f"{float(machine_bytes(inputs)) / GB:g} GB: lower --batch or give more memory"
        )
    return ceil(Fraction(inputs.layers, per_machine))


def min_token_devices(inputs: PaperInputs) -> int:
    """Give ceil(L / floor((M - L·2(P+N)·b·a·f) / w0)); raise CapacityError where the KV leaves no room for a layer."""
    kv = inputs.layers * kv_bytes(inputs, inputs.prompt_len + inputs.output_len)
    per_machine = (machine_bytes(inputs) - kv) // (inputs.layer_params * inputs.dtype_bytes)
    if per_machine < 1:
        raise CapacityError(
            f"no split fits: the KV of a token machine takes {kv / GB:.2f} GB of its "
            f"{float(machine_bytes(inputs)) / GB:g} GB, which leaves no room for a layer: "
            "lower --batch or give more memory"
        )
    return ceil(Fraction(inputs.layers, per_machine))


def check_split(inputs: PaperInputs, split: tuple[int, int], least: tuple[int, int]) -> None:
    """Raise CapacityError where a side has no machine, or too few for its weights and KV."""
    prompt, token = split
    if prompt < 1:
        raise CapacityError(
            f"no valid split: {inputs.devices} devices balance at {token} for tokens, which leaves none for prompts: "
            "give more --devices, or serve colocated"
        )
    for side, have, need in zip(("prompts", "tokens"), split, least, strict=True):
        if have < need:
            raise CapacityError(
                f"no valid split: {prompt} prompt + {token} token devices balance, but memory asks for at least "
                f"{need} for {side}: give more --devices or --memory-gb, or lower --batch"
            )
