"""`dejavu fail-inject`: serve while ranks are killed or stopped, and check that nothing of the outputs changes."""

import json
import os
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click
import rich_click
import yaml
from rich.console import Console

from dejavu.cluster.injection import FAULTS, Fault, describe_fault, parse_fault, random_faults, to_environment
from dejavu.config import ServeConfig, load_config
from dejavu.engine.journal import JOURNAL, Past, read_journal
from dejavu.engine.losses import take_losses
from dejavu.errors import UsageError
from dejavu.measure.failures import FailureRecord
from dejavu.measure.records import write_csv
from dejavu.topology import Topology, build_topology, required_ranks

from .options import config_options, find_profile, given
from .serve import restarts_of
from .tables import rows_table

HELP = """Serve a workload while ranks are killed or stopped on purpose, and check every output against a run without.

WHO@WHEN is such as `token:1@step=40`, `token:1.0@step=40` (stage and tensor rank), `prompt:0@t=3.5`, `both:2@step=9`,
`spare:0@t=2`, `controller@step=20`, `rank:3@t=1`, `both:0@tokens=500`; a step is one of a microbatch, t counts seconds
from the start of serving, and tokens those of all requests. --random N draws all that by --seed. All options of `dejavu
serve` are taken; give --spares for each rank that is to be replaced, or --on-failure wait. Exit code 1 where an output
differs, a request is lost, a prompt was computed again of which there was a copy, a step was lost that was not behind
the recovery point, a failure that was asked for could not be caused, or anything is left behind. Ends with one line of
JSON."""

if TYPE_CHECKING:
    from dejavu.cluster.leavings import Before

Runs = dict[str, Path]


COUNT = click.IntRange(min=1)


def own_option(*names: str, **settings: Any) -> Callable[[Any], Any]:
    """Declare an option of this command, apart from those of serving."""
    return click.option(*names, cls=rich_click.RichOption, panel="Injection", **settings)


@click.command(cls=rich_click.RichCommand, help=HELP)
@click.argument("profile", required=False)
@own_option("--kill", "kills", multiple=True, metavar="WHO@WHEN", help="Kill a rank; may be repeated.")
@own_option("--stop", "stops", multiple=True, metavar="WHO@WHEN", help="Stop a rank (SIGSTOP): it hangs. May repeat.")
@own_option("--random", "num_random", type=COUNT, metavar="N", help="Kill and stop N ranks at random moments.")
@own_option("--every", type=COUNT, metavar="N", help="Do it again each N steps, seconds or tokens.")
@own_option("--lose", type=click.Choice(["memory"]), help="Lose the victim's device memory too: KV and weights.")
@own_option("--compare", is_flag=True, help="Also serve as a plain server does: everything restarts at the failure.")
@config_options(ServeConfig)
def command(
    profile: str | None,
    kills: tuple[str, ...],
    stops: tuple[str, ...],
    num_random: int | None,
    every: int | None,
    lose: str | None,
    compare: bool,
    **values: Any,
) -> int:
    """Run the command."""
    from dejavu.cluster.leavings import Before
    from dejavu.cluster.resilience import read_outputs
    from dejavu.cluster.supervisor import new_job
    from dejavu.measure.run_directory import RunDirectory
    from dejavu.model.resolve import resolve_model

    config = load_config(find_profile(profile), given(values))
    topology = build_topology(config, resolve_model(config.model, "dummy").spec, required_ranks(config))
    faults = parse_faults(kills, stops, every or 0, topology, loses_memory=lose is not None, is_random=bool(num_random))
    directory, before = RunDirectory.create("fail-inject", config.out).path, Before()
    runs = {name: directory / name for name in ("whole", "failure")}
    jobs = [new_job(), new_job()]
    if code := serve(config, runs["whole"], (), jobs[0]):
        return code
    if num_random:
        num_tokens = sum(map(len, read_outputs(runs["whole"]).values()))
        faults += random_faults(num_random, topology, num_tokens, config.seed, loses_memory=lose is not None)
    serve(config, runs["failure"], faults, jobs[1])
    if compare:
        runs |= serve_with_restart(config, directory, faults)
    asked = [describe_fault(fault, topology) for fault in faults]
    return report(directory, runs, Aftermath.of(runs["failure"], asked, before, jobs))


@dataclass(frozen=True, slots=True)
class Aftermath:
    """Say how many failures were asked for and caused, and what the jobs have left on this host."""

    asked: int
    kinds: dict[str, int]  # those caused, each at least once
    missed: list[str]  # those that were not
    left: list[str]

    @classmethod
    def of(cls, run: Path, asked: Sequence[str], before: "Before", jobs: Sequence[str]) -> "Aftermath":
        """Look at a run that has ended."""
        from dejavu.cluster.injection import IncidentLog
        from dejavu.cluster.leavings import left_behind

        caused = {incident.fault: incident.kind for incident in IncidentLog(run).read() if incident.fault >= 0}
        missed = [text for number, text in enumerate(asked) if number not in caused]
        return cls(len(asked), dict(Counter[str](caused.values())), missed, left_behind(before, jobs))

    @property
    def is_good(self) -> bool:
        """Tell whether all was caused, and nothing is left."""
        return sum(self.kinds.values()) == self.asked and not self.left

    def describe(self) -> list[str]:
        """Say it in words."""
        parts = ", ".join(f"{count} by {kind}" for kind, count in sorted(self.kinds.items()))
        caused = f"{sum(self.kinds.values())} of {self.asked} failures were caused" + (f": {parts}." if parts else ".")
        if self.missed:
            caused += f" The run had ended before {', '.join(self.missed)}."
        return [caused, f"Left behind: {', '.join(self.left) or 'nothing'}."]


def parse_faults(
    kills: Sequence[str],
    stops: Sequence[str],
    every: int,
    topology: Topology,
    *,
    loses_memory: bool,
    is_random: bool = False,
) -> list[Fault]:
    """Read what is to happen; UsageError where nothing is, or nothing that could be done again."""
    if not kills and not stops and not is_random:
        raise UsageError("nothing is to fail: give --kill, --stop or --random, such as --kill both:0@step=10")
    if every and not kills and not stops:
        raise UsageError(f"--every {every} repeats --kill and --stop: give one, or more failures with --random")
    asked = [(text, "kill") for text in kills] + [(text, "stop") for text in stops]
    return [parse_fault(text, kind, topology, every, loses_memory=loses_memory) for text, kind in asked]  # type: ignore[arg-type]


def serve(config: ServeConfig, out: Path, faults: Sequence[Fault], job: str = "") -> int:
    """Serve with these faults in a job of its own, of this name if one is given; give its exit code."""
    from dejavu.cluster.jobs import start_job

    profile = out.parent / f"{out.name}.yaml"
    values = config.model_dump(mode="json", exclude_unset=True, exclude={"out", "name", "progress"})
    profile.write_text(yaml.safe_dump(values), encoding="utf-8")
    os.environ.update(to_environment(faults))
    try:
        arguments = ["serve", str(profile), "--out", str(out), *([] if config.progress else ["--no-progress"])]
        return start_job(
            required_ranks(config),
            arguments,
            name=out.name,
            out=str(out),
            hostfile=config.hostfile,
            progress=config.progress,
            restarts=restarts_of(config),
            job=job,
        )
    finally:
        del os.environ[FAULTS]


def serve_with_restart(config: ServeConfig, directory: Path, faults: Sequence[Fault]) -> Runs:
    """Serve without spares and replicas until the first failure ends all, then serve again what was not finished."""
    from dejavu.cluster.resilience import write_remaining

    runs = {name: directory / name for name in ("restart-1", "restart-2")}
    plain = config.replace(spares=0, replicate="off", on_failure="abort")
    serve(plain, runs["restart-1"], faults)
    remaining = directory / "remaining.jsonl"
    write_remaining(journal_of(runs["restart-1"]), remaining)
    serve(plain.replace(workload=str(remaining), rate=None, chat=False), runs["restart-2"], ())
    return runs


def journal_of(directory: Path) -> Past:
    """Read the journal of a run, and with which failures it ended."""
    past = read_journal(directory / JOURNAL)
    take_losses(directory, past)
    return past


def report(directory: Path, runs: Runs, aftermath: Aftermath) -> int:
    """Check the outputs, write and show the comparison, and give the exit code."""
    from dejavu.cluster.resilience import LatencyRow, ProgressRow, Restart, differing, read_outputs

    pasts = {name: journal_of(path) for name, path in runs.items()}
    expected, found = read_outputs(runs["whole"]), read_outputs(runs["failure"])
    wrong = differing(expected, found)
    restart = Restart(pasts["restart-1"], pasts["restart-2"]) if "restart-1" in runs else None
    if restart:
        wrong += [name for name in differing(expected, restart.outputs()) if name not in wrong]
    latency, progress = compare_runs(expected, pasts, restart)
    write_csv(directory / "latency.csv", latency, LatencyRow)
    write_csv(directory / "progress.csv", progress, ProgressRow)
    draw(progress, directory / "progress.png")
    failures = pasts["failure"].failures
    write_csv(directory / "failures.csv", failures, FailureRecord)
    show(directory, failures, latency, wrong)
    for line in (*describe_costs(failures), *aftermath.describe()):
        print(line)
    tables = {"rows": [plain(row) for row in failures], "latency": [plain(row) for row in latency]}
    print(json.dumps({"bench": "fail-inject", "run": str(directory), **tables, "aftermath": asdict(aftermath)}))
    return int(bool(wrong) or has_faults(failures) or not aftermath.is_good)


def has_faults(failures: Sequence[FailureRecord]) -> bool:
    """Tell whether a failure has cost what it need not have: a prompt with a copy, or steps before a recovery point."""
    return any(record.prompts_avoidable or record.steps_beyond > 0 for record in failures)


def describe_costs(failures: Sequence[FailureRecord]) -> list[str]:
    """Say what the failures have cost together, and what of it was to be avoided."""
    prompts, avoidable = (sum(getattr(r, f"prompts_{name}") for r in failures) for name in ("recomputed", "avoidable"))
    again = sum(record.prompts_handed_over for record in failures)
    lost, beyond = (max((getattr(r, f"steps_{name}") for r in failures), default=0) for name in ("lost", "beyond"))
    return [
        f"{prompts} prompts were computed again, {avoidable} of which had a copy; {again} were handed over again.",
        f"At most {lost} steps were lost at once, {beyond} of them before the recovery point.",
    ]


def compare_runs(expected: dict[str, list[int]], pasts: dict[str, Past], restart: Any) -> tuple[list[Any], list[Any]]:
    """Give the latencies and the progress of all runs."""
    from dejavu.cluster.resilience import latency_rows, run_progress

    latency = latency_rows(expected, pasts["whole"], pasts["failure"], restart.latencies() if restart else {})
    progress = run_progress("whole", pasts["whole"]) + run_progress("failure", pasts["failure"])
    return latency, progress + (restart.progress() if restart else [])


def plain(row: Any) -> dict[str, Any]:
    """Give a row for JSON, which has no NaN."""
    return {name: None if value != value else value for name, value in asdict(row).items()}


def show(directory: Path, failures: list[FailureRecord], latency: list[Any], wrong: list[str]) -> None:
    """Print the failures, the latencies, and whether all outputs are right."""
    console = Console()
    columns = {"target": "failed", "rank": "rank", "kind": "kind", "injected_s": "at, s", "detected_s": "seen, s"}
    columns |= {"recovery_s": "took, s", "tokens_replayed": "tokens again", "prompts_recomputed": "prompts again"}
    console.print(rows_table([asdict(row) for row in failures], columns, title="Failures"))
    names = {"request_id": "request", "tokens": "tokens", "whole_s": "whole, s", "failure_s": "failure, s"}
    names["failure_ratio"] = "ratio"
    if any(row.restart_s == row.restart_s for row in latency):
        names |= {"restart_s": "restart, s", "restart_ratio": "its ratio"}
    console.print(rows_table([asdict(row) for row in latency], names, title="Latency"))
    verdict = f"{len(wrong)} of {len(latency)} outputs differ or are missing: {', '.join(wrong)}"
    console.print(verdict if wrong else f"All {len(latency)} outputs are the same.", highlight=False)
    console.print(f"Results in {directory}", soft_wrap=True, highlight=False)


def draw(rows: Sequence[Any], path: Path) -> None:
    """Draw the tokens of each run over time."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 5), layout="constrained")
    axes = figure.add_subplot()
    names = {"whole": "no failure", "failure": "failure, recovered in place", "restart": "failure, all restarts"}
    for run in dict.fromkeys(row.run for row in rows):
        line = [row for row in rows if row.run == run]
        axes.step([r.time_s for r in line], [r.tokens for r in line], where="post", label=names[run])
    axes.set(xlabel="time, s", ylabel="tokens given out", title="Progress with and without failures")
    axes.grid(visible=True, alpha=0.3)
    axes.legend()
    FigureCanvasAgg(figure).print_png(str(path))
