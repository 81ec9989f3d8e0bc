"""Do the paper's figures again, one command after the other, and show ours beside the paper's.

Each figure is described in a YAML file beside this module. A figure's numbers and plot are kept by kind of machine in
`--into`, so that a run without a GPU leaves the GPU's alone, and the page there is written anew from all of them. A
figure whose tables another command made is described by a YAML file there (see `figure_page`), until it is run here.
"""

import json
import shutil
import subprocess
import sys
import time
from collections.abc import Sequence
from datetime import date
from pathlib import Path
from typing import Any

import rich_click as click

import dejavu
from dejavu.device import cuda_device_name, num_cuda_devices, why_no_cuda
from dejavu.errors import UsageError
from dejavu.measure.environment import cpu_model, git_commit, usable_cores

from .driver import Row, finish, open_run_directory
from .figure_page import page_lines
from .figures import FigurePlan, measure_row, read_plans

START, END = "<!-- figures: written by `dejavu bench reproduce` -->", "<!-- end of figures -->"
KINDS = ("cpu", "gpu")


@click.command()
@click.option("--gpu", is_flag=True, help="Run the GPU's version of each figure.")
@click.option("--figure", "only", multiple=True, help="Do this figure alone, such as 8; may be repeated.")
@click.option("--into", default="results/published", show_default=True, type=click.Path(path_type=Path), help="Page.")
@click.option("--timeout-s", default=600.0, show_default=True, type=click.FloatRange(1), help="Most time of a figure.")
@click.option("--list", "list_only", is_flag=True, help="List the figures and their commands, and stop.")
@click.option("--page", "page_only", is_flag=True, help="Write the page from the figures that are there; stop.")
@click.option("--out", help="The run directory.")
def command(
    gpu: bool, only: tuple[str, ...], into: Path, timeout_s: float, list_only: bool, page_only: bool, out: str | None
) -> int:
    """Do the paper's figures again, and write a page of ours beside the paper's."""
    kind = KINDS[gpu]
    plans = choose(read_plans(), only, kind)
    if page_only:
        write_page(into)
        return 0
    if list_only:
        for plan in plans:
            click.echo(f"figure {plan.figure}: {plan.title}\n  dejavu {' '.join(plan.runs[kind]['command'])}")
        return 0
    if gpu and not num_cuda_devices():
        raise UsageError(f"--gpu cannot be had: {why_no_cuda()}; leave it out for the CPU's figures")
    directory = open_run_directory("reproduce", out)
    (into / "figures").mkdir(parents=True, exist_ok=True)
    rows = [row for plan in plans for row in reproduce(plan, kind, directory.path, into / "figures", timeout_s)]
    write_page(into)
    failed = [row["figure"] for row in rows if row["verdict"].startswith("failed")]
    error = f"figures {', '.join(dict.fromkeys(failed))} did not run: see their lines" if failed else None
    return finish(directory, "reproduce", rows, {"gpu": gpu, "figures": list(only)}, error=error)


def choose(plans: Sequence[FigurePlan], only: Sequence[str], kind: str) -> list[FigurePlan]:
    """Keep the figures that were asked for and have a version for this kind of machine."""
    known = {plan.figure for plan in plans}
    for figure in only:
        if figure not in known:
            raise UsageError(f"no figure {figure!r}: choose among {', '.join(plan.figure for plan in plans)}")
    return [plan for plan in plans if (not only or plan.figure in only) and kind in plan.runs]


def reproduce(plan: FigurePlan, kind: str, runs: Path, into: Path, timeout_s: float) -> list[Row]:
    """Run one figure's command, keep its rows and plot, and give a row for each of its measures."""
    click.echo(f"figure {plan.figure}: {plan.title}")
    shown = list(map(str, plan.runs[kind]["command"]))  # `{runs}` stands for where the earlier figures' runs are
    arguments = [argument.replace("{runs}", str(runs)) for argument in shown]
    start_s = time.monotonic()
    last, error = run_command(arguments, runs / plan.stem, timeout_s)
    if last is None:
        return [failed_row(plan, kind, error)]
    keep_files(Path(last.get("run", runs / plan.stem)), into / f"{plan.stem}-{kind}")
    rows = [measure_row(plan, kind, measure, last) for measure in plan.measures]
    record = {"command": ["dejavu", *shown], **origin(kind), "rows": rows}
    record["seconds"] = round(time.monotonic() - start_s, 1)
    (into / f"{plan.stem}-{kind}.json").write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    return rows


def run_command(arguments: Sequence[str], out: Path, timeout_s: float) -> tuple[dict[str, Any] | None, str]:
    """Run a `dejavu` command, and give its last line's object, or why there is none."""
    program = [sys.executable, "-m", "dejavu.cli.main", *arguments]
    try:
        done = subprocess.run(
            [*program, "--out", str(out)],
            capture_output=True,
            text=True,
            timeout=timeout_s,
            check=False,
        )
    except subprocess.TimeoutExpired:
        return None, f"it took more than {timeout_s:.0f} s"
    lines = done.stdout.strip().splitlines()
    try:
        last = json.loads(lines[-1]) if lines else None
    except json.JSONDecodeError:
        last = None
    if done.returncode or not isinstance(last, dict):
        complaint = done.stderr.strip().splitlines()
        return None, f"exit code {done.returncode}, {complaint[-1] if complaint else 'without a word'}"
    return last, ""


def keep_files(run: Path, stem: Path) -> None:
    """Keep a run's table and picture under the figure's name."""
    for suffix in ("csv", "png"):
        files = sorted((file for file in run.glob(f"*.{suffix}")), key=lambda file: file.stat().st_size)
        if files:
            shutil.copyfile(files[-1], stem.with_name(f"{stem.name}.{suffix}"))


def failed_row(plan: FigurePlan, kind: str, error: str) -> Row:
    """Make the row of a figure whose command did not end well."""
    row = {"figure": plan.figure, "machine": kind, "measure": "-"}
    return row | dict.fromkeys(("ours", "paper", "turns_min", "turns_max")) | {"verdict": f"failed: {error}"}


def origin(kind: str) -> Row:
    """Say when, where and with which commit a figure was made."""
    host = f"{cpu_model()}, {usable_cores()} cores"
    machine = f"{num_cuda_devices()} x {cuda_device_name(0)}, {host}" if kind == "gpu" else host
    commit = git_commit(Path(dejavu.__file__).parent) or ""
    return {"date": date.today().isoformat(), "kind": kind, "machine": machine, "commit": commit[:7]}


def write_page(into: Path) -> None:
    """Write the figures into README.md there, between two marks; the rest of the page stays."""
    page = into / "README.md"
    text = page.read_text(encoding="utf-8") if page.exists() else f"# Published results\n\n{START}\n{END}\n"
    if START not in text:
        text = text.rstrip("\n") + f"\n\n{START}\n{END}\n"
    before, _, rest = text.partition(START)
    after = rest.partition(END)[2]
    body = "\n".join(page_lines(read_plans(), into))
    page.write_text(f"{before}{START}\n{body}\n{END}{after}", encoding="utf-8")
