"""Hold the simulator's predictions against the engine: does `dejavu plan` choose by numbers that come true?

Each configuration serves a workload on the real engine, with controller, ranks, messages and all, and stages that wait
(`--synthetic`) instead of computing, so that few cores can play many devices. The simulator is told the same
configuration, the same requests, and what this machine adds. `hop_ms` and `admission_ms` are measured in the same job,
before and after, on a configuration of their own, and are the same for all configurations. `pass_overhead_ms` is what a
token pass took beyond its given time, in the mean of the very run, since it changes with whatever else the machine
does; prompts have their own, likewise. Of when passes begin, or requests get rows or tokens, the simulator is told
nothing. Differences are of the prediction, in percent of what was measured; `within` says whether throughput is within
3 % and the 95th percentile of normalized latency within 5 %, with swapping both within 10 %. `wrong` counts tokens that
were not what the synthetic stages make. The engines run one after the other in one job, on as many of its ranks as each
needs.
"""

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import rich_click as click

from dejavu.config import ServeConfig
from dejavu.errors import UsageError
from dejavu.measure.records import StepRecord, write_table
from dejavu.topology import CONTROLLER, required_ranks

from .driver import Row, finish, open_run_directory, run_ranks
from .predicted import (
    CASES,
    WAIVED,
    Case,
    Overheads,
    calibration,
    calibration_requests,
    compare,
    compare_requests,
    count_wrong,
    draw_requests,
    make_requests,
    measure_overheads,
    predict,
)

if TYPE_CHECKING:
    from dejavu.engine.setup import EngineSetup
    from dejavu.planning.lengths import Lengths
    from dejavu.planning.result import Result
    from dejavu.request import Completion
    from dejavu.transport.mpi import Channel

THROUGHPUT_PERCENT, LATENCY_PERCENT, SWAPPING_PERCENT = 3.0, 5.0, 10.0  # the targets
DEADLINE_S = 120.0
VOCAB_SIZE = 500


@dataclass(frozen=True, slots=True)
class Settings:
    """Hold the checked options."""

    cases: tuple[Case, ...]
    times_ms: tuple[float, float]
    num_requests: int
    seed: int

    @property
    def num_ranks(self) -> int:
        """Count the ranks of the largest configuration."""
        return required_ranks(self.calibration.config(self.times_ms))

    @property
    def calibration(self) -> Case:
        """Give the configuration to measure overheads on: a pipeline as deep as the cases have workers."""
        return calibration(max(case.config(self.times_ms).num_workers for case in self.cases))

    def draw(self, case: Case) -> "list[Lengths]":
        """Draw a case's requests."""
        return draw_requests(case, self.times_ms, self.num_requests, self.seed)


@click.command()
@click.option("--cases", default="all", show_default=True, help="Configurations to run, such as pp1,dp2-pp2.")
@click.option("--prompt-ms", default=50.0, show_default=True, type=click.FloatRange(1), help="Of a prompt in a stage.")
@click.option("--token-ms", default=16.0, show_default=True, type=click.FloatRange(1), help="Of a step in a stage.")
@click.option("--num-requests", default=12, show_default=True, type=click.IntRange(1), help="For each configuration.")
@click.option("--seed", default=0, show_default=True, type=click.IntRange(0), help="Seed of lengths and arrivals.")
@click.option("--out", help="The run directory.")
@click.pass_context
def command(context: click.Context, /, out: str | None, **options: Any) -> int:
    """Hold the simulator's predictions against the engine."""
    settings = make_settings(options)
    return run_ranks(context, settings.num_ranks, "validate", out, lambda: run_rank(settings, options, out))


def make_settings(options: dict[str, Any]) -> Settings:
    """Check the options; raise UsageError for a configuration that there is not."""
    known = {case.name: case for case in CASES}
    names = list(known) if options["cases"] == "all" else options["cases"].split(",")
    for name in names:
        if name not in known:
            raise UsageError(f"--cases names {name!r}, which is none of {', '.join(known)}")
    times_ms = options["prompt_ms"], options["token_ms"]
    return Settings(tuple(known[name] for name in names), times_ms, options["num_requests"], options["seed"])


def run_rank(settings: Settings, options: dict[str, Any], out: str | None) -> int:
    """Run one engine after the other; rank 0 says which, and compares."""
    from mpi4py import MPI

    from dejavu.transport.mpi import Channel

    channel = Channel(MPI.COMM_WORLD, DEADLINE_S)
    leads = channel.rank == CONTROLLER
    code = lead(channel, settings, options, out) if leads else follow(channel, settings)
    channel.close()
    return code


def follow(channel: "Channel", settings: Settings) -> int:
    """Be a worker of each engine that rank 0 calls for, until it calls for none."""
    from dejavu.cluster.participant import run_worker

    cases = {case.name: case for case in (settings.calibration, *settings.cases)}
    while name := channel.receive(CONTROLLER)[1]:
        run_worker(channel, make_setup(cases[name].config(settings.times_ms)))
    return 0


def make_setup(config: ServeConfig) -> "EngineSetup":
    """Check a configuration, with a vocabulary so small that sampling does not make the last stage slower."""
    from dejavu.cluster.job import prepare

    setup = prepare(config).setup
    return replace(setup, spec=replace(setup.spec, vocab_size=VOCAB_SIZE, eos_token_ids=()))


def lead(channel: "Channel", settings: Settings, options: dict[str, Any], out: str | None) -> int:
    """Measure every configuration between two calibrations, then predict; write what was found."""
    directory = open_run_directory("validate", out)
    before = calibrate(channel, settings)
    all_served = [serve(channel, case, settings, settings.draw(case)) for case in settings.cases]
    overheads = Overheads.average([before, calibrate(channel, settings)])
    for rank in range(1, channel.size):
        channel.send(rank, "")
    rows: list[Row] = []
    requests: list[Row] = []
    for case, served in zip(settings.cases, all_served, strict=True):
        config = case.config(settings.times_ms)
        own = overheads.with_passes(served.steps, settings.times_ms, chunked=config.prompt_chunk > 0)
        result = predict(config, settings.draw(case), own)
        rows.append(make_row(case, served, result, own))
        requests += compare_requests(case, result, served.completions)
    write_table(directory.path / "requests.csv", list(requests[0]), [list(each.values()) for each in requests])
    wrong = sum(row["wrong"] for row in rows)
    error = f"{wrong} tokens are not what the synthetic stages make: the engine mixes requests up" if wrong else None
    rows += [waived(rows[0], name, reason) for name, reason in WAIVED.items()]
    return finish(directory, "validate", rows, options, error=error)


@dataclass(frozen=True, slots=True)
class Served:
    """Hold what became of a configuration's requests."""

    completions: "list[Completion]"
    steps: list[StepRecord]
    wrong: int


def serve(channel: "Channel", case: Case, settings: Settings, lengths: "list[Lengths]") -> Served:
    """Let an engine serve requests; the ranks that it needs are told to take part."""
    from dejavu.cluster.engine import run_controller

    setup = make_setup(case.config(settings.times_ms))
    for rank in range(1, required_ranks(setup.config)):
        channel.send(rank, case.name)
    completions, outcome = run_controller(channel, setup, lambda c: c.generate(make_requests(lengths)))
    steps = [step for report in outcome.reports.values() for step in report.steps]
    return Served(completions, steps, count_wrong(completions, VOCAB_SIZE))


def calibrate(channel: "Channel", settings: Settings) -> Overheads:
    """Measure what the machine adds to the stages' times."""
    case = settings.calibration
    served = serve(channel, case, settings, calibration_requests(case, settings.times_ms))
    return measure_overheads(served.steps, served.completions, settings.times_ms)


def make_row(case: Case, served: Served, result: "Result", overheads: Overheads) -> Row:
    """Give the row of one configuration."""
    row = compare(result, served.completions)
    swaps = case.keys.get("swap", False)
    latency = abs(row["p95_normalized_latency_s_difference_percent"]) <= (
        SWAPPING_PERCENT if swaps else LATENCY_PERCENT
    )
    throughput = abs(row["requests_per_s_difference_percent"]) <= (SWAPPING_PERCENT if swaps else THROUGHPUT_PERCENT)
    return {
        "configuration": case.name,
        "requests": len(served.completions),
        "arrivals": "poisson" if case.load else "at once",
        **row,
        "within": latency and throughput,
        "wrong": served.wrong,
        "pass_overhead_ms": 1e3 * overheads.token_s,
        "hop_ms": 1e3 * overheads.hop_s,
        "admission_ms": 1e3 * overheads.admission_s,
        "note": "",
    }


def waived(like: Row, name: str, reason: str) -> Row:
    """Give the row of what cannot be measured yet."""
    return dict.fromkeys(like) | {"configuration": name, "note": reason}
