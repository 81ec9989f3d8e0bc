"""Serve one workload with prompts and tokens in one pipeline, and in two, on the same ranks: the paper's Figure 8.

Four arrangements take turns in one job: a colocated pipeline with whole prompts (the paper's baseline, arXiv
2403.01876), one with prompts in chunks, colocated pipelines side by side, and a prompt pipeline beside a token
pipeline. Each serves the same requests all at once and at the given rates. By default stages wait instead of computing,
so that schedules are measured and not two cores. Every request's tokens have to be the baseline's: `wrong` counts those
that are not. The closed form knows nothing of overheads; the simulator is told how long passes really took.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

import rich_click as click
from click.core import ParameterSource

from dejavu.config import ServeConfig, make_config
from dejavu.errors import UsageError
from dejavu.measure.summary import Limits
from dejavu.measure.trace import Tracks
from dejavu.planning.lengths import Lengths
from dejavu.request import Completion, Request, SamplingParams
from dejavu.topology import CONTROLLER

from .arrangements import OTHERS, Arrangement, Times, colocated_arrangements, disaggregated, parse_split, plan_split
from .driver import open_run_directory, run_ranks
from .streaming_cost import Probe, probe

if TYPE_CHECKING:
    from dejavu.cluster.engine import Outcome
    from dejavu.engine.controller import Controller
    from dejavu.measure.records import StepRecord
    from dejavu.transport.mpi import Channel

AT_ONCE = 0.0  # the rate of requests that all arrive together
WARM_UP = 3  # output tokens
LEAD_S = 0.02  # from a workload's submission to its first arrival
OWN = {"pp", "dp", "prompt_pp", "token_pp", "prompt_chunk", "workload", "row_len", "rate", "out", "name"}
SPREAD = 0.6  # of the logarithm of output lengths: a choice between equal lengths and the long tail of chats


@dataclass(frozen=True, slots=True)
class Options:
    """Hold what was asked for."""

    times: Times | None  # None computes a real model
    model: str
    dtype: str
    workers: int
    dp: int
    beside: tuple[str, ...]  # arrangements other than the two that are compared
    chunk: int
    split: str | None
    microbatch_size: int
    token_microbatch_size: int
    num_requests: int
    prompt_len: int
    output_len: int
    outputs: str
    rates: tuple[float, ...]
    seed: int
    transport: str
    threads: int
    limits: Limits = field(default_factory=Limits)
    more: dict[str, Any] = field(default_factory=dict)  # further keys of the engine's configuration

    @property
    def fixed(self) -> dict[str, Any]:
        """Give what all arrangements share."""
        shared = ("model", "dtype", "microbatch_size", "num_requests", "prompt_len", "output_len", "seed", "threads")
        values = {name: getattr(self, name) for name in (*shared, "transport")} | self.more
        if self.times:
            return values | {"load_format": "dummy", "max_prompt_tokens": self.prompt_len}  # one prompt in a pass
        return values


@dataclass(frozen=True, slots=True)
class Workload:
    """Hold requests as they were served at one rate, with their arrivals counted from the first possible one."""

    rate: float
    lengths: tuple[Lengths, ...]
    completions: tuple[Completion, ...]
    start_s: float

    @property
    def end_s(self) -> float:
        """Give when the last token came, on the run's clock."""
        return max(completion.finish_s for completion in self.completions)


@dataclass(frozen=True, slots=True)
class Served:
    """Hold what one arrangement did."""

    arrangement: Arrangement
    config: ServeConfig
    tracks: Tracks
    workloads: tuple[Workload, ...]
    steps: tuple["StepRecord", ...]
    probes: tuple[Probe, ...] = ()  # of what streaming costs a prompt pass, where KV is streamed

    def steps_of(self, workload: Workload) -> list["StepRecord"]:
        """Give the passes of one workload."""
        return [step for step in self.steps if workload.start_s <= step.start_s <= workload.end_s]


@click.command(context_settings={"ignore_unknown_options": True})
@click.option("--workers", default=4, show_default=True, type=click.IntRange(2), help="Ranks to share out.")
@click.option("--split", metavar="P,T", help="Prompt and token stages  [default: by the paper's closed form]")
@click.option("--dp", default=2, show_default=True, type=click.IntRange(1), help="Pipelines side by side.")
@click.option("--beside", default=",".join(OTHERS), show_default=True, help="Further colocated layouts; or none.")
@click.option("--prompt-chunk", "chunk", type=click.IntRange(2), help="Tokens of a chunk  [default: a quarter]")
@click.option("--synthetic", default="200,20", show_default=True, metavar="MS,MS", help="A prompt, a step; or none.")
@click.option("--model", help="As for `dejavu serve`; computes unless --synthetic is given too.")
@click.option("--dtype", default="float32", show_default=True, help="As for `dejavu serve`.")
@click.option("--threads", default=1, show_default=True, type=click.IntRange(0), help="CPU threads of each worker.")
@click.option("--transport", default="ipc", show_default=True, help="As for `dejavu serve`.")
@click.option("--microbatch-size", default=1, show_default=True, type=click.IntRange(1), help="Rows of a microbatch.")
@click.option("--token-microbatch-size", default=0, type=click.IntRange(0), help="Disaggregated; 0 is the same.")
@click.option("--num-requests", default=16, show_default=True, type=click.IntRange(1), help="Requests of a workload.")
@click.option("--prompt-len", default=64, show_default=True, type=click.IntRange(1), help="Tokens of each prompt.")
@click.option("--output-len", default=10, show_default=True, type=click.IntRange(2), help="Mean tokens of an output.")
@click.option("--outputs", type=click.Choice(["lmsys", "fixed"]), default="lmsys", help="Log-normal, or all the same.")
@click.option("--rates", default="5,10", show_default=True, help="Requests per second, beside all at once; or none.")
@click.option("--seed", default=0, show_default=True, help="Of lengths, prompts and arrivals.")
@click.option("--ttft", type=click.FloatRange(0, min_open=True), help="Limit for the goodput: ms to the first token.")
@click.option("--tpot", type=click.FloatRange(0, min_open=True), help="Limit for the goodput: ms per later token.")
@click.option("--out", help="The run directory.")
@click.argument("serve_options", nargs=-1, type=click.UNPROCESSED)
@click.pass_context
def command(context: click.Context, /, out: str | None, **given: Any) -> int:
    """Serve prompts and tokens in one pipeline and in two, on the same ranks.

    Further options of `dejavu serve`, such as --load-format dummy, are handed on.
    """
    synthetic = context.get_parameter_source("synthetic") is not ParameterSource.DEFAULT
    options = make_options(given, synthetic=synthetic or not given["model"])
    return run_ranks(context, options.workers + 1, "disaggregation", out, lambda: run_rank(options, given, out))


def make_options(given: dict[str, Any], *, synthetic: bool) -> Options:
    """Read the command line; raise UsageError for what cannot be."""
    workers, dp = given["workers"], given["dp"]
    if workers % dp:
        raise UsageError(f"--dp {dp} does not divide {workers} workers: give a divisor")
    if given["split"]:
        parse_split(given["split"], workers)
    pair = numbers(given["synthetic"], "--synthetic") if synthetic else ()
    if synthetic and len(pair) not in (0, 2):
        raise UsageError(f"--synthetic has {len(pair)} numbers: give PROMPT_MS,TOKEN_MS such as 200,20, or none")
    chunk = given["chunk"] or max(2, given["prompt_len"] // 4)
    beside = () if given["beside"] == "none" else tuple(given["beside"].split(","))
    if unknown := set(beside) - set(OTHERS):
        raise UsageError(f"--beside has {min(unknown)!r}: choose among {', '.join(OTHERS)}, or none")
    read = ("chunk", "beside", "rates", "model", "synthetic", "ttft", "tpot", "serve_options")
    kept = {name: value for name, value in given.items() if name not in read}
    return Options(
        times=Times(pair[0] / 1e3, pair[1] / 1e3) if pair else None,
        model=given["model"] or ("gpt2" if pair else "demo"),
        beside=beside,
        chunk=chunk,
        rates=(AT_ONCE, *numbers(given["rates"], "--rates")),
        limits=Limits.of_ms(given["ttft"], given["tpot"]),
        more=further_keys(given["serve_options"]),
        **kept,
    )


def further_keys(arguments: Sequence[str]) -> dict[str, Any]:
    """Read options of `dejavu serve`; raise UsageError for what is none, or what the arrangements differ in."""
    words = [part for argument in arguments for part in argument.split("=", 1)]
    if len(words) % 2 or any(not name.startswith("--") for name in words[::2]):
        raise UsageError(f"{' '.join(arguments)!r} is no list of options: write --name value, as for `dejavu serve`")
    keys = {
        name.removeprefix("--").replace("-", "_"): value for name, value in zip(words[::2], words[1::2], strict=True)
    }
    if own := [name for name in keys if name in OWN]:
        raise UsageError(f"--{own[0].replace('_', '-')} is what the arrangements differ in, or share: leave it out")
    make_config(keys)
    return keys


def numbers(text: str, option: str) -> tuple[float, ...]:
    """Read a list such as 5,10, or the word none."""
    try:
        values = () if text == "none" else tuple(float(part) for part in text.split(","))
    except ValueError:
        values = (0.0,)
    if not all(0 < value < float("inf") for value in values):
        raise UsageError(f"{option} {text!r}: give numbers above 0 such as 5,10, or the word none")
    return values


def output_lengths(options: Options) -> list[int]:
    """Draw the output tokens of each request: log-normal with the given mean, or that for all."""
    import numpy as np

    from dejavu.planning.trace import LogNormal

    if options.outputs == "fixed":
        return [options.output_len] * options.num_requests
    median = options.output_len / float(np.exp(SPREAD**2 / 2))
    drawn = LogNormal(median, SPREAD, 4 * options.output_len).draw(
        np.random.default_rng(options.seed), options.num_requests
    )
    return [max(2, length) for length in drawn]


def make_lengths(options: Options, rate: float) -> tuple[Lengths, ...]:
    """Give the requests of a workload; at a rate they arrive as a Poisson process, whose gaps scale with it."""
    from dejavu.planning.trace import TraceEntry, with_rate

    entries = [TraceEntry(Lengths(options.prompt_len, output)) for output in output_lengths(options)]
    return tuple(entry.lengths for entry in (with_rate(entries, rate, options.seed) if rate else entries))


def run_rank(options: Options, given: dict[str, Any], out: str | None) -> int:
    """Run one arrangement after the other; rank 0 drives and reports, the others work until there is no further one."""
    from mpi4py import MPI

    from dejavu.cluster.participant import run_worker
    from dejavu.transport.mpi import Channel

    channel, code = Channel(MPI.COMM_WORLD, 120.0), 0
    if channel.rank == CONTROLLER:
        from .comparison import report

        served = serve_all(channel, options)
        code = report(open_run_directory("disaggregation", out), served, options, given)
    else:
        while setup := channel.receive(CONTROLLER)[1]:
            run_worker(channel, setup)
    channel.close()
    return code


def serve_all(channel: "Channel", options: Options) -> list[Served]:
    """Serve the workloads with each arrangement; the baseline's times decide the split of the last one."""
    colocated = colocated_arrangements(options.workers, options.dp, options.chunk)
    wanted = [each for each in colocated if each is colocated[0] or each.name in options.beside]
    served = [serve(channel, arrangement, options) for arrangement in wanted]
    served.append(serve(channel, disaggregated(choose_split(options, served[0])), options))
    for rank in range(1, channel.size):
        channel.send(rank, None)
    return served


def choose_split(options: Options, baseline: Served) -> tuple[int, int]:
    """Take the given split, or the paper's; times that were not given are the baseline's."""
    if options.split:
        return parse_split(options.split, options.workers)
    from .passes import fit_passes

    times = options.times
    if times is None:
        steps = baseline.steps_of(baseline.workloads[0])
        measured = fit_passes(steps, 0, options.workers)
        times = Times(measured.prompt_s * options.workers, measured.token_s * options.workers)
    lengths = output_lengths(options)
    mean_steps = sum(lengths) / len(lengths) - 1
    return plan_split(options.workers, options.microbatch_size, options.prompt_len, mean_steps, times)


def serve(channel: "Channel", arrangement: Arrangement, options: Options) -> Served:
    """Start an engine, warm it up, serve every workload, end it."""
    from dejavu.cluster.engine import run_controller
    from dejavu.cluster.job import prepare

    longest = max(output_lengths(options))
    fixed = options.fixed | {"row_len": options.prompt_len + longest}
    config = arrangement.config(fixed, options.times, options.token_microbatch_size)
    job = prepare(config, channel.size)
    for rank in range(1, channel.size):
        channel.send(rank, job.setup)
    drive = Drive(job.requests, options, config)
    workloads, outcome = run_controller(channel, job.setup, drive)
    click.echo(f"{arrangement.name} done: all at once in {workloads[0].end_s - workloads[0].start_s:.2f} s")
    tracks = Tracks.of(job.setup.topology)
    return Served(arrangement, config, tracks, tuple(workloads), all_steps(outcome), drive.probes)


def all_steps(outcome: "Outcome") -> tuple["StepRecord", ...]:
    """Gather the workers' passes in the order of time."""
    steps = [step for report in outcome.reports.values() for step in report.steps]
    return tuple(sorted(steps, key=lambda step: step.start_s))


class Drive:
    """Serve the workloads one after the other on a running engine."""

    def __init__(self, requests: Sequence[Request], options: Options, config: ServeConfig) -> None:
        self.requests = requests
        self.options = options
        self.config = config
        self.probes: tuple[Probe, ...] = ()

    def __call__(self, controller: "Controller") -> list[Workload]:
        """Warm up, then serve each workload alone."""
        controller.generate([self.request("warm", index, WARM_UP) for index in range(self.num_warm)])
        if self.config.is_disaggregated and not self.options.times:
            self.probes = probe(controller, self.request)
        return [self.serve(controller, rate) for rate in self.options.rates]

    @property
    def num_warm(self) -> int:
        """Give the requests that bring every worker to work; one for each row where they really compute."""
        return self.options.workers if self.options.times else sum(s.num_rows for s in self.config.pipeline_shapes)

    def serve(self, controller: "Controller", rate: float) -> Workload:
        """Serve the requests at one rate to their end."""
        controller.wait_clean()
        lengths = make_lengths(self.options, rate)
        start_s = controller.clock.now_s() + LEAD_S
        later = [each._replace(arrival_s=each.arrival_s + start_s) for each in lengths]
        name = f"{rate:g}"
        requests = [self.request(name, index, each.output_tokens, each.arrival_s) for index, each in enumerate(later)]
        return Workload(rate, lengths, tuple(controller.generate(requests)), start_s)

    def request(self, name: str, index: int, output_tokens: int, arrival_s: float = 0.0) -> Request:
        """Make a request with the workload's prompt number `index`."""
        sampling = SamplingParams(max_tokens=output_tokens, ignore_eos=True)
        prompt = self.requests[index % len(self.requests)]
        return replace(prompt, request_id=f"{name}/{index}", sampling=sampling, arrival_s=arrival_s)
