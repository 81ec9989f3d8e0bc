"""Say in words what a run was: its model, its pipelines, its workload."""

from collections.abc import Iterator, Mapping
from math import isnan
from typing import Any

from dejavu.config import ServeConfig
from dejavu.measure.failures import FailureRecord
from dejavu.measure.render import format_bytes, format_seconds

SAID_ELSEWHERE = frozenset({"progress", "out", "name"})


def sentences(config: Mapping[str, Any], description: Mapping[str, Any]) -> list[str]:
    """Give a serving run's configuration as sentences; a benchmark's options as one."""
    if "microbatch_size" not in config or "pp" not in config:
        return [", ".join(f"{name} {value}" for name, value in config.items() if value is not None) or "no options"]
    return [model_sentence(config, description), *pipeline_sentences(config), workload_sentence(config)]


def model_sentence(config: Mapping[str, Any], description: Mapping[str, Any]) -> str:
    """Name the model, its number format and where its weights came from."""
    if config.get("synthetic"):
        prompt_ms, token_ms = config["synthetic"]
        return f"Stages wait instead of computing: {prompt_ms:g} ms a prompt pass, {token_ms:g} ms a token step."
    weights = {"dummy": "random weights", "auto": "its own weights"}.get(str(config.get("load_format")), "weights read")
    return f"Model {config['model']} in {description.get('dtype', config.get('dtype'))}, {weights}."


def pipeline_sentences(config: Mapping[str, Any]) -> Iterator[str]:
    """Describe the pipelines, and how KV moves between them."""
    if config.get("prompt_pp"):
        prompt_tp, token_tp = (config.get(key) or config["tp"] for key in ("prompt_tp", "token_tp"))
        yield (
            f"Disaggregated: {stages(config['prompt_pp'], prompt_tp)} for prompts, "
            f"{stages(config['token_pp'], token_tp)} for tokens; KV moves over {config['transport']}, "
            f"{config['stream_level']}."
        )
    else:
        copies = f"{config['dp']} pipelines" if config.get("dp", 1) > 1 else "One pipeline"
        chunk = config.get("prompt_chunk")
        prompts = f"prompts in chunks of {chunk} tokens" if chunk else "whole prompts"
        yield f"{copies} of {stages(config['pp'], config['tp'])} for prompts and tokens, {prompts}."
    count = config.get("num_microbatches") or config.get("token_pp") or config["pp"]
    memory = f", KV memory {format_bytes(config['kv_memory'])} a worker" if config.get("kv_memory") else ""
    yield f"{count} microbatch{'es' * (count > 1)} of {config['microbatch_size']} rows{memory}."
    yield from resilience_sentences(config)


def resilience_sentences(config: Mapping[str, Any]) -> Iterator[str]:
    """Describe swapping, replicas and spares, where there are any."""
    if config.get("swap"):
        yield f"Microbatches are swapped: the KV of {config['resident']} at a time is on the device."
    if config.get("replicate", "off") != "off":
        yield f"KV is replicated to the next stage's host memory, every {config['replicate_every']} steps."
    if config.get("spares"):
        yield f"Spare ranks: {config['spares']}."


def stages(pp: int, tp: int) -> str:
    """Count stages and the ranks of each."""
    return f"{pp} stage{'s' * (pp > 1)}" + (f" of {tp} tensor ranks" if tp > 1 else "")


def workload_sentence(config: Mapping[str, Any]) -> str:
    """Describe the requests and how they came."""
    rate = config.get("rate")
    arrivals = f"at {rate:g} requests a second (Poisson)" if rate else "as the workload says, or all at once"
    if config.get("workload"):
        return f"Requests from {config['workload']}, {arrivals}."
    made = (
        f"{config['num_requests']} requests of {config['prompt_len']} prompt and {config['output_len']} output tokens"
    )
    return f"{made}, {arrivals if rate else 'all at once'}."


def changed_options(config: Mapping[str, Any]) -> dict[str, Any]:
    """Give the options that differ from their defaults."""
    defaults = {name: field.default for name, field in ServeConfig.model_fields.items()}
    return {
        name: value
        for name, value in config.items()
        if name not in SAID_ELSEWHERE and (name not in defaults or defaults[name] != value)
    }


def failure_sentence(record: FailureRecord) -> str:
    """Tell one failure: who was lost, how long each part of the recovery took, what it cost."""
    start_s = record.detected_s if isnan(record.injected_s) else record.injected_s
    lost = {"death": "died", "hang": "hung"}[record.kind]
    moments = {"noticed": record.detected_s, "rebuilt": record.rebuilt_s, "serving again": record.resumed_s}
    times = [f"{what} after {format_seconds(moment - start_s)}" for what, moment in moments.items() if moment > start_s]
    costs = f"{record.steps_lost} steps lost, {record.tokens_replayed} tokens passed again, "
    costs += f"{record.prompts_recomputed} prompts computed again"
    restored = f", {format_bytes(record.bytes_restored)} of KV restored" if record.bytes_restored else ""
    return f"{record.target} (rank {record.rank}) {lost} at {start_s:.2f} s: {', '.join(times)}. {costs}{restored}."
