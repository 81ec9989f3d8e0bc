"""Serve in one fixed memory for KV without swapping, and with it in larger microbatches: the paper's Figure 9.

Without swapping the memory of a worker holds the rows of all D microbatches of a pipeline (arXiv 2403.01876, section
5.3); with it those of two, which have D/2 times the rows. A third run has the larger microbatches and memory for all of
them: against it every token is compared (`wrong`), its passes say how long the steps of the larger microbatches take,
from which the simulator and the closed form of `dejavu plan` predict, and it shows what swapping costs. By default
stages wait instead of computing, and fetches wait for a link of `--link-gbps`.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import product
from typing import TYPE_CHECKING, Any

import rich_click as click

from dejavu.config import ServeConfig, make_config
from dejavu.errors import UsageError
from dejavu.topology import CONTROLLER, required_ranks

from .driver import open_run_directory, run_ranks

if TYPE_CHECKING:
    from dejavu.cluster.engine import Outcome
    from dejavu.engine.controller import Controller
    from dejavu.measure.records import StepRecord, TransferRecord
    from dejavu.request import Completion, Request
    from dejavu.transport.mpi import Channel

RESIDENT = 2
ROUNDS = 2  # of the larger microbatches' rows, that requests fill
WAYS = ("plain", "swapped", "roomy")


@dataclass(frozen=True, slots=True)
class Case:
    """Name one point of the figure; `batch` is the largest microbatch that fits without swapping."""

    model: str
    stages: int
    prompt_len: int
    output_len: int
    batch: int

    @property
    def rows(self) -> int:
        """Count the rows that the memory holds."""
        return self.stages * self.batch

    @property
    def swapped_batch(self) -> int:
        """Count the rows of a microbatch of which two fit."""
        return self.rows // RESIDENT

    @property
    def num_requests(self) -> int:
        """Count the requests."""
        return ROUNDS * self.stages * self.swapped_batch


@dataclass(frozen=True, slots=True)
class Options:
    """Hold what was asked for."""

    cases: tuple[Case, ...]
    shared: dict[str, Any]  # of all configurations
    link_bytes_s: float
    is_synthetic: bool

    def config(self, case: Case, way: str) -> ServeConfig:
        """Make the engine's configuration of one way to serve a case."""
        shape = {"model": case.model, "pp": case.stages, "row_len": case.prompt_len + case.output_len}
        lengths = {"prompt_len": case.prompt_len, "output_len": case.output_len, "num_requests": case.num_requests}
        batch = case.batch if way == "plain" else case.swapped_batch
        more: dict[str, Any] = {"microbatch_size": batch}
        if self.is_synthetic:
            more["max_prompt_tokens"] = case.prompt_len  # a pass takes as long with any number of prompts: allow one
        if way == "swapped":
            more |= {"swap": True, "resident": RESIDENT}
            more |= {"synthetic_link": int(self.link_bytes_s)} if self.is_synthetic else {}
        return make_config({**self.shared, **shape, **lengths, **more})


@dataclass(frozen=True, slots=True)
class Served:
    """Hold what became of a case's requests in one way."""

    config: ServeConfig
    completions: "list[Completion]"
    steps: "list[StepRecord]"
    transfers: "list[TransferRecord]"
    kv_bytes: int  # of a worker's device memory
    token_bytes: int  # of the KV of one token on the fullest stage

    @property
    def makespan_s(self) -> float:
        """Give the time from the first arrival to the last token."""
        return max(c.finish_s for c in self.completions) - min(c.request.arrival_s for c in self.completions)

    @property
    def tokens_per_s(self) -> float:
        """Give the output tokens over the makespan."""
        return sum(len(c.token_ids) for c in self.completions) / self.makespan_s


@click.command()
@click.option("--models", default="opt-13b", show_default=True, help="Whose KV is swapped, such as opt-13b,opt-66b.")
@click.option("--stages", default="4,6", show_default=True, help="Depths of the pipeline.")
@click.option("--prompt-lens", default="64,256", show_default=True, help="Prompt tokens.")
@click.option("--output-lens", default="24", show_default=True, help="Output tokens.")
@click.option("--batch", default=2, show_default=True, type=click.IntRange(1), help="Largest microbatch without swap.")
@click.option(
    "--synthetic", default="20,20", show_default=True, metavar="MS,MS", help="A stage's prompt, step; or none."
)
@click.option("--link-gbps", default=8.0, show_default=True, type=click.FloatRange(0, min_open=True), help="One way.")
@click.option("--dtype", default="float16", show_default=True, help="As for `dejavu serve`.")
@click.option("--device", default="cpu", show_default=True, help="As for `dejavu serve`, with --synthetic none.")
@click.option("--threads", default=1, show_default=True, type=click.IntRange(0), help="CPU threads of each worker.")
@click.option("--out", help="The run directory.")
@click.pass_context
def command(context: click.Context, /, out: str | None, **given: Any) -> int:
    """Serve in one memory without swapping, and with it in larger microbatches."""
    options = make_options(given)
    ranks = max(case.stages for case in options.cases) + 1
    return run_ranks(context, ranks, "swapping", out, lambda: run_rank(options, given, out))


def make_options(given: dict[str, Any]) -> Options:
    """Read the command line; raise UsageError for what cannot be."""
    stages, prompts, outputs = (numbers(given[name], name) for name in ("stages", "prompt_lens", "output_lens"))
    if min(stages) <= RESIDENT:
        raise UsageError(f"--stages {min(stages)} swaps nothing: two microbatches fill it, so give at least 3")
    models = given["models"].split(",")
    cases = tuple(Case(*values, given["batch"]) for values in product(models, stages, prompts, outputs))
    shared = {name: given[name] for name in ("dtype", "threads", "device")} | {"load_format": "dummy"}
    is_synthetic = given["synthetic"] != "none"
    if is_synthetic:
        shared |= {"synthetic": given["synthetic"], "device": "cpu"}
    return Options(cases, shared, given["link_gbps"] * 1e9, is_synthetic)


def numbers(text: str, option: str) -> tuple[int, ...]:
    """Read a list such as 4,6."""
    try:
        values = tuple(int(part) for part in text.split(","))
    except ValueError:
        values = (0,)
    if min(values) < 1:
        raise UsageError(f"--{option.replace('_', '-')} {text!r}: give whole numbers above 0 such as 4,6")
    return values


def run_rank(options: Options, given: dict[str, Any], out: str | None) -> int:
    """Run one engine after the other; rank 0 says which, and reports."""
    from mpi4py import MPI

    from dejavu.cluster.participant import run_worker
    from dejavu.transport.mpi import Channel

    channel, code = Channel(MPI.COMM_WORLD, 300.0), 0
    if channel.rank == CONTROLLER:
        from .swapping_rows import report

        served = list(serve_all(channel, options))
        for rank in range(1, channel.size):
            channel.send(rank, None)
        code = report(open_run_directory("swapping", out), served, options, given)
    else:
        while setup := channel.receive(CONTROLLER)[1]:
            run_worker(channel, setup)
    channel.close()
    return code


def serve_all(channel: "Channel", options: Options) -> Iterator[tuple[Case, dict[str, Served]]]:
    """Serve every case in every way."""
    for case in options.cases:
        yield case, {way: serve(channel, options.config(case, way)) for way in WAYS}


def serve(channel: "Channel", config: ServeConfig) -> Served:
    """Let an engine serve the requests of a configuration, after a few that do not count."""
    from dejavu.cluster.engine import run_controller
    from dejavu.cluster.job import prepare

    job = prepare(config, required_ranks(config))
    for rank in range(1, required_ranks(config)):
        channel.send(rank, job.setup)
    completions, outcome = run_controller(channel, job.setup, lambda controller: drive(controller, job.requests))
    cache = job.setup.caches[0]
    began_s = min(completion.request.arrival_s for completion in completions)
    return Served(
        config,
        completions,
        [step for step in gather(outcome, "steps") if step.start_s >= began_s],
        [move for move in gather(outcome, "transfers") if move.start_s >= began_s],
        cache.pool_blocks * cache.block_bytes,
        cache.block_bytes // cache.block_size,
    )


def drive(controller: "Controller", requests: "Sequence[Request]") -> "list[Completion]":
    """Warm up with one request for each row, then serve all requests at once."""
    sampling, num_rows = replace(requests[0].sampling, max_tokens=3, ignore_eos=True), len(requests) // ROUNDS
    warm = [replace(r, request_id=f"warm {i}", sampling=sampling) for i, r in enumerate(requests[:num_rows])]
    controller.generate(warm)
    controller.wait_clean()
    start_s = controller.clock.now_s() + 0.02
    return controller.generate([replace(request, arrival_s=start_s) for request in requests])


def gather(outcome: "Outcome", name: str) -> list[Any]:
    """Gather the workers' records of a kind in the order of time."""
    records = [record for report in outcome.reports.values() for record in getattr(report, name)]
    return sorted(records, key=lambda record: record.start_s)
