"""`dejavu serve`: start a job outside mpirun, be a rank of it inside."""

import os
from typing import Any

import click
import rich_click
from rich.console import Console
from rich.table import Table

from dejavu.cluster.launcher import (
    Launch,
    Terminal,
    build_launch,
    check_hostfile,
    find_mpirun,
    rank_program,
    world_rank,
)
from dejavu.config import ServeConfig, load_config
from dejavu.topology import Topology, build_topology, required_ranks

from .options import config_options, find_profile, given

HELP = """Serve a model and a workload over MPI ranks, and write what happened to a run directory.

PROFILE is a YAML file, or the name of a shipped one, whose keys are the options below (`pp: 2`); options given here
win over it. Outside mpirun this starts as many ranks as the options need; inside mpirun it is one of them. Values in
[brackets] are the defaults."""


@click.command(cls=rich_click.RichCommand, help=HELP)
@click.argument("profile", required=False)
@config_options(ServeConfig)
@click.option("--dry-run", is_flag=True, cls=rich_click.RichOption, panel="Run", help="Print ranks and command; stop.")
@click.pass_context
def command(context: click.Context, /, profile: str | None, dry_run: bool, **values: Any) -> int:
    """Run the command."""
    config = load_config(find_profile(profile), given(values))
    if world_rank(os.environ) is not None:
        return be_rank(config)
    own = [argument for argument in context.obj if argument != "--dry-run"]
    return show(config, own) if dry_run else start(config, own)


def be_rank(config: ServeConfig) -> int:
    """Be one rank of a job; what cannot be imported ends the job as any other failure does."""
    from dejavu.cluster.process import guarded

    def run() -> int:
        from dejavu.cluster.start import run_rank

        return run_rank(config)

    return guarded(run)


def show(config: ServeConfig, arguments: list[str]) -> int:
    """Print the rank table and the mpirun line; reads a model's shape, never its weights."""
    from dejavu.model.resolve import resolve_model

    console = Console()
    topology = build_topology(config, resolve_model(config.model, "dummy").spec, required_ranks(config))
    console.print(rank_table(topology))
    show_line(console, make_launch(config, arguments, console))
    return 0


def start(config: ServeConfig, arguments: list[str]) -> int:
    """Check everything that can be, start the job, and see it to its end."""
    from dejavu.cluster.job import prepare
    from dejavu.cluster.progress import open_display
    from dejavu.cluster.supervisor import new_job, run_job
    from dejavu.measure.run_directory import RunDirectory

    prepare(config)
    console = Console()
    make_launch(config, arguments, console)
    directory = RunDirectory.create(config.name, config.out)
    launch = make_launch(config, arguments, console, run_dir=directory.path.absolute(), job=new_job())
    show_line(console, launch)
    result = run_job(launch, directory, open_display(console, progress=config.progress))
    if result.error:
        click.echo(f"{click.style('error:', fg='red', bold=True)} {result.error}", err=True)
    return result.exit_code


def make_launch(config: ServeConfig, arguments: list[str], console: Console, **job: Any) -> Launch:
    """Make the launch of a configuration's ranks for this terminal."""
    check_hostfile(config.hostfile)
    return build_launch(
        required_ranks(config),
        rank_program(arguments),
        mpirun=find_mpirun(os.environ.get("PATH", "")),
        environment=os.environ,
        terminal=Terminal(console.width, color=console.is_terminal and not console.no_color),
        hostfile=config.hostfile,
        **job,
    )


def show_line(console: Console, launch: Launch) -> None:
    """Print the command in one line, however wide, so that it can be copied."""
    console.print(launch.line, style="dim", soft_wrap=True, highlight=False, markup=False)


def rank_table(topology: Topology) -> Table:
    """Lay out which rank does what."""
    table = Table("rank", "role", "stage", "layers", "tensor rank", title="Ranks", title_justify="left")
    for placement in topology.placements:
        shard = placement.shard
        cells = [str(placement.rank), placement.role.value]
        if shard:
            layers = f"{shard.first_layer}-{shard.last_layer - 1}"
            cells += [str(placement.stage), layers, f"{shard.tp_rank} of {shard.tp_size}"]
        table.add_row(*cells)
    return table
