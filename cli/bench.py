"""`dejavu bench NAME`: the benchmarks, each a module of `dejavu.benchmarks` with a `command`."""

import click

from .lazy import LazyGroup

BENCHMARKS = {
    "disaggregation": "Serve prompts and tokens in one pipeline and in two, on the same ranks.",
    "generate": "Time token generation beside another implementation.",
    "microbench": "Measure KV streaming over every carrier against a plain copy.",
    "calibrate": "Measure what copies fastest here, for the library to choose by.",
    "profile": "Time prompts and token steps against the roofline, for planning.",
    "groups": "Time sums over a tensor group, and the hand-over between stages.",
    "overhead": "Measure what KV streaming costs serving steps, at each level.",
    "replication": "Measure what replication costs a token step.",
    "reproduce": "Do the paper's figures again, ours beside the paper's.",
    "swapping": "Serve in one memory for KV without swapping, and with it in larger microbatches.",
    "swaplink": "Measure what swapping gets of the host link, and what it costs compute.",
    "validate": "Hold the simulator's predictions against the engine.",
}

HELP = """Measure one part of the system, and check what it computed.

Each prints a table, writes a run directory, and ends with one line of JSON."""


@click.command(cls=LazyGroup, package="dejavu.benchmarks", table=BENCHMARKS, help=HELP, invoke_without_command=True)
@click.pass_context
def command(context: click.Context, /) -> None:
    """List the benchmarks where none is named."""
    if context.invoked_subcommand is None:
        click.echo(context.get_help())
