"""Time whole generations beside another implementation: is the engine's own code fast?

Both sides generate greedily from the same prompts with the same weights, number format and threads, in one job and in
turns, so that a noisy machine slows both: the engine on its worker ranks, the peer on the controller's, while the other
one sleeps; on GPUs the peer uses the first one. Each time covers prompt and output. `ratio` is the median of the turns'
ratios, so above 1 the engine is faster. `host_us_per_step` is what the engine's busiest rank takes of its thread for a
pass: on a GPU, to queue and finish it. `same_tokens` is the share of requests whose tokens are equal: 1 in float32; in
16-bit formats near-ties may fall either way.
"""

import os
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import rich_click as click

from dejavu.config import ServeConfig, make_config
from dejavu.errors import UsageError
from dejavu.request import Request, SamplingParams
from dejavu.topology import CONTROLLER, required_ranks

from .driver import Row, finish, keep_rows, open_run_directory, run_ranks
from .peer import Generate, Tokens, load_peer

if TYPE_CHECKING:
    from dejavu.cluster.engine import Outcome
    from dejavu.engine.controller import Controller  # it starts MPI, which the process outside mpirun must not

WARM_UP_TOKENS = 4


@dataclass(frozen=True, slots=True)
class Case:
    """Name one size of generation."""

    batch: int
    prompt_len: int
    output_len: int


@click.command()
@click.option("--model", default="demo", show_default=True, help="As for `dejavu serve`.")
@click.option("--load-format", default="auto", show_default=True, help="As for `dejavu serve`.")
@click.option("--dtype", "dtypes", default="float32,bfloat16", show_default=True, help="Number formats to time.")
@click.option("--batch", "batches", default="1,8", show_default=True, help="Requests at once.")
@click.option("--prompt-len", default=128, show_default=True, type=click.IntRange(1), help="Prompt tokens of each.")
@click.option("--output-len", default=64, show_default=True, type=click.IntRange(2), help="Output tokens of each.")
@click.option("--threads", default=0, show_default=True, type=click.IntRange(0), help="Threads; 0 takes all cores.")
@click.option("--device", default="auto", show_default=True, help="As for `dejavu serve`.")
@click.option("--microbatches", default=0, show_default=True, help="Microbatches in flight; 0 is one per stage.")
@click.option("--pp", default=1, show_default=True, type=click.IntRange(1), help="Pipeline stages of the engine.")
@click.option("--tp", default=1, show_default=True, type=click.IntRange(1), help="Tensor ranks of the engine.")
@click.option(
    "--peer",
    type=click.Choice(["transformers", "none"]),
    default="none",
    show_default=True,
    help="To compare with.",
)
@click.option("--repeats", default=5, show_default=True, type=click.IntRange(1), help="Turns of each side.")
@click.option("--out", help="The run directory.")
@click.pass_context
def command(context: click.Context, /, out: str | None, **options: Any) -> int:
    """Time token generation beside another implementation."""
    configs = make_configs(options)
    return run_ranks(context, required_ranks(configs[0]), "generate", out, lambda: run_rank(configs, options, out))


def numbers(text: str, option: str) -> list[int]:
    """Read a list such as 1,8."""
    try:
        values = [int(part) for part in text.split(",")]
    except ValueError:
        values = []
    if not values or min(values) < 1:
        raise UsageError(f"{option} {text!r}: give whole numbers from 1 on, such as 1,8")
    return values


def make_configs(options: dict[str, Any]) -> list[ServeConfig]:
    """Make the engine's configuration for each number format: one row for each request of the largest batch."""
    largest = max(numbers(options["batches"], "--batch"))
    shared = {name: options[name] for name in ("model", "load_format", "device", "threads", "pp", "tp", "prompt_len")}
    in_flight = options["microbatches"] or options["pp"]
    rows = {
        "num_microbatches": in_flight,
        "microbatch_size": -(-largest // in_flight),
        "output_len": options["output_len"],
    }
    names = options["dtypes"].split(",")
    return [make_config({**shared, **rows, "num_requests": largest, "dtype": name.strip()}) for name in names]


def run_rank(configs: list[ServeConfig], options: dict[str, Any], out: str | None) -> int:
    """Run one engine after the other; rank 0 times them."""
    from mpi4py import MPI

    from dejavu.cluster.engine import run_controller
    from dejavu.cluster.job import prepare
    from dejavu.cluster.participant import run_worker
    from dejavu.transport.mpi import Channel

    channel = Channel(MPI.COMM_WORLD, 600.0)
    rows: list[Row] = []
    for config in configs:
        job = prepare(config, channel.size)
        if channel.rank == CONTROLLER:
            for rank in range(1, channel.size):
                channel.send(rank, None)  # go: a worker that began earlier would talk to the last engine's controller
            peer = load_peer(job.setup, options["peer"])
            drive = Timing(job.requests, options, job.setup.dtype, job.setup.device, peer)
            rows += with_host_time(*run_controller(channel, job.setup, drive, announce=print))
            keep_rows("generate", rows)
        else:
            channel.receive(CONTROLLER)
            run_worker(channel, job.setup)
    if channel.rank == CONTROLLER:
        finish(open_run_directory("generate", out), "generate", rows, options, peer_version=peer_version(options))
    channel.close()
    return 0


def with_host_time(rows: list[Row], outcome: "Outcome") -> list[Row]:
    """Add what the engine's slowest rank took of its thread for a pass: on a GPU, to queue it."""
    slowest_us = max(report.host_us_per_step for report in outcome.reports.values())
    return [{**row, "host_us_per_step": slowest_us} for row in rows]


def peer_version(options: dict[str, Any]) -> str | None:
    """Name the peer and its version."""
    from importlib.metadata import version

    return f"{options['peer']} {version(options['peer'])}" if options["peer"] != "none" else None


class Timing:
    """Time the cases of one engine, in turns with the peer."""

    def __init__(
        self,
        requests: tuple[Request, ...],
        options: dict[str, Any],
        dtype: str,
        device: str,
        peer: Generate | None,
    ) -> None:
        self.requests = requests
        self.options = options
        self.dtype = dtype
        self.device = device
        self.peer = peer
        self.serial = 0

    def __call__(self, controller: "Controller") -> list[Row]:
        """Warm both sides up, then give a row for each batch."""
        rows = []
        for batch in numbers(self.options["batches"], "--batch"):
            case = Case(batch, self.options["prompt_len"], self.options["output_len"])
            # What a GPU runs is loaded when it is first used: a whole turn meets all of it.
            warm_up_tokens = WARM_UP_TOKENS if self.device == "cpu" else case.output_len
            self.engine(controller, case, warm_up_tokens)
            if self.peer:
                self.peer(self.make_requests(case, warm_up_tokens))
            rows.append(self.measure(controller, case))
        return rows

    def make_requests(self, case: Case, output_len: int) -> list[Request]:
        """Give the case's prompts under names that were not used before."""
        self.serial += 1
        sampling = SamplingParams(max_tokens=output_len, ignore_eos=True)
        return [
            Request(f"{self.serial}/{request.request_id}", request.prompt_token_ids, sampling)
            for request in self.requests[: case.batch]
        ]

    def engine(self, controller: "Controller", case: Case, output_len: int) -> Tokens:
        """Generate on the worker ranks."""
        return [done.token_ids for done in controller.generate(self.make_requests(case, output_len))]

    def measure(self, controller: "Controller", case: Case) -> Row:
        """Time one case; the engine and the peer take turns."""
        own_s, peer_s, same = [], [], []
        for _ in range(self.options["repeats"]):
            seconds, tokens = timed(lambda: self.engine(controller, case, case.output_len))
            own_s.append(seconds)
            if self.peer:
                peer = self.peer
                requests = self.make_requests(case, case.output_len)
                seconds, peer_tokens = timed(lambda: peer(requests))  # noqa: B023 (called at once)
                peer_s.append(seconds)
                same += [mine == other for mine, other in zip(tokens, peer_tokens, strict=True)]
        return self.row(case, own_s, peer_s, same)

    def row(self, case: Case, own_s: list[float], peer_s: list[float], same: list[bool]) -> Row:
        """Put one case's times into columns."""
        count = case.batch * case.output_len
        ratios = sorted(peer / own for own, peer in zip(own_s, peer_s, strict=False))
        return {
            "batch": case.batch,
            "prompt_len": case.prompt_len,
            "output_len": case.output_len,
            "threads": self.options["threads"] or len(os.sched_getaffinity(0)),
            "dtype": self.dtype,
            "device": self.device,
            "pp": self.options["pp"],
            "tp": self.options["tp"],
            "tokens_per_s": count / statistics.median(own_s),
            "peer_tokens_per_s": count / statistics.median(peer_s) if peer_s else None,
            "ratio": statistics.median(ratios) if ratios else None,
            "ratio_min": ratios[0] if ratios else None,
            "ratio_max": ratios[-1] if ratios else None,
            "same_tokens": sum(same) / len(same) if same else None,
        }


def timed(work: Callable[[], Tokens]) -> tuple[float, Tokens]:
    """Give the seconds that `work` took, and its result."""
    start = time.perf_counter()
    result = work()
    return time.perf_counter() - start, result
