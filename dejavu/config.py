"""The configuration of a run: one frozen model, read from a YAML profile and from the command line, checked once."""

import difflib
import re
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple, get_args

import yaml
from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field, ValidationError, model_validator

from dejavu.errors import ConfigError

UNITS = {"": 1, "K": 2**10, "M": 2**20, "G": 2**30, "T": 2**40}


def parse_bytes(value: object) -> object:
    """Read a number of bytes such as 1073741824, `512M` or `1.5GiB` (powers of 1024)."""
    if not isinstance(value, str):
        return value
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([KMGT]?)i?B?\s*", value, re.IGNORECASE)
    if not match:
        raise ValueError("write a number of bytes such as 512M or 1.5G")
    return int(float(match[1]) * UNITS[match[2].upper()])


def parse_numbers(value: object) -> object:
    """Read a list of numbers such as `10,11,9`."""
    return [part.strip() for part in value.split(",")] if isinstance(value, str) else value


Bytes = Annotated[int, BeforeValidator(parse_bytes)]
Count = Annotated[int, Field(ge=1)]
Place = Annotated[str, AfterValidator(lambda path: str(Path(path).absolute()))]  # the same from wherever it is resumed


class PipelineShape(NamedTuple):
    """Give one pipeline's stages, tensor ranks, microbatches in flight and rows of each."""

    role: Literal["both", "prompt", "token"]
    pp: int
    tp: int
    num_microbatches: int
    microbatch_size: int

    @property
    def num_rows(self) -> int:
        """Give the number of requests that can be in the pipeline at once."""
        return self.num_microbatches * self.microbatch_size


def option(default: Any, group: str, description: str, **limits: Any) -> Any:
    """Declare a configuration field: its default, the group it is listed under in `--help`, and what it does."""
    return Field(default, description=description, json_schema_extra={"group": group}, **limits)


class ServeConfig(BaseModel):
    """Say everything that a serving run depends on; each field is a command-line option and a profile key."""

    model_config = ConfigDict(frozen=True, extra="forbid", str_strip_whitespace=True, protected_namespaces=())

    model: str = option("demo", "Model", "A directory, a name of the built-in table, or a Hugging Face id.")
    load_format: Literal["auto", "safetensors", "gguf", "dummy"] = option(
        "auto", "Model", "Where weights come from; `dummy` makes random ones from the model's shape."
    )
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = option(
        "auto", "Model", "Number format of weights, activations and KV; `auto` takes the checkpoint's."
    )
    synthetic: Annotated[tuple[float, float], BeforeValidator(parse_numbers)] | None = option(
        None, "Model", "Wait PROMPT_MS,TOKEN_MS in every stage instead of computing, to study schedules on few cores."
    )

    pp: Count = option(1, "Parallelism", "Pipeline stages.")
    tp: Count = option(1, "Parallelism", "Tensor-parallel ranks per stage; has to divide heads, KV heads and FFN.")
    dp: Count = option(1, "Parallelism", "Copies of the pipeline, which share the requests.")
    layers_per_stage: Annotated[tuple[Count, ...], BeforeValidator(parse_numbers)] | None = option(
        None, "Parallelism", "Layers of each stage, such as 8,11,11; even by default."
    )
    device: Literal["auto", "cpu", "cuda"] = option(
        "auto", "Parallelism", "What workers compute on; `auto` takes CUDA where the first host has it, else the CPU."
    )
    threads: int = option(0, "Parallelism", "CPU threads of each worker; 0 shares this host's cores.", ge=0)

    prompt_pp: int = option(0, "Disaggregation", "Stages of a pipeline for prompts alone; goes with --token-pp.", ge=0)
    token_pp: int = option(0, "Disaggregation", "Stages of a pipeline for token generation alone.", ge=0)
    prompt_tp: int = option(0, "Disaggregation", "Tensor ranks per prompt stage; 0 is --tp.", ge=0)
    token_tp: int = option(0, "Disaggregation", "Tensor ranks per token stage; 0 is --tp.", ge=0)
    prompt_microbatch_size: int = option(
        0, "Disaggregation", "Rows of a prompt microbatch; 0 is --microbatch-size.", ge=0
    )
    handover_rows: int = option(
        0,
        "Disaggregation",
        "Requests whose KV may wait on the token side for a row; 0 is as many as fill the prompt side.",
        ge=0,
    )
    transport: Literal["mpi", "ipc", "tcp", "rma", "nccl"] = option(
        "ipc", "Disaggregation", "What carries KV from the prompt stages to the token stages; `nccl` between GPUs."
    )
    stream_level: Literal["naive", "buffered", "layered"] = option(
        "layered", "Disaggregation", "Stream a prompt's KV piece by piece, packed at its end, or layer by layer."
    )

    microbatch_size: Count = option(4, "Scheduling", "Rows of a microbatch.")
    num_microbatches: int = option(0, "Scheduling", "Microbatches in flight; 0 is one per stage, the least.", ge=0)
    row_len: int = option(0, "Scheduling", "Tokens a row holds, prompt and output; 0 fits the workload.", ge=0)
    prompt_chunk: int = option(
        0, "Scheduling", "Cut prompts into chunks of so many tokens, run with token steps; 0 runs whole prompts.", ge=0
    )
    max_prompt_tokens: Count = option(8192, "Scheduling", "Most prompt tokens of one pass; a longer prompt goes alone.")
    block_size: int = option(
        0, "Scheduling", "Tokens of a KV block; 0 is a whole row on a CPU, 32 tokens on a GPU.", ge=0
    )
    kv_memory: Bytes | None = option(
        None, "Scheduling", "KV memory of one worker, such as 512M; by default enough for every row.", ge=1
    )

    replicate: Literal["off", "ring"] = option(
        "off",
        "Failures",
        "Copy each step's KV to the next stage's host memory, so that a lost device or host loses none.",
    )
    replicate_every: Count = option(
        1, "Failures", "Token steps of a microbatch between two copies: fewer bytes, more steps to run again."
    )
    replica_transport: Literal["auto", "tcp", "mpi"] = option(
        "auto", "Failures", "What carries replicas; `auto` is shared memory on one host, and tcp between hosts."
    )
    kv_disk: Place | None = option(
        None,
        "Failures",
        "Keep KV in files of this directory too, for --resume after all processes, or the host's power, were lost.",
    )
    on_failure: Literal["abort", "wait", "respawn"] = option(
        "abort",
        "Failures",
        "Without a spare left `abort` ends the run, `wait` holds requests until a new process has joined, `respawn` "
        "starts all ranks again where they were, as `wait` does too when mpirun itself dies.",
    )
    hang_timeout: float = option(
        10.0, "Failures", "Seconds that a process may stand still, stopped by a signal, before it is ended.", gt=0
    )
    spares: int = option(
        0, "Failures", "Ranks that wait to take the place of one that dies; serving goes on meanwhile.", ge=0
    )

    swap: bool = option(
        False, "Swapping", "Keep the KV of a few microbatches on the device and of all in host memory; not of prompts."
    )
    resident: Count = option(2, "Swapping", "Microbatches whose KV is on the device at a time.")
    host_kv_memory: Bytes | None = option(
        None, "Swapping", "Host memory of one worker for swapped KV; by default enough for every row.", ge=1
    )
    synthetic_link: Bytes | None = option(
        None, "Swapping", "Speed of the host link, each way, that synthetic stages swap over, such as 50G.", ge=1
    )

    workload: str | None = option(
        None, "Workload", "Requests: JSONL lines, or a [[prompt, output(, arrival)], ...] trace."
    )
    num_requests: Count = option(8, "Workload", "Requests to make up where no workload is given.")
    prompt_len: Count = option(32, "Workload", "Prompt tokens of each made-up request.")
    output_len: Count = option(32, "Workload", "Output tokens of each made-up request.")
    rate: float | None = option(
        None, "Workload", "Requests per second, with Poisson arrivals; all at once by default.", gt=0
    )
    chat: bool = option(False, "Workload", "Put each text prompt into the model's chat template.")
    seed: int = option(0, "Workload", "Seed of made-up requests, arrivals and sampling.")
    max_tokens: Count = option(128, "Workload", "Output tokens of a request that names no number.")
    temperature: float = option(
        0.0, "Workload", "Sampling temperature of a request that names none; 0 is greedy.", ge=0
    )
    top_k: int = option(0, "Workload", "Sample among the K likeliest tokens; 0 takes all.", ge=0)
    top_p: float = option(1.0, "Workload", "Sample among the likeliest tokens that reach this probability.", gt=0, le=1)

    out: str | None = option(None, "Run", "The run directory; by default results/runs/TIME-NAME.")
    name: str = option("serve", "Run", "Name of the run, part of its directory.", pattern=r"^[\w.-]+$")
    hostfile: str | None = option(None, "Run", "Hosts for mpirun, one a line: NAME slots=N.")
    progress: bool = option(True, "Run", "Show progress while serving.")
    ttft: float | None = option(
        None, "Run", "Limit of the time to the first token, ms: the summary counts who meets it as goodput.", gt=0
    )
    tpot: float | None = option(
        None, "Run", "Limit of the mean time per later token, ms: the summary counts who meets it as goodput.", gt=0
    )
    stall_timeout: float = option(
        60.0, "Run", "Seconds without any progress after which the run ends with an error.", gt=0
    )
    trace_spans: Count = option(
        100_000, "Run", "Passes, transfers and requests that trace.json has at most, of each the newest so many."
    )

    @model_validator(mode="after")
    def check_pipelines(self) -> "ServeConfig":
        """Check what one field says against another."""
        if (self.prompt_pp > 0) != (self.token_pp > 0):
            given = "prompt_pp" if self.prompt_pp else "token_pp"
            raise ValueError(f"{given} is given alone: disaggregation needs prompt_pp and token_pp")
        if self.is_disaggregated:
            self.check_disaggregated()
        if self.replicate != "off" and self.synthetic:
            raise ValueError(
                f"replicate {self.replicate} has no KV to copy with synthetic stages: leave one of them out"
            )
        if self.kv_disk is not None and self.synthetic:
            raise ValueError(f"kv_disk {self.kv_disk} has no KV to keep with synthetic stages: leave one of them out")
        self.check_swapping()
        depth = self.token_pp or self.pp
        if self.num_microbatches and self.num_microbatches < depth:
            raise ValueError(
                f"num_microbatches {self.num_microbatches} leaves stages idle: use at least the {depth} stages"
            )
        if self.layers_per_stage is not None and len(self.layers_per_stage) != self.pp:
            raise ValueError(
                f"layers_per_stage names {len(self.layers_per_stage)} stages and pp is {self.pp}: "
                "give one number per stage"
            )
        return self

    def check_disaggregated(self) -> None:
        """Refuse what only a colocated pipeline has."""
        for name, other in {"pp": "prompt_pp and token_pp", "dp": "one pair of pipelines"}.items():
            if name in self.model_fields_set and getattr(self, name) > 1:
                raise ValueError(f"{name} is for colocated pipelines: with disaggregation use {other}")
        for name in ("layers_per_stage", "prompt_chunk"):
            if getattr(self, name):
                raise ValueError(f"{name} is for colocated pipelines: leave it out with disaggregation")

    def check_swapping(self) -> None:
        """Refuse what has no meaning without swapping, or a link that is not known."""
        for name in ("resident", "host_kv_memory", "synthetic_link"):
            if getattr(self, name) != type(self).model_fields[name].default and not self.swap:
                raise ValueError(f"{name} is for swapping: give swap too, or leave it out")
        if self.swap and (self.synthetic is None) != (self.synthetic_link is None):
            raise ValueError(
                "synthetic stages swap over a link of synthetic_link bytes per second: give both, or neither"
            )

    def resident_of(self, shape: PipelineShape) -> int:
        """Give the microbatches of a pipeline that are on the device at a time, or 0 where all are, unswapped."""
        swaps = self.swap and shape.role != "prompt" and shape.num_microbatches > self.resident
        return self.resident if swaps else 0

    @property
    def is_disaggregated(self) -> bool:
        """Tell whether prompts have a pipeline of their own."""
        return self.prompt_pp > 0

    @property
    def pipeline_shapes(self) -> tuple[PipelineShape, ...]:
        """Give the shape of each pipeline, in the order of their ranks."""
        if not self.is_disaggregated:
            both = PipelineShape("both", self.pp, self.tp, self.num_microbatches or self.pp, self.microbatch_size)
            return (both,) * self.dp
        prompt_rows = self.prompt_microbatch_size or self.microbatch_size
        return (
            PipelineShape("prompt", self.prompt_pp, self.prompt_tp or self.tp, self.prompt_pp, prompt_rows),
            PipelineShape(
                "token",
                self.token_pp,
                self.token_tp or self.tp,
                self.num_microbatches or self.token_pp,
                self.microbatch_size,
            ),
        )

    @property
    def num_handover_rows(self) -> int:
        """Give the number of requests whose KV may wait on the token side for a row.

        With fewer than the prompt side's rows, its stages stand idle while the token side is full.
        """
        if not self.is_disaggregated:
            return 0
        return self.handover_rows or self.pipeline_shapes[0].num_rows

    @property
    def num_workers(self) -> int:
        """Count the ranks that hold a part of the model."""
        return sum(shape.pp * shape.tp for shape in self.pipeline_shapes)

    def replace(self, **changes: Any) -> "ServeConfig":
        """Make a new, checked configuration with some fields changed."""
        return make_config({**self.model_dump(exclude_unset=True), **changes})


def make_config(values: dict[str, Any], source: str = "the command line") -> ServeConfig:
    """Check `values` and make a configuration; raise ConfigError naming the field, the value and the remedy."""
    values = {key.replace("-", "_"): value for key, value in values.items()}
    for key in values:
        if key not in ServeConfig.model_fields:
            raise ConfigError(f"unknown key {key!r} in {source}{suggestion(key)}")
    try:
        return ServeConfig(**values)
    except ValidationError as error:
        raise ConfigError(describe(error, source)) from None


def suggestion(key: str) -> str:
    """Name the nearest field, or where to find the list."""
    near = difflib.get_close_matches(key, ServeConfig.model_fields, 1)
    return f": did you mean {near[0]!r}?" if near else ": `dejavu serve --help` lists the right ones"


def describe(error: ValidationError, source: str) -> str:
    """Put the first complaint of pydantic into one line."""
    first = error.errors()[0]
    message = first["msg"].removeprefix("Value error, ")
    if not first["loc"]:
        return message
    field = str(first["loc"][0])
    message = message[0].lower() + message[1:]
    return f"{field} {first['input']!r} in {source}: {message}"


def read_profile(path: Path) -> dict[str, Any]:
    """Read a YAML profile into plain values; a workload beside the profile is found there."""
    try:
        values = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"cannot read profile {path}: {error}") from None
    except yaml.YAMLError as error:
        raise ConfigError(f"profile {path} is not YAML: {' '.join(str(error).split())}") from None
    if not isinstance(values, dict):
        raise ConfigError(f"profile {path} holds no mapping of keys to values: write lines such as `pp: 2`")
    values = {str(key).replace("-", "_"): value for key, value in values.items()}
    for key in ("workload", "hostfile", "model"):
        beside = path.parent / str(values.get(key))
        if values.get(key) and beside.exists():
            values[key] = str(beside)
    return values


def load_config(profile: Path | None, overrides: dict[str, Any]) -> ServeConfig:
    """Make the configuration from a profile, if any, and the command line, which wins."""
    values = read_profile(profile) if profile else {}
    if profile:
        make_config(values, str(profile))
    return make_config({**values, **overrides})


def choices(annotation: Any) -> tuple[str, ...]:
    """Give the allowed words of a field that is a Literal, else none."""
    return get_args(annotation) if getattr(annotation, "__origin__", None) is Literal else ()
