"""The program `dejavu`: its commands, and how errors end it."""

import os
import socket
import sys
from collections.abc import Sequence
from importlib.metadata import version

import click
import rich_click

from dejavu.errors import DejavuError, UsageError

from .lazy import LazyGroup

COMMANDS = {
    "serve": "Serve a model and a workload over MPI ranks.",
    "fail-inject": "Serve while ranks fail, and check that no output changes.",
    "plan": "Work out which split of the machine serves a workload best.",
    "simulate": "Simulate pipelines, swapping and failures without a model.",
    "trace": "Make or describe a workload trace.",
    "top": "Watch a run while it serves.",
    "report": "Show runs as a page, side by side where there are several.",
    "bench": "Measure one part, and check what it computed.",
    "doctor": "Say what this machine can do, and what is missing.",
}

HELP = """Serve large language models over MPI ranks, and measure what KV-cache streaming buys.

Start with `dejavu doctor`, then `dejavu serve demo.yaml`."""

INTERRUPTED = 130


@click.command(
    cls=LazyGroup,
    package=__package__,
    table=COMMANDS,
    help=HELP,
    context_settings={"help_option_names": ["-h", "--help"]},
    invoke_without_command=True,
)
@click.version_option(version("dejavu-serve"), prog_name="dejavu")
@rich_click.rich_config({"style_options_panel_border": "dim", "style_commands_panel_border": "dim"})
@click.pass_context
def command(context: click.Context, /) -> None:
    """List the commands where none is named."""
    if context.invoked_subcommand is None:
        click.echo(context.get_help())


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line and give its exit code: 2 for what the user can mend, 130 for Ctrl-C."""
    arguments = sys.argv[1:] if arguments is None else list(arguments)
    try:
        code = command.main(list(arguments), prog_name="dejavu", standalone_mode=False, obj=tuple(arguments))
    except DejavuError as error:
        return complain(str(error), error.exit_code, everywhere=not isinstance(error, UsageError))
    except click.NoSuchOption as error:
        return complain(f"no option {error.option_name!r}{nearest_option(error)}", error.exit_code)
    except click.ClickException as error:
        return complain(one_line(error.format_message()), error.exit_code)
    except (KeyboardInterrupt, click.Abort):
        return complain("interrupted", INTERRUPTED)
    return code if isinstance(code, int) else 0


def nearest_option(error: click.NoSuchOption) -> str:
    """Name the option that was meant, or where they are listed."""
    if error.possibilities:
        return f": did you mean {error.possibilities[0]!r}?"
    return f": `{error.ctx.command_path} --help` lists them" if error.ctx else ""


def one_line(message: str) -> str:
    """Write click's message as the program writes its own: lower case first, no full stop."""
    message = " ".join(message.split()).removesuffix(".")
    return message[:1].lower() + message[1:]


def complain(message: str, exit_code: int, *, everywhere: bool = False) -> int:
    """Write an error in one line to stderr; of ranks that all find the same error, the first of each host alone."""
    rank = os.environ.get("OMPI_COMM_WORLD_RANK", os.environ.get("PMIX_RANK", "0"))
    is_first = rank == "0" or os.environ.get("OMPI_COMM_WORLD_LOCAL_RANK") == "0"
    if is_first or everywhere:
        host = "" if rank == "0" else f"{socket.gethostname()}: "
        click.echo(f"{click.style('error:', fg='red', bold=True)} {host}{message}", err=True)
    return exit_code


if __name__ == "__main__":
    sys.exit(main())
