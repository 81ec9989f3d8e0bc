"""`dejavu serve`: start a job outside mpirun, be a rank of it inside."""

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import click
import rich_click
from rich.console import Console
from rich.table import Table

from dejavu.cluster.launcher import world_rank
from dejavu.config import ServeConfig, load_config, make_config
from dejavu.errors import UsageError
from dejavu.measure.run_directory import locate
from dejavu.topology import Topology, build_topology, required_ranks

from .options import config_options, find_profile, given

MOST_RESTARTS = 10

HELP = """Serve a model and a workload over MPI ranks, and write what happened to a run directory.

PROFILE is a YAML file, or the name of a shipped one, whose keys are the options below (`pp: 2`); options given here
win over it. Outside mpirun this starts as many ranks as the options need; inside mpirun it is one of them. Values in
[brackets] are the defaults."""


@click.command(cls=rich_click.RichCommand, help=HELP)
@click.argument("profile", required=False)
@config_options(ServeConfig)
@click.option("--dry-run", is_flag=True, cls=rich_click.RichOption, panel="Run", help="Print ranks and command; stop.")
@click.option(
    "--resume",
    type=click.Path(path_type=Path),
    metavar="RUN",
    cls=rich_click.RichOption,
    panel="Run",
    help="Go on with a run that was lost, from the journal in its directory; takes no other option.",
)
@click.pass_context
def command(context: click.Context, /, profile: str | None, dry_run: bool, resume: Path | None, **values: Any) -> int:
    """Run the command."""
    if resume:
        others = [*filter(None, [profile]), *given(values), *(["dry_run"] if dry_run else [])]
        if others:
            raise UsageError(f"--resume goes on with the options that the run had: leave out {', '.join(others)}")
        return go_on(locate(resume))
    config = load_config(find_profile(profile), given(values))
    if world_rank(os.environ) is not None:
        return be_rank(config)
    own = [argument for argument in context.obj if argument != "--dry-run"]
    return show(config, own) if dry_run else start(config, own)


def go_on(run: Path) -> int:
    """Start a lost run again, with the configuration that it had."""
    import yaml

    from dejavu.cluster.jobs import start_job
    from dejavu.measure.run_directory import RunDirectory

    directory = RunDirectory(run)
    if not directory.run_file.exists() or not (run / "journal.jsonl").exists():
        raise UsageError(f"{run} holds no run that could go on: name a directory with run.yaml and journal.jsonl")
    if directory.outputs_file.exists():
        raise UsageError(f"the run in {run} has ended well: there is nothing to go on with")
    directory.check_deserted(run / "journal.jsonl")
    values = directory.read_run()["config"]
    config = make_config({name: value for name, value in values.items() if value is not None}, str(directory.run_file))
    profile = run / "resume.yaml"
    profile.write_text(yaml.safe_dump(config.model_dump(mode="json", exclude={"out"}, exclude_none=True)))
    return start_job(
        required_ranks(config),
        ["serve", str(profile)],
        name=config.name,
        hostfile=config.hostfile,
        progress=config.progress,
        restarts=restarts_of(config),
        resume=directory,
    )


def restarts_of(config: ServeConfig) -> int:
    """Give how often a lost run is started again."""
    return MOST_RESTARTS if config.on_failure != "abort" else 0


def be_rank(config: ServeConfig) -> int:
    """Be one rank of a job; what cannot be imported ends the job as any other failure does."""
    from dejavu.cluster.process import guarded, importing

    def run() -> int:
        with importing():
            from dejavu.cluster.start import run_rank

        return run_rank(config)

    return guarded(run)


def show(config: ServeConfig, arguments: list[str]) -> int:
    """Print the rank table and the mpirun line; reads a model's shape, never its weights."""
    from dejavu.cluster.job import device_names
    from dejavu.cluster.jobs import plan_launch, show_line
    from dejavu.cluster.launcher import planned_hosts
    from dejavu.model.resolve import resolve_model

    console = Console()
    topology = build_topology(config, resolve_model(config.model, "dummy").spec, required_ranks(config))
    launch = plan_launch(required_ranks(config), arguments, console, hostfile=config.hostfile)
    hosts = planned_hosts(config.hostfile, required_ranks(config), os.environ)
    console.print(rank_table(topology, device_names(config), hosts))
    show_line(console, launch)
    return 0


def start(config: ServeConfig, arguments: list[str]) -> int:
    """Check everything that can be, start the job, and see it to its end."""
    from dejavu.cluster.job import prepare
    from dejavu.cluster.jobs import start_job

    prepare(config)
    return start_job(
        required_ranks(config),
        arguments,
        name=config.name,
        out=config.out,
        hostfile=config.hostfile,
        progress=config.progress,
        restarts=restarts_of(config),
    )


def rank_table(topology: Topology, devices: Sequence[str], hosts: Sequence[str] = ()) -> Table:
    """Lay out which rank does what, on which of its host's devices: taken in turn, and as they are on this host."""
    table = Table("rank", "role", "stage", "layers", "tensor rank", "device", title="Ranks", title_justify="left")
    if hosts:
        table.add_column("host")
    for placement in topology.placements:
        rank, shard = placement.rank, placement.shard
        cells = [str(rank), placement.role.value]
        if shard:
            layers = f"{shard.first_layer}-{shard.last_layer - 1}"
            cells += [str(placement.stage), layers, f"{shard.tp_rank} of {shard.tp_size}"]
            before = hosts[1:rank].count(hosts[rank]) if hosts else rank - 1
            cells += [devices[before % len(devices)]]
        cells += [""] * (6 - len(cells))
        table.add_row(*cells, *hosts[rank : rank + 1])
    return table
