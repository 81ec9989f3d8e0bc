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
    if not is_serving(config):
        return [", ".join(f"{name} {value}" for name, value in config.items() if value is not None) or "no options"]
    return [model_sentence(config, description), *pipeline_sentences(config), workload_sentence(config)]


def is_serving(config: Mapping[str, Any]) -> bool:
    """Tell a serving run's configuration from a benchmark's options."""
    return "microbatch_size" in config and "pp" in config


def brief(config: Mapping[str, Any]) -> str:
    """Give a run's configuration in a few words, for a line of a list."""
    if not is_serving(config):
        return ", ".join(f"{name} {value}" for name, value in config.items() if value is not None)
    synthetic = config.get("synthetic")
    parts = ["stages that wait {:g} and {:g} ms".format(*synthetic) if synthetic else str(config["model"])]
    parts.append(
        f"{config['prompt_pp']} + {config['token_pp']} stages" if config.get("prompt_pp") else f"pp {config['pp']}"
    )
    parts += [f"{name} {config[name]}" for name in ("dp", "tp") if config.get(name, 1) > 1]
    parts += [f"chunks of {config['prompt_chunk']}"] if config.get("prompt_chunk") else []
    parts += ["swap"] if config.get("swap") else []
    parts += ["replicas"] if config.get("replicate", "off") != "off" else []
    return ", ".join(parts)


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
    """Describe swapping, what KV is kept in besides, and who replaces a lost rank, where there is any of it."""
    if config.get("swap"):
        yield f"Microbatches are swapped: the KV of {config['resident']} at a time is on the device."
    if config.get("replicate", "off") != "off":
        every = config["replicate_every"]
        yield f"KV is replicated to the next stage's host memory, every {f'{every} steps' if every > 1 else 'step'}."
    if config.get("kv_disk"):
        yield f"KV is kept in files of {config['kv_disk']} too."
    if config.get("spares"):
        yield f"{counted(config['spares'], 'spare rank')} to take over from a lost one."
    if (end := config.get("on_failure", "abort")) != "abort":
        waits = "a new process takes the place of one that is lost" if end == "wait" else "all ranks start again"
        yield f"Without a spare left {waits}."


def stages(pp: int, tp: int) -> str:
    """Count stages and the ranks of each."""
    return counted(pp, "stage") + (f" of {tp} tensor ranks" if tp > 1 else "")


def counted(number: int, thing: str) -> str:
    """Count things, one or several of them."""
    return f"{number} {thing}{'s' * (number != 1)}"


def workload_sentence(config: Mapping[str, Any]) -> str:
    """Describe the requests and how they came."""
    rate = config.get("rate")
    arrivals = f"at {rate:g} requests a second (Poisson)" if rate else "as the workload says, or all at once"
    if config.get("workload"):
        return f"Requests from {config['workload']}, {arrivals}."
    lengths = f"{config['prompt_len']} prompt and {counted(config['output_len'], 'output token')}"
    made = f"{counted(config['num_requests'], 'request')} of {lengths}"
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
    return f"{record.target} (rank {record.rank}) {lost} at {start_s:.2f} s: {', '.join(times)}. {cost_words(record)}"


def cost_words(record: FailureRecord) -> str:
    """Say what a failure cost, or that it cost nothing but time."""
    costs = [
        (record.steps_lost, counted(record.steps_lost, "step") + " lost"),
        (record.tokens_replayed, counted(record.tokens_replayed, "token") + " passed again"),
        (record.prompts_recomputed, counted(record.prompts_recomputed, "prompt") + " computed again"),
        (record.prompts_handed_over, counted(record.prompts_handed_over, "prompt") + " handed over again"),
        (record.bytes_restored, f"{format_bytes(record.bytes_restored)} of KV restored"),
    ]
    said = [words for number, words in costs if number]
    return f"{', '.join(said)}." if said else "Nothing was lost or computed again."
