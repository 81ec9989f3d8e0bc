"""Move swapped KV between a device and host memory, and see what of the link it uses and what it costs compute.

The paper's swapping (arXiv 2403.01876, section 4.2) lives on both directions of the host link at once, beside compute.
`fetch` brings in all rows of a microbatch, `flush` takes out as many new tokens (finished prompts), `both` does both at
once, and `token` flushes one new token of every row. Their ceilings are contiguous copies of as many bytes, in the same
directions. `step` runs token steps of a stage with and without swapping of `--microbatches` microbatches, two of them
resident, at contexts whose fetches take so many percent of a step (`--loads`). Every byte that was moved is compared:
`wrong` counts those that differ.
"""

import statistics
import time
from collections.abc import Callable
from contextlib import ExitStack, closing
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import rich_click as click

from dejavu.errors import UsageError

from .driver import Row, finish, open_run_directory
from .swap_memory import RESIDENT, Settings, SwapMemory

if TYPE_CHECKING:
    from dejavu.device import Stream
    from dejavu.kv.swap import Lanes, Part

AT_ONCE = 8  # transfers of a kind that are queued together: a serving rank has the next one ready, too
DEFAULTS = {
    "cpu": {"model": "opt-125m", "pp": 4, "batch": 4, "context": 250, "dtype": "float32", "block_tokens": 0},
    "cuda": {"model": "opt-13b", "pp": 4, "batch": 8, "context": 500, "dtype": "float16", "block_tokens": 32},
}
COLUMNS = (
    "operation",
    "bytes",
    "ms",
    "device_ms",
    "bandwidth_gbps",
    "ceiling_gbps",
    "percent_of_ceiling",
    "load_percent",
    "link_percent",
    "alone_ms",
    "step_ms",
    "slowdown_percent",
    "plain_slowdown_percent",
    "stall_ms",
    "wrong",
)


@click.command()
@click.option("--model", help="Of the table  [default: GPUs opt-13b, CPUs opt-125m]")
@click.option("--pp", type=click.IntRange(1), help="Stages: the KV is that of one  [default: 4]")
@click.option("--batch", type=click.IntRange(1), help="Rows of a microbatch  [default: GPUs 8, CPUs 4]")
@click.option("--context", type=click.IntRange(1), help="Tokens of each row  [default: GPUs 500, CPUs 250]")
@click.option("--dtype", type=click.Choice(["float32", "float16", "bfloat16"]), help="Number format.")
@click.option(
    "--block-size", "block_tokens", type=click.IntRange(1), help="Of a block, in tokens  [default: GPUs 32; CPUs a row]"
)
@click.option("--microbatches", default=4, show_default=True, type=click.IntRange(3), help="Swapped in `step`.")
@click.option("--loads", default="25,50,75,90", show_default=True, help="Percent of a step that a fetch takes.")
@click.option("--steps", default=40, show_default=True, type=click.IntRange(4), help="Timed steps of a turn.")
@click.option("--repeats", default=5, show_default=True, type=click.IntRange(1), help="Turns.")
@click.option("--device", type=click.Choice(["auto", "cpu", "cuda"]), default="auto", show_default=True, help="Where.")
@click.option("--out", help="The run directory.")
def command(out: str | None, **options: Any) -> int:
    """Measure fetches and flushes beside what the link carries, and what they cost compute."""
    from .links import choose_device
    from .stage_runs import own_stream
    from .swap_steps import measure_steps

    with choose_device(options["device"], 0) as device, own_stream(device):
        settings = make_settings(device.properties.kind, options)
        with ExitStack() as held:
            rows = measure_transfers(SwapMemory(device, settings, held), held)
        rows += measure_steps(device, settings, 1e9 * rows[0]["bandwidth_gbps"])
        name = device.properties.name
    rows = [dict.fromkeys(COLUMNS) | row for row in rows]
    wrong = sum(row["wrong"] for row in rows)
    error = f"{wrong} bytes are not what was moved" if wrong else None
    return finish(open_run_directory("swaplink", out), "swaplink", rows, options, error=error, device=name)


def make_settings(kind: str, options: Row) -> Settings:
    """Fill the defaults in. Raises UsageError."""
    from dejavu.model.table import MODELS

    given = {name: value for name, value in options.items() if value is not None and name in DEFAULTS[kind]}
    chosen: dict[str, Any] = DEFAULTS[kind] | given
    if chosen["model"] not in MODELS:
        raise UsageError(f"no model {chosen['model']!r} in the table: use one such as opt-13b")
    more = {name: options[name] for name in ("microbatches", "steps", "repeats")}
    return Settings(**chosen, **more, loads=read_loads(options["loads"]))


def read_loads(text: str) -> tuple[float, ...]:
    """Read a list such as 25,50. Raises UsageError."""
    try:
        loads = tuple(float(part) for part in text.split(",") if part)
    except ValueError:
        loads = (0.0,)
    if any(load <= 0 for load in loads):
        raise UsageError(f"--loads {text!r}: give percents above 0 such as 25,50")
    return loads


@dataclass(frozen=True, slots=True)
class Transfers:
    """Name what is moved at once: parts to fetch, parts to flush."""

    operation: str
    fetch: "list[Part]"
    flush: "list[Part]"


def measure_transfers(memory: SwapMemory, held: ExitStack) -> list[Row]:
    """Time each operation and its ceiling in turns."""
    from dejavu.kv.swap import Lanes, PoolLink

    device, context = memory.device, memory.settings.context
    lanes = held.enter_context(
        closing(Lanes(device, PoolLink(device, memory.layout, memory.on_device, memory.on_host)))
    )
    bring, take = memory.parts(2, 0, 0, context), memory.parts(1, 1, 0, context)
    operations = [
        Transfers("fetch", bring, []),
        Transfers("flush", [], take),
        Transfers("both", bring, take),
        Transfers("token", [], memory.parts(1, 1, context, context + 1)),
    ]
    return [measure_transfer(memory, lanes, each) for each in operations]


def measure_transfer(memory: SwapMemory, lanes: "Lanes", moved: Transfers) -> Row:
    """Time one operation beside plain copies of as many bytes."""
    from dejavu.kv.swap import count_tokens

    sizes = [count_tokens(parts) * memory.layout.bytes_per_token for parts in (moved.fetch, moved.flush)]
    events = [memory.device.create_event() for _ in range(2)]

    def swap() -> None:
        for _ in range(AT_ONCE):
            lanes.run("fetch", moved.fetch, [], events[0])
            lanes.run("flush", moved.flush, [], events[1])
        lanes.settle()

    def copy() -> None:
        for _ in range(AT_ONCE):
            plain_copy(memory, lanes.fetch_stream, sizes[0], inward=True)
            plain_copy(memory, lanes.flush_stream, sizes[1], inward=False)
        lanes.settle()

    own_s, plain_s = in_turns(swap, copy, memory.settings.repeats)
    device_s = statistics.median(move.end_s - move.start_s for move in lanes.moved)
    lanes.moved.clear()
    swap()  # what the plain copies wrote is written over
    nbytes = AT_ONCE * sum(sizes)
    own, plain = (nbytes / statistics.median(times) / 1e9 for times in (own_s, plain_s))
    return {
        "operation": moved.operation,
        "bytes": sum(sizes),
        "ms": 1e3 * statistics.median(own_s) / AT_ONCE,
        "device_ms": 1e3 * device_s,
        "bandwidth_gbps": own,
        "ceiling_gbps": plain,
        "percent_of_ceiling": 100 * own / plain,
        "wrong": memory.count_wrong(moved.fetch) + memory.count_wrong(moved.flush),
    }


def plain_copy(memory: SwapMemory, stream: "Stream", nbytes: int, *, inward: bool) -> None:
    """Copy contiguous bytes to or from the slot that the operation uses."""
    if nbytes:
        slot_bytes = memory.device_layout.total_bytes // RESIDENT
        start = 0 if inward else slot_bytes
        there = memory.on_device.view(start, nbytes)
        host = memory.on_host.view((2 if inward else 1) * slot_bytes, nbytes)
        memory.device.copy(*((there, host) if inward else (host, there)), stream=stream)


def in_turns(
    first: Callable[[], object], second: Callable[[], object], repeats: int
) -> tuple[list[float], list[float]]:
    """Time two things in turns, in seconds, after one of each that does not count."""
    times: tuple[list[float], list[float]] = [], []
    for turn in range(repeats + 1):
        for action, taken in zip((first, second), times, strict=True):
            begin_s = time.perf_counter()
            action()
            if turn:
                taken.append(time.perf_counter() - begin_s)
    return times
