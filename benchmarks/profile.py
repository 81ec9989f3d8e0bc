"""How long prompts and token steps take, over their length, batch and tensor degree, and how far from the roofline.

The passes are those of the engine's stages, over the whole model. The roofline is the larger of two times: the bytes
that a pass has to move, by the bandwidth of a large copy, and the operations that it has to do, by the rate of a large
matrix product, both measured in this run on the same ranks at once. The times are written as a profile, which
`dejavu plan --profile` and `dejavu simulate --profile` read. `wrong` counts rows of logits that differ by more than 1 %
from those of one float32 rank on the CPU, for the same shapes with two layers, split as the row says.
"""

from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import replace
from datetime import date
from pathlib import Path
from typing import TYPE_CHECKING, Any

import rich_click as click

from dejavu.errors import UsageError
from dejavu.measure.render import format_value
from dejavu.planning.profile import Profile, PromptTime, TokenTime

from .driver import Row, finish, keep_rows, open_run_directory, run_ranks
from .generate import numbers

if TYPE_CHECKING:
    from .roofline import Ceilings
    from .stage_runs import Group, Runs, Times

TOLERANCE = 1e-2
VERIFIED_LAYERS = 2
DEFAULTS = {
    "cuda": {"model": "opt-13b", "dtype": "float16", "batches": "1,8,32", "lengths": "128,512,1000"},
    "cpu": {"model": "opt-125m", "dtype": "float32", "batches": "1,4", "lengths": "32,128"},
}


@click.command()
@click.option("--model", help="As for `dejavu serve`; by default opt-13b on a GPU, opt-125m on a CPU.")
@click.option("--load-format", default="dummy", show_default=True, help="As for `dejavu serve`.")
@click.option("--dtype", help="Number format; by default float16 on a GPU, float32 on a CPU.")
@click.option("--device", type=click.Choice(["auto", "cpu", "cuda"]), default="auto", show_default=True, help="Where.")
@click.option("--tp", "degrees", default="1", show_default=True, help="Tensor degrees, such as 1,2.")
@click.option("--batch", "batches", help="Rows of a pass, such as 1,8,32.")
@click.option("--length", "lengths", help="Tokens of prompts, and in the cache at token steps, such as 128,512.")
@click.option("--threads", default=0, show_default=True, help="CPU threads of a rank; 0 shares the cores.")
@click.option("--max-tokens", default=8192, show_default=True, help="Longer prompt passes, in all rows, are left out.")
@click.option("--repeats", default=5, show_default=True, type=click.IntRange(1), help="Repeats; the median counts.")
@click.option("--verify/--no-verify", default=True, show_default=True, help="Compare logits with a float32 reference.")
@click.option("--verbose", is_flag=True, help="Print each row as it is measured.")
@click.option("--list", "is_list", is_flag=True, help="Name the cases and stop.")
@click.option("--out-file", type=click.Path(dir_okay=False, path_type=Path), help="The profile; by default in the run.")
@click.option("--out", help="The run directory.")
@click.pass_context
def command(context: click.Context, /, out: str | None, **options: Any) -> int:
    """Time prompts and token steps against the roofline, and write the profile that planning reads."""
    options = filled(options)
    degrees = numbers(options["degrees"], "--tp")
    if options["is_list"]:
        click.echo("\n".join(case_names(options)))
        return 0
    return run_ranks(context, max(degrees), "profile", out, lambda: run_rank(options, out))


def filled(options: Row) -> Row:
    """Fill in what depends on the device."""
    from dejavu.device import num_cuda_devices

    kind = options["device"]
    if kind == "auto":
        kind = "cuda" if num_cuda_devices() else "cpu"
    given = {name: value for name, value in options.items() if value is not None}
    return {"out_file": None, **DEFAULTS[kind], **given, "device": kind}


def cases(options: Row) -> Iterator[tuple[str, int, int]]:
    """Give each pass's kind, batch and length."""
    for batch in numbers(options["batches"], "--batch"):
        for length in numbers(options["lengths"], "--length"):
            if batch * length <= options["max_tokens"]:
                yield "prompt", batch, length
            yield "token", batch, length


def case_names(options: Row) -> list[str]:
    """Name what would be timed."""
    degrees = numbers(options["degrees"], "--tp")
    return [f"{kind}/batch={batch}/length={length}/tp={tp}" for tp in degrees for kind, batch, length in cases(options)]


def run_rank(options: Row, out: str | None) -> int:
    """Time one tensor degree after the other, on as many of the ranks; rank 0 reports."""
    from mpi4py import MPI

    from .links import RankWorld, choose_device

    degrees = numbers(options["degrees"], "--tp")
    if MPI.COMM_WORLD.size != max(degrees):
        raise UsageError(f"tensor degree {max(degrees)} needs as many ranks: give mpirun -n {max(degrees)}")
    comm = MPI.COMM_WORLD.Dup()
    with choose_device(options["device"], MPI.COMM_WORLD.Split_type(MPI.COMM_TYPE_SHARED).rank) as device:
        world = RankWorld(device, comm)
        rows, num_layers = measure(world, degrees, options)
        code = publish(world, rows, num_layers, options, out) if comm.rank == 0 else 0
        world.share()
        world.close()
    return code


def measure(world: Any, degrees: Sequence[int], options: Row) -> tuple[list[Row], int]:
    """Give all rows (on rank 0) and the model's layers."""
    import torch
    from mpi4py import MPI

    from dejavu.model.resolve import resolve_model

    from .links import rest_until_done
    from .stage_runs import open_group, own_stream

    resolved = resolve_model(options["model"], options["load_format"])
    rows: list[Row] = []
    for tp in degrees:
        resolved.spec.check_tensor_parallel(tp)
        comm = world.comm.Split(0 if world.rank < tp else MPI.UNDEFINED, world.rank)
        if comm == MPI.COMM_NULL:
            rest_until_done(world)
            continue
        torch.set_num_threads(options["threads"] or threads_of(tp))
        with ExitStack() as stack, own_stream(world.device):
            rows += measure_degree(open_group(world.device, comm, stack), resolved, options)
        if world.rank == 0:
            keep_rows("profile", rows)
            wake(world, range(tp, world.comm.size))
    return rows, resolved.spec.num_layers


def wake(world: Any, ranks: Iterable[int]) -> None:
    """Wake the ranks that this degree left idle."""
    from .links import IDLE_TAG

    for rank in ranks:
        world.comm.send(None, dest=rank, tag=IDLE_TAG)


def threads_of(ranks: int) -> int:
    """Share the cores between ranks."""
    import os

    return max(1, len(os.sched_getaffinity(0)) // ranks)


def measure_degree(group: "Group", resolved: Any, options: Row) -> list[Row]:
    """Time all cases at one tensor degree."""
    import torch

    from .stage_runs import Runs, make_stage, measure_ceilings

    dtype = getattr(torch, options["dtype"])
    wrong = verify(group, resolved.spec, dtype) if options["verify"] else None
    ceilings = measure_ceilings(group, dtype, options["repeats"])
    stage = make_stage(group, resolved.spec, dtype, resolved.directory)
    largest, longest = (max(numbers(options[name], name)) for name in ("batches", "lengths"))
    runs = Runs(group, stage, largest, longest + 1)
    rows = []
    for case in cases(options):
        rows.append(measure_case(runs, ceilings, case, options["repeats"], wrong))
        if options["verbose"] and group.comm.rank == 0:
            click.echo(", ".join(f"{name} {format_value(value)}" for name, value in rows[-1].items()))
    return with_ratios(rows)


def measure_case(
    runs: "Runs", ceilings: "Ceilings", case: tuple[str, int, int], repeats: int, wrong: int | None
) -> Row:
    """Time one pass."""
    kind, batch, length = case
    time_pass = runs.time_prompt if kind == "prompt" else runs.time_token
    return make_row(runs, ceilings, case, time_pass(batch, length, repeats), wrong)


def make_row(runs: "Runs", ceilings: "Ceilings", case: tuple[str, int, int], times: "Times", wrong: int | None) -> Row:
    """Put a case's times beside its roofline."""
    from .roofline import prompt_work, stage_size, token_work

    kind, batch, length = case
    stage = runs.stage
    size = stage_size(stage.spec, stage.shard, stage.dtype.itemsize)
    work = (prompt_work if kind == "prompt" else token_work)(size, batch, length)
    seconds = times.median_s
    return {
        "kind": kind,
        "length": length,
        "batch": batch,
        "tp": stage.shard.tp_size,
        "ms": seconds * 1e3,
        "ms_min": min(times.passes) * 1e3,
        "ms_max": max(times.passes) * 1e3,
        "tokens_per_s": batch * (length if kind == "prompt" else 1) / seconds,
        "roofline_ms": ceilings.seconds(work) * 1e3,
        "bound": ceilings.bound(work),
        "percent_of_roofline": 100 * ceilings.seconds(work) / seconds,
        "memory_gbps": work.nbytes / seconds / 1e9,
        "memory_ceiling_gbps": ceilings.bytes_per_s / 1e9,
        "tflops": work.flop / seconds / 1e12,
        "tflops_ceiling": ceilings.flop_per_s / 1e12,
        "host_us": min(times.posts) * 1e6,
        "wrong": wrong,
    }


def with_ratios(rows: list[Row]) -> list[Row]:
    """Add to every prompt pass how many token steps of the same length and batch take as long: the paper's Y / t."""
    token_ms = {(row["length"], row["batch"]): row["ms"] for row in rows if row["kind"] == "token"}
    return [
        row | {"token_steps": row["ms"] / token_ms[row["length"], row["batch"]] if row["kind"] == "prompt" else None}
        for row in rows
    ]


def verify(group: "Group", spec: Any, dtype: Any) -> int:
    """Count rows of logits that are wrong, in a prompt pass and two token steps of a few layers of this shape."""
    import torch

    from dejavu.model.decoder import StageModel
    from dejavu.model.spec import Shard
    from dejavu.model.weights import dummy_stage

    from .stage_runs import Group, Runs, make_stage

    few = replace(spec, num_layers=min(VERIFIED_LAYERS, spec.num_layers))
    runs = Runs(group, make_stage(group, few, dtype, None), 2, 64)
    outputs = run_few(runs)
    parts = group.comm.gather([output.float().cpu() for output in outputs], root=0)
    wrong = 0
    if group.comm.rank == 0:
        whole = dummy_stage(few, Shard(0, few.num_layers, few.num_layers), dtype, group.device.torch_device)
        weights = {name: tensor.float().cpu() for name, tensor in whole.items()}
        alone = Group(open_cpu(), None, None)
        expected = run_few(Runs(alone, StageModel(few, Shard(0, few.num_layers, few.num_layers), weights), 2, 64))
        for index, reference in enumerate(expected):
            found = torch.cat([part[index] for part in parts], dim=1)
            wrong += int(((found - reference).norm(dim=1) > TOLERANCE * reference.norm(dim=1)).sum())
    return int(group.comm.bcast(wrong))


def open_cpu() -> Any:
    """Give the CPU, on which the reference runs."""
    from dejavu.device import open_device

    return open_device("cpu")


def run_few(runs: "Runs") -> list[Any]:
    """Run a prompt pass of two rows of unequal length and two token steps; gives copies of the logits."""
    import torch

    outputs, context = [], [0, 0]
    with torch.inference_mode():
        for num_new in ([17, 30], [1, 1], [1, 1]):
            outputs.append(runs.forward(num_new, context).clone())
            context = [before + new for before, new in zip(context, num_new, strict=True)]
    return outputs


def publish(world: Any, rows: list[Row], num_layers: int, options: Row, out: str | None) -> int:
    """Write the rows, the profile and the picture."""
    from .plots_profile import plot_passes

    directory = open_run_directory("profile", out)
    path = options["out_file"] or directory.path / "profile.yaml"
    profile = make_profile(world.device, rows, num_layers, options)
    profile.save(path)
    plot_passes(rows, directory.path / "profile.png", f"{options['model']} {options['dtype']}, {profile.device}")
    wrong = sum(row["wrong"] or 0 for row in rows)
    error = f"{wrong} rows of logits were wrong" if wrong else None
    options = options | {"out_file": str(path)}
    more = {"profile": str(path)}
    return finish(
        directory,
        "profile",
        rows,
        options,
        table=[narrow(row) for row in rows],
        notes=[f"wrote {path}"],
        more=more,
        error=error,
        device=profile.device,
    )


def narrow(row: Row) -> Row:
    """Keep the columns that a terminal has room for."""
    left_out = ("ms_min", "ms_max", "memory_ceiling_gbps", "tflops_ceiling")
    return {name: value for name, value in row.items() if name not in left_out}


def make_profile(device: Any, rows: Sequence[Row], num_layers: int, options: Row) -> Profile:
    """Turn rows into what planning reads."""
    import torch

    from .stage_runs import measure_links

    return Profile(
        model=options["model"],
        device=device.properties.name,
        date=date.today().isoformat(),
        num_layers=num_layers,
        prompt=tuple(
            PromptTime(row["length"], row["batch"], row["tp"], row["ms"]) for row in rows if row["kind"] == "prompt"
        ),
        token=tuple(
            TokenTime(row["length"], row["batch"], row["tp"], row["ms"]) for row in rows if row["kind"] == "token"
        ),
        dtype_bytes=getattr(torch, options["dtype"]).itemsize,
        memory_bytes=device.properties.total_bytes,
        bandwidths_gbps={name: speed / 1e9 for name, speed in measure_links(device).items()},
    )
