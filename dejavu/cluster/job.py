"""Check everything about a run that can be checked before a rank loads weights."""

import os
import secrets
from dataclasses import dataclass
from hashlib import blake2b
from pathlib import Path

from dejavu.cluster.allocation import allocated_hosts
from dejavu.cluster.launcher import JOB
from dejavu.config import ServeConfig
from dejavu.device import cuda_device_bytes, cuda_device_name, num_cuda_devices, why_no_cuda
from dejavu.engine.setup import EngineSetup
from dejavu.engine.sizing import choose_cut, choose_row_len, size_caches
from dejavu.errors import ConfigError
from dejavu.model.resolve import ResolvedModel, resolve_model
from dejavu.model.spec import ModelSpec
from dejavu.model.tokenizer import Tokenizer, load_tokenizer
from dejavu.planning.workload import WorkloadItem, make_workload, read_workload, to_requests, with_poisson_arrivals
from dejavu.request import Request, SamplingParams
from dejavu.topology import build_topology, required_ranks


@dataclass(frozen=True, slots=True)
class Job:
    """Hold a checked run and its requests."""

    setup: EngineSetup
    requests: tuple[Request, ...]
    tokenizer: Tokenizer | None


def prepare(config: ServeConfig, world_size: int | None = None) -> Job:
    """Resolve the model and the workload and size everything; raise UsageError where something does not fit."""
    model = resolve_model(config.model, "dummy" if config.synthetic else config.load_format)
    topology = build_topology(config, model.spec, world_size or required_ranks(config))
    check_weights(config, model)
    tokenizer = load_tokenizer(model.directory) if model.directory else None
    requests = to_requests(
        read_items(config),
        tokenizer,
        model.spec.vocab_size,
        seed=config.seed,
        defaults=default_sampling(config),
        max_row_tokens=config.row_len or model.spec.max_positions,
        chat=config.chat,
    )
    row_len = choose_row_len(config, model.spec, requests)
    device = choose_device(config)
    dtype = choose_dtype(config, model, device)
    caches = size_caches(config, model.spec, topology, row_len, dtype, device)
    directory = None if config.load_format == "dummy" else model.directory
    name = os.environ.get(JOB) or secrets.token_hex(16)
    gpu_bytes = [cuda_device_bytes(index) for index in range(num_cuda_devices())] if device == "cuda" else []
    is_spread = config.hostfile or len(set(allocated_hosts(os.environ))) > 1
    cut_at = 0 if is_spread else choose_cut(config, model.spec, topology, caches, dtype, gpu_bytes)
    setup = EngineSetup(
        config,
        model.spec,
        directory,
        topology,
        caches,
        dtype,
        name,
        device,
        len(gpu_bytes),
        cut_at,
        run_id=blake2b(name.encode(), digest_size=8).hexdigest(),
        model_mark=mark_model(model.spec, directory),
    )
    return Job(setup, tuple(requests), tokenizer)


def mark_model(spec: ModelSpec, directory: Path | None) -> str:
    """Give a name for a model's shape and its files, as they are now; without any, of random weights."""
    files = sorted(path for path in directory.iterdir() if path.is_file()) if directory else []
    marks = [(path.name, path.stat().st_size, path.stat().st_mtime_ns) for path in files]
    return blake2b(repr((spec, marks)).encode(), digest_size=8).hexdigest()


def check_weights(config: ServeConfig, model: ResolvedModel) -> None:
    """Check the checkpoint's files and shapes, unless no weights are read."""
    if model.directory and config.load_format != "dummy" and not config.synthetic:
        from dejavu.model.weights import check_checkpoint

        check_checkpoint(model.directory, model.spec)


def read_items(config: ServeConfig) -> list[WorkloadItem]:
    """Read the workload or make one up, with Poisson arrivals where a rate is given."""
    if config.workload:
        items = read_workload(config.workload)
    else:
        items = make_workload(config.num_requests, config.prompt_len, config.output_len)
    return with_poisson_arrivals(items, config.rate, config.seed) if config.rate else items


def default_sampling(config: ServeConfig) -> SamplingParams:
    """Give the sampling of requests that name none."""
    return SamplingParams(
        max_tokens=config.max_tokens, temperature=config.temperature, top_k=config.top_k, top_p=config.top_p
    )


def choose_device(config: ServeConfig) -> str:
    """Give what the workers compute on, "cpu" or "cuda": as asked, or as this host has it; ConfigError if it hasn't."""
    if config.device == "cpu" or config.synthetic:
        if config.device == "cuda":
            raise ConfigError("synthetic stages compute nothing: leave out device cuda")
        return "cpu"
    if config.device == "auto":
        return "cuda" if num_cuda_devices() else "cpu"
    if num_cuda_devices() == 0:
        raise ConfigError(f"device cuda cannot be had: {why_no_cuda()}; use --device cpu")
    return "cuda"


def device_names(config: ServeConfig) -> list[str]:
    """Name the devices that this host's workers take in turn."""
    if choose_device(config) == "cpu":
        return ["cpu"]
    return [f"cuda:{index} {cuda_device_name(index)}" for index in range(num_cuda_devices())]


def choose_dtype(config: ServeConfig, model: ResolvedModel, device: str) -> str:
    """Give the number format: as asked, or the checkpoint's; float16 becomes float32 on a CPU, which computes in it."""
    if config.dtype != "auto":
        return config.dtype
    return "float32" if model.spec.dtype == "float16" and device == "cpu" else model.spec.dtype
