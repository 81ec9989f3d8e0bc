"""Move KV caches over every carrier, at every level, and compare with a plain copy of the same bytes.

Regimes: `contiguous` finds what a carrier costs beside the link it uses; `prompt`, `token_step` and `microbatch` are
what serving moves, cut out of a pool and laid into another one; `many_pieces`, `put_flag` and `both_ways` ask for one
cost each: of posting, of signalling, of sharing the bus. Every row is measured beside its own ceiling, in turns with
it, and what arrived is compared byte for byte. docs/benchmarks.md explains each column and each ceiling.

Prints a table, what could not be run and why; writes microbench.csv and microbench.png; the last line is JSON. Exit
code 1 if any byte was wrong.
"""

import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import rich_click as click

from dejavu.errors import CapacityError, UsageError

from .driver import Row, finish, keep_rows, open_run_directory, print_table, run_ranks
from .shapes import (
    LINKS,
    SIGNAL_BYTES,
    STORES,
    CacheShape,
    Case,
    choose_cases,
    contiguous,
    list_cases,
    many_pieces,
    microbatch,
    parse_sizes,
)

if TYPE_CHECKING:
    from dejavu.transport.carrier import Carrier, Gathering

    from .links import RankWorld
    from .timing import Timing

NUM_RANKS = 2
SIZES = {"cpu": "4KiB,64KiB,1MiB,16MiB", "cuda": "4KiB,64KiB,1MiB,16MiB,20MiB,64MiB,256MiB,1GiB"}
MODELS = {"cpu": "opt-125m", "cuda": "opt-13b"}
PROMPT_LENS = {"cpu": 250, "cuda": 1000}
SLACK_BYTES = 1 << 20  # each message is rounded up in a store
WINDOW_BYTES, WIDEST = 1 << 30, 16
NCCL_WINDOW = 32  # of any size: each message has 0.3 ms of notes before and behind it
SMALL_BYTES = 64 << 10
SEED = 100


@dataclass(frozen=True, slots=True)
class Settings:
    """Hold what was asked for, with the defaults of the device filled in."""

    kind: str
    shape: CacheShape
    cases: tuple[Case, ...]
    repeats: int
    verbose: bool = False

    @property
    def transports(self) -> list[str]:
        """List the carriers that have cases."""
        return list(dict.fromkeys(case.transport for case in self.cases))

    def window(self, case: Case) -> int:
        """Give how many plain messages are under way together: on a CPU only small ones, since a copy takes a core."""
        if case.operation not in ("contiguous", "plain") or (self.kind == "cpu" and case.size > SMALL_BYTES):
            return 1
        if case.transport == "nccl":
            return NCCL_WINDOW
        return max(2, min(WIDEST, WINDOW_BYTES // case.size))

    def needed_bytes(self, case: Case) -> int:
        """Count the bytes that a case keeps in a store."""
        layout = self.shape.layout
        sizes = {"prompt": layout.total_bytes, "token_step": self.shape.batch * layout.bytes_per_token}
        sizes |= {"microbatch": layout.total_bytes, "many_pieces": many_pieces().nbytes}
        one = sizes.get(case.operation, case.size)
        return (self.window(case) + 1) * (one + SLACK_BYTES)


@click.command()
@click.option("--model", default="auto", show_default=True, help="Of the table; auto: opt-13b on GPUs, else opt-125m.")
@click.option("--batch", default=8, show_default=True, type=click.IntRange(1), help="Rows of the microbatch.")
@click.option("--prompt-len", type=click.IntRange(1), help="Tokens of each prompt  [default: GPUs 1000, CPUs 250]")
@click.option("--tp", default=1, show_default=True, type=click.IntRange(1), help="Tensor ranks that share the heads.")
@click.option("--pp", default=4, show_default=True, type=click.IntRange(1), help="Stages that share the layers.")
@click.option("--block-size", default=16, show_default=True, type=click.IntRange(1), help="Tokens of a block.")
@click.option("--transport", "transports", default="all", show_default=True, help="Carriers, such as ipc,local.")
@click.option("--sizes", default="auto", show_default=True, help="Plain messages, such as 4KiB,20MiB,1GiB.")
@click.option("--repeats", default=30, show_default=True, type=click.IntRange(3), help="Most repeats of a case.")
@click.option("--device", type=click.Choice(["auto", "cpu", "cuda"]), default="auto", show_default=True, help="Where.")
@click.option("--filter", "pattern", help="Only cases whose name holds this, or matches it (* and ?).")
@click.option("--list", "is_list", is_flag=True, help="Name the cases and stop.")
@click.option("--verbose", is_flag=True, help="Tell of each case when it begins and ends.")
@click.option("--out", help="The run directory.")
@click.pass_context
def command(context: click.Context, /, out: str | None, is_list: bool, **options: Any) -> int:
    """Measure KV streaming over every carrier against a plain copy."""
    settings = make_settings(options)
    if is_list:
        click.echo("\n".join(case.name for case in settings.cases))
        return 0
    return run_ranks(context, NUM_RANKS, "microbench", out, lambda: run_rank(settings, options, out))


def make_settings(options: Row) -> Settings:
    """Fill the defaults in and check. Raises UsageError."""
    from dejavu.device import num_cuda_devices

    kind = options["device"]
    if kind == "auto":
        kind = "cuda" if num_cuda_devices() else "cpu"
    model = MODELS[kind] if options["model"] == "auto" else options["model"]
    prompt_len = options["prompt_len"] or PROMPT_LENS[kind]
    shape = CacheShape(model, options["batch"], prompt_len, *(options[name] for name in ("tp", "pp", "block_size")))
    assert shape.layout.total_bytes > 0
    sizes = parse_sizes(SIZES[kind] if options["sizes"] == "auto" else options["sizes"])
    cases = choose_cases(list_cases(parse_transports(options["transports"]), sizes), options["pattern"])
    return Settings(kind, shape, tuple(cases), options["repeats"], bool(options.get("verbose")))


def parse_transports(text: str) -> list[str]:
    """Read the carriers' names."""
    known = [*STORES, *LINKS]
    names = known if text == "all" else [part.strip() for part in text.split(",")]
    for name in names:
        if name not in known:
            raise UsageError(f"no transport {name!r}: use all, or some of {', '.join(known)}")
    return names


@dataclass(slots=True)
class Report:
    """Collect the rows, and what could not be run."""

    rows: list[Row] = field(default_factory=list)
    waived: list[Row] = field(default_factory=list)

    def waive(self, cases: Sequence[Case], reason: str) -> None:
        """Note cases that this machine cannot run."""
        self.waived += [{"case": case.name, "reason": reason} for case in cases]

    @property
    def wrong(self) -> int:
        """Count the wrong bytes of all rows."""
        return sum(row["wrong"] for row in self.rows)


def run_rank(settings: Settings, options: Row, out: str | None) -> int:
    """Measure carrier after carrier; rank 0 reports."""
    from mpi4py import MPI

    from .links import RankWorld, choose_device

    if MPI.COMM_WORLD.size != NUM_RANKS:
        raise UsageError(f"microbench needs {NUM_RANKS} ranks, not {MPI.COMM_WORLD.size}: run mpirun -n {NUM_RANKS}")
    comm = MPI.COMM_WORLD.Dup()
    with choose_device(settings.kind, MPI.COMM_WORLD.Split_type(MPI.COMM_TYPE_SHARED).rank) as device:
        world = RankWorld(device, comm)
        names = comm.allgather(str(device))
        report = Report()
        for transport in settings.transports:
            run_transport(world, settings, transport, names, report)
        code = publish(report, settings, options, out, device.properties) if world.rank == 0 else 0
        world.share()
        world.close()
    return code


def run_transport(world: "RankWorld", settings: Settings, transport: str, names: list[str], report: Report) -> None:
    """Measure one carrier; a store on rank 0 alone."""
    from .links import rest_until_done, say_done

    cases = [case for case in settings.cases if case.transport == transport]
    if transport in LINKS:
        run_cases(world, settings, cases, names, report)
    elif world.rank > 0:
        rest_until_done(world)
    else:
        alone = world.alone()
        run_cases(alone, settings, cases, [names[0], "disk" if transport == "disk" else "host"], report)
        alone.close()
        say_done(world)


def run_cases(world: "RankWorld", settings: Settings, cases: list[Case], names: list[str], report: Report) -> None:
    """Open the carrier, and measure its cases."""
    from dejavu.transport.carrier import Gathering

    from .links import open_carriers

    gatherings = [each for each in Gathering if any(case.is_naive is (each is Gathering.NAIVE) for case in cases)]
    capacity = max(settings.needed_bytes(case) for case in cases)
    with open_carriers(cases[0].transport, world, gatherings, capacity) as carriers:
        if isinstance(carriers, str):
            report.waive(cases, carriers)
            return
        bench = Bench(world, settings, carriers, names, report)
        for case in cases:
            bench.run(case)
        bench.close()


class Bench:
    """Measure the cases of one carrier, each in turns with its ceiling."""

    def __init__(
        self,
        world: "RankWorld",
        settings: Settings,
        carriers: "dict[Gathering, Carrier]",
        names: list[str],
        report: Report,
    ) -> None:
        self.world = world
        self.settings = settings
        self.carriers = carriers
        self.names = names
        self.report = report
        self._ceilings: dict[tuple[Any, ...], Any] = {}
        self._plain: Carrier | None = None

    def run(self, case: Case) -> None:
        """Measure one case, and add its row."""
        from .links import agree

        begin_s = time.perf_counter()
        self._tell(f"{case.name} ...")
        load, reason = None, ""
        try:
            load = make_load(self.world, self.settings, case, self.carrier(case))
        except (CapacityError, MemoryError) as error:
            reason = str(error) or "there is too little memory"
        if reason := agree(self.world, reason):
            self.report.waive([case], reason)
        elif load is not None:
            timings, wrong = measure_load(self.world, load, self.ceiling(case, load), self.settings.repeats)
            self.report.rows.append(make_row(case, load, timings, self.names, wrong))
            if self.world.rank == 0:
                keep_rows("microbench", self.report.rows)
        if load is not None:
            self.world.share()  # no rank frees what another one still works with
            load.close()
        self._tell(f"{case.name}: {outcome(reason, self.report)}, {time.perf_counter() - begin_s:.1f} s in all")

    def _tell(self, line: str) -> None:
        """Say on standard error, where it was asked for, how far the run is."""
        if self.settings.verbose and self.world.rank == 0:
            click.echo(line, err=True)

    def carrier(self, case: Case) -> "Carrier":
        """Give the carrier that was opened for a case's level."""
        from dejavu.transport.carrier import Gathering

        if case.operation == "plain":
            return self.plain
        return self.carriers[Gathering.NAIVE if case.is_naive else Gathering.PACKED]

    @property
    def plain(self) -> "Carrier":
        """Give NCCL's own calls as a carrier; opened, by both ranks, for the first case that wants it."""
        from .plain_nccl import PlainNccl

        if self._plain is None:
            self._plain = PlainNccl(self.world.device, self.world.comm)
        return self._plain

    def ceiling(self, case: Case, load: Any) -> Any:
        """Give the plain transfer of the same bytes."""
        from .ceilings import make_ceiling

        key = (case.direction, load.nbytes, load.window)
        if key not in self._ceilings:
            self._ceilings[key] = make_ceiling(self.world, case.transport, *key, self.carrier(case))
        return self._ceilings[key]

    def close(self) -> None:
        """Free what the plain transfers hold."""
        self.world.share()
        for ceiling in self._ceilings.values():
            ceiling.close()
        if self._plain is not None:
            self._plain.close()


def outcome(reason: str, report: Report) -> str:
    """Say how a case ended, in one line."""
    if reason:
        return f"waived, {reason}"
    row = report.rows[-1]
    share = f"{row['percent_of_ceiling']:.0f} % of {row['ceiling_gbps']:.1f}"
    return f"{row['bandwidth_gbps']:.1f} GB/s, {share}, {row['wrong']} wrong"


def make_load(world: "RankWorld", settings: Settings, case: Case, carrier: "Carrier") -> Any:
    """Make this rank's part of a case."""
    from dejavu.kv.stream import Level

    from .cache_loads import PromptLoad, TokenStepLoad
    from .message_loads import MessageLoad
    from .signals import PutFlag

    if case.operation == "put_flag":
        return PutFlag(world, SIGNAL_BYTES)
    if case.operation in ("prompt", "token_step"):
        make = PromptLoad if case.operation == "prompt" else TokenStepLoad
        return make(world, carrier, settings.shape, case.direction, Level(case.optimization))
    shapes = {"microbatch": lambda: microbatch(settings.shape), "many_pieces": many_pieces}
    exchange = shapes.get(case.operation, lambda: contiguous(case.size))()
    return MessageLoad(world, carrier, exchange, case.direction, settings.window(case))


def measure_load(world: "RankWorld", load: Any, ceiling: Any, repeats: int) -> "tuple[list[Timing], int]":
    """Time a load and its ceiling, and count on all ranks what arrived wrong."""
    from .signals import PutFlag
    from .timing import measure

    if isinstance(load, PutFlag):
        timings = [load.measure(repeats), *measure(world, [ceiling], repeats)]
        wrong = load.count_wrong()
    else:
        load.refresh(SEED)
        timings = measure(world, [load, ceiling], repeats, lambda: load.refresh(SEED + 1))
        wrong = load.count_wrong(SEED + 1)
    return timings, int(sum(row[0] for row in world.share(float(wrong))))


def make_row(case: Case, load: Any, timings: "list[Timing]", names: list[str], wrong: int) -> Row:
    """Put one case and its ceiling into columns."""
    source, target = reversed(names) if case.direction == "in" else names
    arrow = "+".join(names) if case.direction == "both" else None
    gbps, ceiling_gbps = (load.nbytes / timing.each_s / 1e9 for timing in timings)
    return {
        "operation": case.operation,
        "transport": case.transport,
        "optimization": case.optimization,
        "source": arrow or source,
        "target": arrow or target,
        "bytes": load.nbytes,
        "pieces": load.num_pieces,
        "post_us": timings[0].median_post_s * 1e6,
        "latency_us_p50": timings[0].percentile(50) * 1e6,
        "latency_us_p99": timings[0].percentile(99) * 1e6,
        "bandwidth_gbps": gbps,
        "ceiling_gbps": ceiling_gbps,
        "percent_of_ceiling": 100 * gbps / ceiling_gbps,
        "wrong": wrong,
    }


def publish(report: Report, settings: Settings, options: Row, out: str | None, device: Any) -> int:
    """Write the files, print the tables and the JSON line; give the exit code."""
    from .plots import plot_bandwidth

    directory = open_run_directory("microbench", out)
    if report.rows:
        plot_bandwidth(report.rows, directory.path / "microbench.png", device.name)
    if report.waived:
        print_table("waived", list(fold(report.waived)))
    error = f"{report.wrong} bytes arrived wrong: see the column `wrong`" if report.wrong else None
    facts = {"device": device.name, "model_shape": settings.shape.model}
    return finish(directory, "microbench", report.rows, options, more={"waived": report.waived}, error=error, **facts)


def fold(waived: Sequence[Row]) -> Iterator[Row]:
    """Give one line for each reason and carrier."""
    for reason in dict.fromkeys((row["case"].split("/")[1], row["reason"]) for row in waived):
        names = [row["case"] for row in waived if (row["case"].split("/")[1], row["reason"]) == reason]
        shown = names[0] if len(names) == 1 else f"*/{reason[0]}/* ({len(names)} cases)"
        yield {"case": shown, "reason": reason[1]}
