"""Start a command of this program as the ranks of a job, and see the job to its end."""

import os
import secrets
import socket
from collections.abc import Callable, Sequence
from dataclasses import replace

import click
from rich.console import Console

from dejavu.cluster.launcher import (
    RESUME,
    SUPERVISOR,
    Launch,
    Terminal,
    build_launch,
    check_hostfile,
    find_mpirun,
    rank_program,
)
from dejavu.cluster.progress import open_display
from dejavu.cluster.supervisor import new_job, run_job
from dejavu.measure.run_directory import RunDirectory
from dejavu.transport.registry import SECRET


def plan_launch(
    num_ranks: int,
    arguments: Sequence[str],
    console: Console,
    *,
    hostfile: str | None = None,
    directory: RunDirectory | None = None,
    job: str = "",
) -> Launch:
    """Make the launch of `dejavu ARGUMENTS` for this terminal; with a `directory`, as a job that reports there.

    The `job` has a new name unless one is given, which nobody else may know or have.

    A job's ranks get a secret in their environment, by which the `tcp` carrier tells them from strangers.
    """
    check_hostfile(hostfile)
    own = {SECRET: secrets.token_hex(32), SUPERVISOR: f"{os.getpid()}@{socket.gethostname()}"} if directory else {}
    return build_launch(
        num_ranks,
        rank_program(arguments),
        mpirun=find_mpirun(os.environ.get("PATH", "")),
        environment={**os.environ, **own},
        terminal=Terminal(console.width, color=console.is_terminal and not console.no_color),
        hostfile=hostfile,
        run_dir=directory.path.absolute() if directory else None,
        job=(job or new_job()) if directory else None,
    )


def start_job(
    num_ranks: int,
    arguments: Sequence[str],
    *,
    name: str,
    out: str | None = None,
    hostfile: str | None = None,
    progress: bool = True,
    restarts: int = 0,
    resume: RunDirectory | None = None,
    job: str = "",
    failed: Callable[[RunDirectory, str], None] = lambda directory, error: None,
) -> int:
    """Run `dejavu ARGUMENTS` on `num_ranks` ranks with a new run directory; give its exit code, after its error.

    A run that is lost is started again up to `restarts` times; `resume` goes on with one that was lost before. Of one
    that has ended with an error, or was stopped, `failed` is told when nothing of it runs any more.
    """
    console = Console()
    plan_launch(num_ranks, arguments, console, hostfile=hostfile)  # what is missing is said before a directory is made
    directory = resume or RunDirectory.create(name, out)
    launch = plan_launch(num_ranks, arguments, console, hostfile=hostfile, directory=directory, job=job)
    with directory.alone():
        if resume:
            resume.result_file.unlink(missing_ok=True)
            launch = replace(launch, environment={**launch.environment, RESUME: "1"})
        show_line(console, launch)
        result = run_job(launch, directory, open_display(console, progress=progress), restarts=restarts)
    if result.error:
        click.echo(f"{click.style('error:', fg='red', bold=True)} {result.error}", err=True)
        failed(directory, result.error)
    return result.exit_code


def show_line(console: Console, launch: Launch) -> None:
    """Print the command in one line, however wide, so that it can be copied."""
    console.print(launch.line, style="dim", soft_wrap=True, highlight=False, markup=False)
