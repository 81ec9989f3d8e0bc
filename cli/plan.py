"""`dejavu plan`: which split of the machine serves a workload best."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import rich_click as click
from click import get_current_context
from click.core import ParameterSource
from rich.console import Console

from dejavu.errors import UsageError

from .tables import row_table, rows_table

HELP = """Work out how to split devices among prompts and tokens.

Searches every layout that fits in memory and scores each by simulating the workload. With --paper it gives the closed
form of the DéjàVu paper instead, in which a device is a machine and one pipeline stage. Ends with one line of JSON."""

COLUMNS = {
    "rank": "#",
    "layout": "layout",
    "tp": "tp",
    "prompt_stages": "prompt",
    "token_stages": "token",
    "replicas": "times",
    "batch": "batch",
    "swap": "swap",
    "score_requests_per_s": "req/s",
    "reason": "why not",
}


@click.command(help=HELP)
@click.option("--devices", type=int, required=True, help="Devices D to share out; with --paper machines (= stages).")
@click.option("--memory-gb", type=float, help="Memory of one device, in 1e9 bytes; a profile may know it.")
@click.option("--devices-per-machine", type=int, default=1, show_default=True, help="Devices in a machine (--paper).")
@click.option("--model", help="Take layers and sizes from this model: a directory, a table name, or an id.")
@click.option("--layers", type=int, help="Layers L of the model.")
@click.option("--attention-size", type=int, help="Numbers a of K (or V) per token and layer.")
@click.option("--layer-params", type=int, help="Numbers in the weights of one layer.")
@click.option("--dtype-bytes", type=int, default=2, show_default=True, help="Bytes f of a number.")
@click.option("--prompt-len", type=int, default=512, show_default=True, help="Prompt tokens P of a request.")
@click.option("--output-len", type=int, default=128, show_default=True, help="Output tokens N of a request.")
@click.option("--batch", type=int, help="Rows b of a microbatch, of which --prompt-ms is [8]; by default searched.")
@click.option("--prompt-ms", type=float, help="Time Y of a prompt pass of the batch through the whole model.")
@click.option("--token-ms", type=float, help="Time t of a token pass through the whole model.")
@click.option("--profile", type=click.Path(path_type=Path), help="Times measured by `dejavu bench profile`, instead.")
@click.option("--stream-slowdown", type=float, default=1.0, show_default=True, help="Slow-down m of prompts.")
@click.option("--host-gbps", type=float, default=0.0, help="Host link bandwidth, GB/s; swapping is tried where known.")
@click.option("--trace", type=click.Path(path_type=Path), help="The workload; equal requests by default.")
@click.option("--num-requests", type=int, default=128, show_default=True, help="Requests to plan for, at most.")
@click.option("--rate", type=float, default=0.0, help="Requests per second (Poisson); 0 is all at once.")
@click.option("--ttft", "ttft_ms", type=float, help="Limit of the time to the first token, ms: plan for goodput.")
@click.option("--tpot", "tpot_ms", type=float, help="Limit of the time per later token, ms: plan for goodput.")
@click.option("--paper", is_flag=True, help="Give the paper's closed form.")
@click.option("--swap", is_flag=True, help="Say whether swapping pays in a pipeline of --devices stages.")
@click.option("--out", type=click.Path(path_type=Path), help="New run directory, with plan.csv and best.yaml.")
def command(**options: Any) -> int:
    """Run the command."""
    if options["swap"]:
        return plan_swapping(options)
    return plan_by_paper(options) if options["paper"] else search(options)


def needed(options: dict[str, Any], *names: str) -> dict[str, Any]:
    """Give options that have to be there; raise UsageError naming the first that is not."""
    for name in names:
        if options[name] is None:
            raise UsageError(f"--{name.replace('_', '-')} is missing: give it, or what it can be worked out from")
    return {name: options[name] for name in names}


def with_model(options: dict[str, Any]) -> dict[str, Any]:
    """Fill layers and sizes in from the model."""
    if not options["model"]:
        return options
    shape = model_shape(options["model"])
    known = {
        "layers": shape.num_layers,
        "attention_size": shape.attention_size,
        "layer_params": shape.layer_params,
    }
    return options | {name: value for name, value in known.items() if options[name] is None}


def model_shape(name: str) -> Any:
    """Weigh a model by its name."""
    from dejavu.model.resolve import resolve_model
    from dejavu.planning.shape import shape_of

    return shape_of(resolve_model(name, "dummy").spec)


def plan_by_paper(options: dict[str, Any]) -> int:
    """Print the closed form's split."""
    from dejavu.planning.paper import PaperInputs, plan_paper
    from dejavu.planning.rows import paper_plan_row

    options = with_model(options)
    names = ("devices", "memory_gb", "prompt_len", "output_len", "prompt_ms", "token_ms", "layers")
    values = needed(options, *names, "attention_size", "layer_params", "devices_per_machine", "dtype_bytes")
    inputs = PaperInputs(**values, batch=default_batch(options), stream_slowdown=options["stream_slowdown"])
    row = paper_plan_row(plan_paper(inputs))
    console = Console()
    console.print(row_table(row, "the paper's closed form"))
    if not row["disaggregation_pays"]:
        console.print("disaggregation does not pay here: Y/t is at most (D-1)/(D(2-m)-1)")
    return finish([row], options["out"])


def plan_swapping(options: dict[str, Any]) -> int:
    """Say whether swapping pays in one fixed memory, which holds --batch rows of each stage's microbatch without."""
    from dejavu.planning.planner import GB
    from dejavu.planning.swapping import SwapCase

    profile = read_profile(options["profile"])
    if profile and not options["model"]:
        options = options | {"model": profile.model}
    shape, stages, batch = make_shape(options), options["devices"], default_batch(options)
    if not 3 <= stages <= shape.num_layers:
        raise UsageError(f"{stages} stages cannot swap: give 3 to {shape.num_layers} --devices, of which two fit")
    larger, host_gbps = stages * batch // 2, host_link(options, profile)
    if not host_gbps:
        raise UsageError("--host-gbps is missing: swapping depends on the host link's bandwidth")
    token = make_times(options, profile, shape.num_layers).stage(stages, 1)
    prompt_len, output_len = options["prompt_len"], options["output_len"]
    case = SwapCase(
        prompt_len,
        output_len,
        larger,
        token.token_s(larger, prompt_len + output_len / 2),
        shape.kv_bytes_per_token(stages, 1, profile.dtype_bytes if profile else options["dtype_bytes"]),
        host_gbps * GB,
        larger / batch,
    )
    console = Console()
    console.print(row_table(case.row(), f"swapping in a pipeline of {stages} stages"))
    console.print(case.verdict())
    return finish([case.row()], options["out"])


def host_link(options: dict[str, Any], profile: Any) -> float:
    """Give the host link's bandwidth in GB/s, as given or as the profile has it; 0 where nobody knows."""
    return float(options["host_gbps"] or (profile.bandwidths_gbps.get("host", 0.0) if profile else 0.0))


def default_batch(options: dict[str, Any]) -> int:
    """Give the batch that times are of."""
    return 8 if options["batch"] is None else int(options["batch"])


def search(options: dict[str, Any]) -> int:
    """Print the ten best layouts."""
    from dejavu.planning.planner import Goal, plan
    from dejavu.planning.rows import plan_rows

    profile = read_profile(options["profile"])
    if profile and not options["model"]:
        options = options | {"model": profile.model}
    task = make_task(options, profile)
    limits = [float("inf") if options[name] is None else options[name] / 1e3 for name in ("ttft_ms", "tpot_ms")]
    found = plan(task, Goal(*limits))
    console = Console()
    rows = plan_rows(found)
    title = f"{len(found.ranked)} layouts of {options['devices']} devices by {found.goal.name}: the best {len(rows)}"
    console.print(rows_table(rows, COLUMNS, title))
    for verdict in found.verdicts:
        console.print(verdict)
    return finish(rows, options["out"], found.best.layout, options["model"])


def make_task(options: dict[str, Any], profile: Any) -> Any:
    """Gather what the search is for."""
    from dejavu.planning.planner import GB, Machine, Task

    shape = make_shape(options)
    if options["memory_gb"] is None and profile and profile.memory_bytes:
        options = options | {"memory_gb": profile.memory_bytes / GB}
    needed(options, "memory_gb")
    batch = {"batches": (options["batch"],)} if options["batch"] else {}
    return Task(
        shape,
        Machine(options["devices"], options["memory_gb"] * GB, host_link(options, profile) * GB),
        make_times(options, profile, shape.num_layers),
        make_requests(options),
        profile.dtype_bytes if profile else options["dtype_bytes"],
        options["stream_slowdown"],
        **batch,
    )


def make_shape(options: dict[str, Any]) -> Any:
    """Weigh the model: by its name, or by the numbers given."""
    from dejavu.planning.shape import ModelShape

    if options["model"]:
        return model_shape(options["model"])
    values = needed(options, "layers", "layer_params", "attention_size")
    return ModelShape(*values.values())


def read_profile(path: Path | None) -> Any:
    """Read the profile, if there is one."""
    from dejavu.planning.profile import load_profile

    return load_profile(path) if path else None


def make_times(options: dict[str, Any], profile: Any, num_layers: int) -> Any:
    """Take times from the profile, or as given."""
    from dejavu.planning.planner import GivenTimes, ProfiledTimes

    if profile:
        return ProfiledTimes(profile, num_layers)
    values = needed(options, "prompt_ms", "token_ms", "prompt_len")
    return GivenTimes(**values, batch=default_batch(options))


def make_requests(options: dict[str, Any]) -> Any:
    """Read the workload, or make up equal requests."""
    from dejavu.planning.lengths import Lengths
    from dejavu.planning.trace import TraceEntry, read_trace, with_rate

    if options["trace"]:
        entries = read_trace(options["trace"], limit=options["num_requests"])
    else:
        entries = [TraceEntry(Lengths(options["prompt_len"], options["output_len"]))] * options["num_requests"]
    if options["rate"]:
        entries = with_rate(entries, options["rate"])
    return tuple(entry.lengths for entry in entries)


def finish(rows: list[dict[str, Any]], out: Path | None, layout: Any = None, model: str | None = None) -> int:
    """Write the files, if asked to, and the last line."""
    from dejavu.planning.rows import json_line, write_rows

    if out:
        with new_run("plan", out):
            write_rows(out / "plan.csv", rows)
            if layout:
                write_profile(out / "best.yaml", layout, model)
    click.echo(json_line("plan", out, rows))
    return 0


def write_profile(path: Path, layout: Any, model: str | None) -> None:
    """Write the best layout as a profile for `dejavu serve`."""
    import yaml

    from dejavu.planning.planner import serve_profile

    path.write_text(yaml.safe_dump(serve_profile(layout, model), sort_keys=False), encoding="utf-8")
    click.echo(f"wrote {path}")


@contextmanager
def new_run(name: str, out: Path) -> Iterator[None]:
    """Make `out` the directory of a run that `dejavu report` shows; ConfigError where that is impossible."""
    from dejavu.measure.environment import describe_run
    from dejavu.measure.run_directory import RunDirectory

    directory = RunDirectory.create(name, out)
    directory.write_run(describe_run(asked_for(), []))
    yield
    directory.write_result("ok", 0)


def asked_for() -> dict[str, Any]:
    """Give the options of the present command line as plain values, without those left at their defaults."""
    context, values = get_current_context(), dict[str, Any]()
    for option in context.command.params:
        name = option.name or ""
        if context.get_parameter_source(name) not in (None, ParameterSource.DEFAULT):
            values[option.opts[0].removeprefix("--").replace("-", "_")] = plain(context.params[name])
    return values


def plain(value: Any) -> Any:
    """Give an option's value for YAML."""
    if isinstance(value, tuple):
        return [plain(item) for item in value]
    return str(value) if isinstance(value, Path) else value
