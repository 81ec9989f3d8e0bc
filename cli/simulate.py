"""`dejavu simulate`: pipelines, swapping and failures without running a model."""

import os
from collections.abc import Sequence
from dataclasses import asdict
from itertools import accumulate
from pathlib import Path
from typing import Any

import rich_click as click
from rich.console import Console

from dejavu.errors import UsageError

from .plan import make_shape, needed, new_run
from .tables import row_table, rows_table

HELP = """Simulate a workload on pipelines: when each request gets its tokens, and how long stages stand idle.

Give --stages for a colocated pipeline (with --replicas for several behind one queue), or --prompt-stages and
--token-stages for a disaggregated one. Times are of one pass through one stage. Ends with one line of JSON.

By default passes are ordered by time and scheduled as `dejavu serve` does. --paper repeats the simulators of the
DéjàVu paper exactly: the first 512 requests, 2 to 1000 tokens each. --sweep repeats its Appendix B."""

SWEEP_COLUMNS = {
    "machines": "machines",
    "layout": "layout",
    "prompt_stages": "prompt",
    "token_stages": "token",
    "replicas": "times",
    "batch": "batch",
    "makespan_s": "makespan, s",
    "cost": "cost",
    "speedup": "speedup",
}


@click.command(help=HELP)
@click.option("--trace", type=click.Path(path_type=Path), help="Workload; 512 chats of random length by default.")
@click.option("--num-requests", type=int, help="Take so many requests of the trace, or make so many up.")
@click.option("--stages", type=int, help="Stages of a colocated pipeline.")
@click.option("--replicas", type=int, default=1, show_default=True, help="Colocated pipelines behind one queue.")
@click.option("--prompt-stages", type=int, help="Stages of a prompt pipeline.")
@click.option("--token-stages", type=int, help="Stages of a token pipeline.")
@click.option("--prompt-ms", type=float, help="Time of a prompt pass in one stage.")
@click.option("--token-ms", type=float, help="Time of a token step in one stage.")
@click.option(
    "--cache-ms", type=float, default=0.0, show_default=True, help="From a prompt's end to its KV at the token side."
)
@click.option(
    "--rate", type=float, default=0.0, show_default=True, help="Requests per second; 0: as the trace says, or at once."
)
@click.option("--seed", type=int, default=0, show_default=True, help="Seed of made-up requests and arrivals.")
@click.option("--batch", "rows", type=int, default=1, show_default=True, help="Rows of a microbatch.")
@click.option(
    "--microbatches", type=int, default=0, show_default=True, help="Microbatches in flight; 0 is one per stage."
)
@click.option(
    "--prompt-chunk", type=int, default=0, show_default=True, help="Cut prompts into chunks of so many tokens."
)
@click.option("--max-prompt-tokens", type=int, default=8192, show_default=True, help="Most prompt tokens of a pass.")
@click.option("--admit-ms", type=float, default=0.5, show_default=True, help="Until stage 0 hears of a request's row.")
@click.option("--prompt-batch", type=int, help="Rows of a prompt microbatch; by default --batch.")
@click.option("--prompt-ahead", type=int, help="Requests that the token side holds beyond its rows. [all prompt rows]")
@click.option("--hop-ms", type=float, default=0.0, show_default=True, help="Time from one stage to the next.")
@click.option("--swap-bytes", type=float, help="Swap: KV bytes per token and row in one stage.")
@click.option("--resident", type=int, default=2, show_default=True, help="Microbatches on the device, with swapping.")
@click.option("--host-gbps", type=float, default=25.0, show_default=True, help="Host link that swapping uses, GB/s.")
@click.option("--replica-bytes", type=float, help="Replicate: KV bytes per token and row in one stage.")
@click.option("--replica-gbps", type=float, default=25.0, show_default=True, help="Link to the replica, GB/s.")
@click.option("--kill", "kills", multiple=True, metavar="SECONDS[:PIPELINE]", help="Lose a stage; may be repeated.")
@click.option("--detect-ms", type=float, default=10.0, show_default=True, help="From a kill to its detection.")
@click.option(
    "--restore-ms", type=float, default=0.0, show_default=True, help="From detection until the pipeline goes on."
)
@click.option(
    "--replication/--no-replication", default=True, show_default=True, help="Without: a kill loses the rows' KV."
)
@click.option("--paper", is_flag=True, help="Repeat the paper's simulators exactly.")
@click.option("--trace-out", type=click.Path(path_type=Path), help="Timeline for ui.perfetto.dev.")
@click.option("--out", type=click.Path(path_type=Path), help="New run directory for the tables.")
@click.option("--sweep", is_flag=True, help="1 … N machines, each kind of layout, each batch that fits.")
@click.option("--machines", type=int, default=16, show_default=True, help="Sweep: most machines, each one stage.")
@click.option("--profile", type=click.Path(path_type=Path), help="Sweep: times from `dejavu bench profile`.")
@click.option("--model", help="Sweep: the model; by default the profile's.")
@click.option("--memory-gb", type=float, help="Sweep: memory of a machine, 1e9 bytes; by default the profile's.")
@click.option("--cost-per-hour", type=float, default=1.0, show_default=True, help="Sweep: cost of a machine-hour.")
def command(**options: Any) -> int:
    """Run the command."""
    if options["sweep"]:
        return run_sweep(options)
    return run_paper(options) if options["paper"] else run_default(options)


def workload(options: dict[str, Any]) -> list[Any]:
    """Read or make up the workload; a rate replaces the trace's arrivals (paper mode draws its own)."""
    from dejavu.planning.trace import make_lmsys_like, read_trace, with_rate

    if options["num_requests"] is not None and options["num_requests"] < 1:
        raise UsageError(f"--num-requests {options['num_requests']} leaves nothing to simulate: give at least 1")
    if options["trace"]:
        entries = read_trace(options["trace"], limit=options["num_requests"])
    else:
        entries = make_lmsys_like(options["num_requests"] or 512, seed=options["seed"])
    if options["rate"] and not options["paper"]:
        entries = with_rate(entries, options["rate"], options["seed"])
    return [entry.lengths for entry in entries]


def is_disaggregated(options: dict[str, Any]) -> bool:
    """Tell which kind of pipelines was asked for; raise UsageError unless it is exactly one."""
    split = options["prompt_stages"] is not None or options["token_stages"] is not None
    if split == (options["stages"] is not None):
        raise UsageError("pipelines are not clear: give --stages, or --prompt-stages with --token-stages")
    if split:
        needed(options, "prompt_stages", "token_stages")
    needed(options, "prompt_ms", "token_ms")
    return split


def run_paper(options: dict[str, Any]) -> int:
    """Print what the paper's simulator gives."""
    from dejavu.planning.paper_simulator import simulate_colocated, simulate_disaggregated
    from dejavu.planning.rows import paper_result_row

    times = {name: (options[f"{name}ms"] or 0.0) / 1e3 for name in ("prompt_", "token_")}
    settings: dict[str, Any] = {f"{name}s": seconds for name, seconds in times.items()} | {"rate": options["rate"]}
    if is_disaggregated(options):
        stages = {name: options[name] for name in ("prompt_stages", "token_stages")}
        result = simulate_disaggregated(workload(options), cache_s=options["cache_ms"] / 1e3, **stages, **settings)
    else:
        result = simulate_colocated(workload(options), stages=options["stages"], **settings)
    return show(options, paper_result_row(result), "the paper's simulator")


def run_default(options: dict[str, Any]) -> int:
    """Print what the engine is predicted to do."""
    from dejavu.measure.trace import write_trace
    from dejavu.planning.rows import result_row
    from dejavu.planning.simulator import simulate

    setup = make_setup(options)
    result = simulate(setup, workload(options), record=options["trace_out"] is not None)
    records = result.request_records()
    if options["trace_out"]:
        options["trace_out"].absolute().parent.mkdir(parents=True, exist_ok=True)
        write_trace(options["trace_out"], trace_tracks(setup), result.steps, records)
    return show(options, result_row(result), "simulated", records)


def trace_tracks(setup: Any) -> Any:
    """Name the tracks of a timeline."""
    from dejavu.measure.trace import Tracks

    places = [(pipeline.role, stage) for pipeline in setup.pipelines for stage in range(pipeline.stages)]
    names = {rank: f"{role} stage {stage}" for rank, (role, stage) in enumerate(places, 1)}
    ends = accumulate((pipeline.stages for pipeline in setup.pipelines), initial=0)
    return Tracks({0: "controller"} | names, tuple(ends)[:-1], setup.pipelines[0].role == "prompt")


def make_setup(options: dict[str, Any]) -> Any:
    """Describe the pipelines."""
    from dejavu.planning.setup import PipelineSetup, Replication, Setup, Swap
    from dejavu.planning.times import FixedTimes, check_times

    split = is_disaggregated(options)
    if options["replicas"] < 1:
        raise UsageError(f"{options['replicas']} replicas cannot serve: give at least 1")
    check_times(prompt_ms=options["prompt_ms"], token_ms=options["token_ms"], cache_ms=options["cache_ms"])
    times = FixedTimes(options["prompt_ms"] / 1e3, options["token_ms"] / 1e3)
    same = {name: options[name] for name in ("rows", "microbatches", "prompt_chunk", "max_prompt_tokens")}
    same |= {"hop_s": options["hop_ms"] / 1e3}
    swap = None
    if options["swap_bytes"] is not None:
        swap = Swap(options["swap_bytes"], options["host_gbps"] * 1e9, options["resident"])
    if options["replica_bytes"] is not None:
        same |= {"replication": Replication(options["replica_bytes"], options["replica_gbps"] * 1e9)}
    if split:
        prompt_rows = options["rows"] if options["prompt_batch"] is None else options["prompt_batch"]
        own = same | {"microbatches": 0, "rows": prompt_rows}
        prompt = PipelineSetup(options["prompt_stages"], times, "prompt", **own)
        pipelines = (prompt, PipelineSetup(options["token_stages"], times, "token", swap=swap, **same))
        ahead = prompt.num_rows if options["prompt_ahead"] is None else options["prompt_ahead"]
    else:
        pipelines, ahead = (PipelineSetup(options["stages"], times, swap=swap, **same),) * options["replicas"], None
    delays = {"cache_s": options["cache_ms"] / 1e3, "admission_s": options["admit_ms"] / 1e3}
    return Setup(pipelines, **delays, prompt_ahead=ahead, failures=make_failures(options, split))


def make_failures(options: dict[str, Any], split: bool) -> tuple[Any, ...]:
    """Read the kills: by default of the token pipeline, or of the first."""
    from dejavu.planning.setup import Failure

    failures = []
    for kill in options["kills"]:
        seconds, _, pipeline = kill.partition(":")
        try:
            place = float(seconds), int(pipeline or split)
        except ValueError:
            raise UsageError(f"--kill {kill!r} is no time: write SECONDS or SECONDS:PIPELINE, such as 12.5:0") from None
        delays = options["detect_ms"] / 1e3, options["restore_ms"] / 1e3
        failures.append(Failure(*place, *delays, kv_lost=not options["replication"]))
    return tuple(failures)


def show(options: dict[str, Any], row: dict[str, Any], title: str, records: Sequence[Any] = ()) -> int:
    """Print one row, write it and the requests' records if asked to, and end with the line of JSON."""
    from dejavu.measure.records import RequestRecord, write_csv
    from dejavu.planning.rows import json_line, write_rows

    Console().print(row_table(row, title))
    if options["out"]:
        with new_run("simulate", options["out"]):
            write_rows(options["out"] / "simulate.csv", [row])
            if records:
                write_csv(options["out"] / "requests.csv", records, RequestRecord)
    click.echo(json_line("simulate", options["out"], [row]))
    return 0


def run_sweep(options: dict[str, Any]) -> int:
    """Print the best batch of each point of the sweep, and write all of them."""
    from dejavu.planning.bars import best_rows, draw_sweep
    from dejavu.planning.rows import json_line, write_rows
    from dejavu.planning.sweep import sweep

    if options["machines"] < 1:
        raise UsageError(f"--machines {options['machines']} is nothing to sweep: give at least 1")
    processes = len(os.sched_getaffinity(0))
    task = make_task(options)
    found = sweep(task, range(1, options["machines"] + 1), options["cost_per_hour"], processes=min(processes, 8))
    if not found:
        raise UsageError("nothing fits on any number of machines: give more --machines or --memory-gb")
    rows = [asdict(row) for row in found]
    Console().print(rows_table([asdict(row) for row in best_rows(found)], SWEEP_COLUMNS, "the best batch of each"))
    if options["out"]:
        with new_run("simulate", options["out"]):
            write_rows(options["out"] / "sweep.csv", rows)
            draw_sweep(options["out"] / "sweep.png", found)
    click.echo(json_line("simulate", options["out"], rows))
    return 0


def make_task(options: dict[str, Any]) -> Any:
    """Gather what the sweep is of."""
    from dejavu.planning.planner import GB, Machine, ProfiledTimes, Task
    from dejavu.planning.profile import load_profile

    needed(options, "profile")
    profile = load_profile(options["profile"])
    shape = make_shape(options | {"model": options["model"] or profile.model})
    memory_gb = options["memory_gb"] or profile.memory_bytes / GB
    if not memory_gb:
        needed(options, "memory_gb")
    return Task(
        shape,
        Machine(1, memory_gb * GB),
        ProfiledTimes(profile, shape.num_layers),
        tuple(workload(options)),
        profile.dtype_bytes,
    )
