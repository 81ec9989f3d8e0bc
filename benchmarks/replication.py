"""Measure what replication costs a token step: rounds with and without it, in turn, in one engine.

The same requests are served again and again; in every other round the replicas are left alone. A step's period is the
time from one token pass of a microbatch to its next at the first stage; the pipeline is kept full, so whatever keeps a
rank busy lengthens it. `cost_percent` is the median over pairs of rounds, `copy_us` what the records say that a pass's
copy took (on a CPU all of its work, on a GPU the time until it was seen to be done). `cpu_percent` is replication's
part of the processor time of the ranks' main threads, which other work on the machine blurs less. `wrong` counts tokens
that differ between rounds, `bytes_step` has to be what the rows' new tokens take.
"""

import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from statistics import median, quantiles
from typing import TYPE_CHECKING, Any

import rich_click as click

from dejavu.config import ServeConfig, make_config
from dejavu.topology import CONTROLLER, required_ranks

from .driver import finish, open_run_directory, run_ranks

if TYPE_CHECKING:
    from dejavu.engine.controller import Controller
    from dejavu.engine.disk import DiskMover
    from dejavu.engine.messages import Report, Work
    from dejavu.engine.replication import PassFollower
    from dejavu.request import Completion, Request

WITHOUT, WITH = "without", "with"
WARM = f"{WITH} warm"


@dataclass(frozen=True, slots=True)
class Round:
    """Hold what one round of requests gave."""

    way: str
    start_s: float
    end_s: float
    tokens: tuple[tuple[int, ...], ...]


@click.command()
@click.option("--model", default="demo", show_default=True, help="As for `dejavu serve`.")
@click.option("--load-format", default="auto", show_default=True, help="As for `dejavu serve`.")
@click.option("--device", default="auto", show_default=True, help="As for `dejavu serve`.")
@click.option("--dtype", default="auto", show_default=True, help="As for `dejavu serve`.")
@click.option("--pp", default=2, show_default=True, type=click.IntRange(1), help="Stages.")
@click.option("--batch", default=4, show_default=True, type=click.IntRange(1), help="Rows of a microbatch.")
@click.option("--block-size", default=0, show_default=True, type=click.IntRange(0), help="As for `dejavu serve`.")
@click.option("--prompt-len", default=128, show_default=True, type=click.IntRange(1), help="Prompt tokens.")
@click.option("--output-len", default=48, show_default=True, type=click.IntRange(4), help="Output tokens.")
@click.option("--rounds", default=10, show_default=True, type=click.IntRange(1), help="Pairs of rounds.")
@click.option("--threads", default=1, show_default=True, type=click.IntRange(0), help="CPU threads of each worker.")
@click.option("--transport", default="auto", show_default=True, help="--replica-transport of `dejavu serve`.")
@click.option("--kv-disk", help="Measure what keeping KV in this directory costs, in place of replicas in memory.")
@click.option("--out", help="The run directory.")
@click.pass_context
def command(context: click.Context, /, out: str | None, rounds: int, **given: Any) -> int:
    """Measure what replication costs a token step."""
    config = configure(given)
    ranks = required_ranks(config)
    return run_ranks(context, ranks, "replication", out, lambda: run_rank(config, rounds, {**given, "rounds": rounds}))


def configure(given: dict[str, Any]) -> ServeConfig:
    """Make the engine's configuration: a request for every row, one microbatch in flight for each stage."""
    names = {"batch": "microbatch_size", "transport": "replica_transport"}
    values = {names.get(name, name): value for name, value in given.items()}
    row_len = given["prompt_len"] + given["output_len"]
    way = {"replicate": "off" if given.get("kv_disk") else "ring"}
    return make_config({**values, **way, "row_len": row_len, "num_requests": given["pp"] * given["batch"]})


def run_rank(config: ServeConfig, rounds: int, given: dict[str, Any]) -> int:
    """Be the controller, which measures, or a worker."""
    from mpi4py import MPI

    from dejavu.cluster.engine import run_controller
    from dejavu.cluster.job import prepare
    from dejavu.cluster.participant import run_worker
    from dejavu.transport.mpi import Channel

    channel: Channel = Channel(MPI.COMM_WORLD, 300.0)
    code = 0
    if channel.rank == CONTROLLER:
        directory = open_run_directory("replication", None)
        job = prepare(config, channel.size)
        for rank in range(1, channel.size):
            channel.send(rank, job.setup)
        served, outcome = run_controller(channel, job.setup, lambda c: serve_rounds(c, job.requests, rounds))
        meters = [channel.receive(rank, channel.deadline_s)[1] for rank in range(1, channel.size)]
        cache = job.setup.caches[0]
        row = make_row(config, served, list(outcome.reports.values()), cache.block_bytes // cache.block_size)
        row |= share(meters)
        error = "a token differs with replication" if row["wrong"] else None
        code = finish(directory, "replication", [row], given, error=error)
    else:
        meter = meter_rounds(on_disk=config.kv_disk is not None)
        run_worker(channel, channel.receive(CONTROLLER)[1])
        channel.send(CONTROLLER, meter)
    channel.close()
    return code


@dataclass(slots=True)
class Meter:
    """Add up the processor time of a rank's main thread in token passes, and that which replication took of it.

    `threads_s` is that of the thread that writes to the disk.
    """

    num_passes: int = 0
    passes_s: float = 0.0
    replication_s: float = 0.0
    threads_s: float = 0.0


def meter_rounds(*, on_disk: bool) -> Meter:
    """Have this rank's replicators leave out the passes of rounds without replication, and meter the others."""
    from dejavu.engine.disk import DiskMover
    from dejavu.engine.replication import PassFollower
    from dejavu.engine.worker import Worker

    kind: Any = DiskMover if on_disk else PassFollower
    end, look, step, write = kind.end, kind.look, Worker.step, DiskMover.write
    muted, meter, metered = set[int](), Meter(), [False]

    def end_unmuted(self: "DiskMover | PassFollower", work: "Work") -> None:
        muted.update(a.serial for a in work.admissions if a.request.request_id.startswith(WITHOUT))
        metered[0] = work.rows[0].serial not in muted and work.kind == "token"
        if work.rows[0].serial not in muted:
            begun_s = time.thread_time()
            end(self, work)
            meter.replication_s += (time.thread_time() - begun_s) * metered[0]

    def look_metered(self: "DiskMover | PassFollower") -> float:
        begun_s = time.thread_time()
        pause_s: float = look(self)
        meter.replication_s += (time.thread_time() - begun_s) * metered[0]
        return pause_s

    def step_metered(self: "Worker", work: "Work") -> None:
        begun_s = time.thread_time()
        step(self, work)
        meter.num_passes += metered[0]
        meter.passes_s += (time.thread_time() - begun_s) * metered[0]

    def write_metered(self: "DiskMover", *arguments: Any) -> Any:
        begun_s = time.thread_time()
        written = write(self, *arguments)
        meter.threads_s += (time.thread_time() - begun_s) * metered[0]
        return written

    kind.end, kind.look = end_unmuted, look_metered
    Worker.step, DiskMover.write = step_metered, write_metered  # type: ignore[assignment, method-assign]
    return meter


def serve_rounds(controller: "Controller", requests: "Sequence[Request]", rounds: int) -> list[Round]:
    """Serve the requests in each round, after a warm-up."""
    serve_round(controller, requests, WARM)
    served = []
    for number in range(rounds):
        ways = (WITHOUT, WITH) if number % 2 else (WITH, WITHOUT)
        served += [serve_round(controller, requests, f"{way} {number}") for way in ways]
    return served


def serve_round(controller: "Controller", requests: "Sequence[Request]", name: str) -> Round:
    """Serve the requests once, all at once."""
    controller.wait_clean()
    start_s = controller.clock.now_s()
    done: list[Completion] = controller.generate(
        [
            replace(
                request,
                request_id=f"{name} {index}",
                arrival_s=start_s,
                sampling=replace(request.sampling, ignore_eos=True),
            )
            for index, request in enumerate(requests)
        ]
    )
    tokens = tuple(tuple(completion.token_ids) for completion in done)
    return Round(name.split()[0], start_s, controller.clock.now_s(), tokens)


def make_row(config: ServeConfig, rounds: Sequence[Round], reports: "Sequence[Report]", token_bytes: int) -> Any:
    """Compare the rounds of either way."""
    periods = {
        way: [median_period(config, each, reports) for each in rounds if each.way == way] for way in (WITHOUT, WITH)
    }
    costs = [100 * (on / off - 1) for on, off in zip(periods[WITH], periods[WITHOUT], strict=True)]
    expected = config.microbatch_size * token_bytes
    transfers = [move for report in reports for move in report.transfers]
    steps = [move for move in transfers if move.bytes <= expected] or transfers  # several steps may go together
    low, _, high = quantiles(costs, n=4) if len(costs) > 1 else (costs[0],) * 3
    return {
        "model": config.model,
        "stages": config.pp,
        "rows": config.microbatch_size,
        "period_without_ms": 1e3 * median(periods[WITHOUT]),
        "period_with_ms": 1e3 * median(periods[WITH]),
        "cost_percent": median(costs),
        "cost_low_percent": low,
        "cost_high_percent": high,
        "copy_us": 1e6 * median(move.end_s - move.start_s for move in steps),
        "bytes_step": median(move.bytes for move in steps),
        "expected_bytes_step": expected,
        "wrong": sum(count_differing(each, rounds[0]) for each in rounds),
    }


def share(meters: Sequence[Meter]) -> dict[str, Any]:
    """Give what replication takes of a rank's processor time in token passes: what a busy machine does not blur."""
    num_passes = sum(meter.num_passes for meter in meters)
    replication_s, passes_s = sum(meter.replication_s for meter in meters), sum(meter.passes_s for meter in meters)
    return {
        "pass_cpu_us": 1e6 * passes_s / num_passes,
        "replication_cpu_us": 1e6 * replication_s / num_passes,
        "cpu_percent": 100 * replication_s / passes_s,
        "threads_cpu_us": 1e6 * sum(meter.threads_s for meter in meters) / num_passes,
    }


def count_differing(one: Round, other: Round) -> int:
    """Count the tokens in which two rounds differ."""
    pairs = zip(one.tokens, other.tokens, strict=True)
    return sum(a != b for here, there in pairs for a, b in zip(here, there, strict=True))


def median_period(config: ServeConfig, each: Round, reports: "Sequence[Report]") -> float:
    """Give the median seconds between token passes of a microbatch at the first stage, in one round."""
    steps = [s for report in reports for s in report.steps if s.stage == 0 and each.start_s <= s.start_s < each.end_s]
    starts: dict[int, list[float]] = {}
    for step in sorted(steps, key=lambda step: step.start_s):
        if step.kind == "token" and step.num_rows == config.microbatch_size:
            starts.setdefault(step.microbatch, []).append(step.start_s)
    return median(b - a for times in starts.values() for a, b in pairwise(times))
