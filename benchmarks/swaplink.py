"""Move swapped KV between a device and host memory, and see what of the link it uses and what it costs compute.

The paper's swapping (arXiv 2403.01876, section 4.2) lives on both directions of the host link at once, beside compute.
`fetch` brings in all rows of a microbatch, `flush` takes out as many new tokens (finished prompts), `both` does both at
once, and `token` flushes one new token of every row. Their ceilings are contiguous copies of as many bytes, in the same
directions. `step` runs passes of a memory-bound product in turns with and without swapping of `--microbatches`
microbatches, two of them resident; `slowdown_percent` is the median over the turns. Every byte that was moved is
compared: `wrong` counts those that differ.
"""

import statistics
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack, closing
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import rich_click as click

from dejavu.errors import UsageError

from .driver import Row, finish, open_run_directory

if TYPE_CHECKING:
    import torch

    from dejavu.device import Device, Stream
    from dejavu.engine.messages import Work
    from dejavu.kv.layout import PoolLayout
    from dejavu.kv.swap import Lanes, Part

RESIDENT = 2
PATTERN_BYTES = (16 << 20) - 257  # in step with no block
AT_ONCE = 3  # transfers of a kind that are queued together: a serving rank has the next one ready, too
DEFAULTS = {
    "cpu": {"model": "opt-125m", "pp": 4, "batch": 4, "context": 250, "dtype": "float32", "block_size": 0},
    "cuda": {"model": "opt-13b", "pp": 4, "batch": 8, "context": 500, "dtype": "float16", "block_size": 32},
}


@dataclass(frozen=True, slots=True)
class Settings:
    """Hold what was asked for, with the defaults of the device filled in."""

    model: str
    pp: int
    batch: int
    context: int
    dtype: str
    block_size: int
    microbatches: int
    step_ms: float
    steps: int
    repeats: int

    @property
    def row_blocks(self) -> int:
        """Count the blocks of a row, which also has room for the new tokens."""
        return -(-(self.context + self.steps) // self.block_size)


@click.command()
@click.option("--model", help="Of the table  [default: GPUs opt-13b, CPUs opt-125m]")
@click.option("--pp", type=click.IntRange(1), help="Stages: the KV is that of one  [default: 4]")
@click.option("--batch", type=click.IntRange(1), help="Rows of a microbatch  [default: GPUs 8, CPUs 4]")
@click.option("--context", type=click.IntRange(1), help="Tokens of each row  [default: GPUs 500, CPUs 250]")
@click.option("--dtype", type=click.Choice(["float32", "float16", "bfloat16"]), help="Number format.")
@click.option("--block-size", type=click.IntRange(1), help="Tokens of a block  [default: GPUs 32, CPUs a row]")
@click.option("--microbatches", default=4, show_default=True, type=click.IntRange(3), help="Swapped in `step`.")
@click.option("--step-ms", default=0.0, type=click.FloatRange(0), help="Compute of a pass  [default: 1.25 fetches]")
@click.option("--steps", default=40, show_default=True, type=click.IntRange(4), help="Passes of a turn.")
@click.option("--repeats", default=5, show_default=True, type=click.IntRange(1), help="Turns.")
@click.option("--device", type=click.Choice(["auto", "cpu", "cuda"]), default="auto", show_default=True, help="Where.")
@click.option("--out", help="The run directory.")
def command(out: str | None, **options: Any) -> int:
    """Measure fetches and flushes beside what the link carries, and what they cost compute."""
    from .links import choose_device

    with choose_device(options["device"], 0) as device, ExitStack() as held:
        settings = make_settings(device.properties.kind, options)
        memory = SwapMemory(device, settings, held)
        rows = [*measure_transfers(memory, held), measure_steps(memory, held)]
        name = device.properties.name
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
    chosen["block_size"] = chosen["block_size"] or chosen["context"] + options["steps"]
    more = {name: options[name] for name in ("microbatches", "step_ms", "steps", "repeats")}
    return Settings(**chosen, **more)


class SwapMemory:
    """Own the pools: two resident microbatches on the device, and all in host memory, of random bytes."""

    def __init__(self, device: "Device", settings: Settings, held: ExitStack) -> None:
        import torch

        self.device = device
        self.settings = settings
        self.layout = make_layout(settings, settings.microbatches)
        self.device_layout = make_layout(settings, RESIDENT)
        self.on_device = held.enter_context(device.allocate_exportable(self.device_layout.total_bytes))
        self.on_host = held.enter_context(device.allocate_host_exportable(self.layout.total_bytes))
        for seed, buffer in enumerate((self.on_device, self.on_host)):
            fill_random(buffer.tensor(), torch.Generator().manual_seed(seed))
        device.synchronize()

    def parts(self, microbatch: int, slot: int, start: int, stop: int) -> "list[Part]":
        """Name tokens [start, stop) of all rows of a microbatch, on the host and in a slot."""
        from dejavu.kv.swap import Part

        blocks = self.settings.row_blocks
        firsts = [
            (first * self.settings.batch + row) * blocks
            for row in range(self.settings.batch)
            for first in (microbatch, slot)
        ]
        pairs = zip(firsts[::2], firsts[1::2], strict=True)
        return [Part(range(host, host + blocks), range(there, there + blocks), start, stop) for host, there in pairs]

    def count_wrong(self, parts: "Sequence[Part]") -> int:
        """Count the bytes of parts that are not the same in both pools."""
        import torch

        wrong, size = 0, self.settings.block_size
        ours = self.on_device.tensor(torch.uint8, (*self.device_layout.shape[:4], self.layout.token_bytes))
        theirs = self.on_host.tensor(torch.uint8, (*self.layout.shape[:4], self.layout.token_bytes))
        for part in parts:
            for block in range(part.start // size, -(-part.stop // size)):
                here = slice(max(0, part.start - block * size), min(size, part.stop - block * size))
                one, other = ours[part.device[block], :, :, here], theirs[part.host[block], :, :, here]
                wrong += int((one != other.to(one.device)).sum())
        return wrong


def fill_random(memory: "torch.Tensor", generator: "torch.Generator") -> None:
    """Fill bytes with a random pattern, again and again: gigabytes of random numbers take longer than all else."""
    import torch

    pattern = torch.randint(0, 256, (PATTERN_BYTES,), dtype=torch.uint8, generator=generator).to(memory.device)
    for first in range(0, len(memory), PATTERN_BYTES):
        part = memory[first : first + PATTERN_BYTES]
        part.copy_(pattern[: len(part)])


def make_layout(settings: Settings, microbatches: int) -> "PoolLayout":
    """Lay out the KV of some microbatches of a middle stage."""
    from dejavu.kv.layout import PoolLayout
    from dejavu.model.table import MODELS

    spec = MODELS[settings.model]
    num_blocks = microbatches * settings.batch * settings.row_blocks
    itemsize = 4 if settings.dtype == "float32" else 2
    layers = -(-spec.num_layers // settings.pp)
    return PoolLayout(num_blocks, 0, layers, settings.block_size, 0, spec.num_kv_heads, spec.head_dim, itemsize)


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
    swap()  # what the plain copies wrote is written over
    nbytes = AT_ONCE * sum(sizes)
    own, plain = (nbytes / statistics.median(times) / 1e9 for times in (own_s, plain_s))
    return {
        "operation": moved.operation,
        "bytes": sum(sizes),
        "ms": 1e3 * statistics.median(own_s) / AT_ONCE,
        "bandwidth_gbps": own,
        "ceiling_gbps": plain,
        "percent_of_ceiling": 100 * own / plain,
        "step_ms": None,
        "alone_ms": None,
        "slowdown_percent": None,
        "stall_ms": None,
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


class Product:
    """Be a pass's compute: products of a few rows with weights that no cache holds, for about as long as asked for."""

    def __init__(self, device: "Device", dtype: "torch.dtype", batch: int, step_ms: float) -> None:
        import torch

        self.device = device
        width, copies = (5120, 8) if device.properties.kind == "cuda" else (1024, 4)
        self.weights = [torch.randn(4 * width, width, device=device.torch_device).to(dtype) for _ in range(copies)]
        self.rows = torch.randn(batch, width, device=device.torch_device).to(dtype)
        self.count = 1
        self.time(3)
        self.count = max(1, round(step_ms / 1e3 / self.time(20)))

    def time(self, passes: int) -> float:
        """Give the seconds of a pass, the mean of some."""
        self.device.compute_stream.synchronize()
        begin_s = time.perf_counter()
        for _ in range(passes):
            self.run()
        self.device.compute_stream.synchronize()
        return (time.perf_counter() - begin_s) / passes

    def run(self) -> None:
        """Queue a pass."""
        import torch.nn.functional as F  # noqa: N812

        for index in range(self.count):
            F.linear(self.rows, self.weights[index % len(self.weights)])


def measure_steps(memory: SwapMemory, held: ExitStack) -> Row:
    """Time token passes with swapping beside the same passes without, in turns."""
    import torch

    from dejavu.engine.residency import Residency
    from dejavu.engine.swapping import SwapMover
    from dejavu.kv.swap import PoolLink, count_tokens

    device, settings = memory.device, memory.settings
    fetched = memory.parts(0, 0, 0, settings.context)
    nbytes = count_tokens(fetched) * memory.layout.bytes_per_token
    link = PoolLink(device, memory.layout, memory.on_device, memory.on_host)
    books = Residency(settings.microbatches, settings.batch, settings.row_blocks, RESIDENT)
    mover = held.enter_context(closing(SwapMover(device, books, link, device.compute_stream)))
    step_ms = settings.step_ms or 1.25e3 * fetch_s(mover.lanes, fetched)
    product = Product(device, getattr(torch, settings.dtype), settings.batch, step_ms)
    works = iter(make_works(settings, settings.repeats + 1))

    def swapped() -> None:
        for _ in range(settings.steps):
            work = next(works)
            for admission in work.admissions:
                books.admit(admission)
            mover.begin(work)
            product.run()
            mover.end(work)
        device.compute_stream.synchronize()

    with torch.inference_mode():
        own_s, alone_s = in_turns(swapped, lambda: product.time(settings.steps), settings.repeats)
    mover.settle()
    ratios = [own / alone for own, alone in zip(own_s, alone_s, strict=True)]
    steady = [stall for (_, step), stall in mover.stalls_ms.items() if step > 0]
    return {
        "operation": "step",
        "bytes": nbytes,
        "ms": None,
        "bandwidth_gbps": None,
        "ceiling_gbps": None,
        "percent_of_ceiling": None,
        "step_ms": 1e3 * statistics.median(own_s) / settings.steps,
        "alone_ms": 1e3 * statistics.median(alone_s) / settings.steps,
        "slowdown_percent": 100 * (statistics.median(ratios) - 1),
        "stall_ms": statistics.mean(steady) if steady else 0.0,
        "wrong": count_resident_wrong(memory, books),
    }


def fetch_s(lanes: "Lanes", parts: "list[Part]") -> float:
    """Time a fetch that is alone, after one that does not count."""
    arrived = lanes.device.create_event()
    for _ in range(2):
        lanes.run("fetch", parts, [], arrived)
        lanes.settle()
    last = lanes.moved[-1]
    lanes.moved.clear()
    return last.end_s - last.start_s


def count_resident_wrong(memory: SwapMemory, books: Any) -> int:
    """Count the bytes on the device that differ from what host memory has of the microbatches that are in."""
    wrong = 0
    for slot, microbatch in enumerate(books.slots):
        if microbatch is not None:
            for index, row in books.rows[microbatch].items():
                part = memory.parts(microbatch, slot, 0, row.present)[index]
                wrong += memory.count_wrong([part]) if row.present else 0
    return wrong


def make_works(settings: Settings, turns: int) -> "list[Work]":
    """Make token passes of rows whose prompts are in host memory, round robin over the microbatches.

    Each turn's passes belong to requests of their own: the rows never grow beyond their blocks.
    """
    from dejavu.engine.messages import Admission, RowWork, Work
    from dejavu.request import Request, SamplingParams

    works = []
    for turn in range(turns):
        for index in range(settings.steps):
            step, microbatch = divmod(index, settings.microbatches)
            rows, admissions = [], []
            for row in range(settings.batch):
                serial = (turn * settings.microbatches + microbatch) * settings.batch + row
                first = (microbatch * settings.batch + row) * settings.row_blocks
                blocks = tuple(range(first, first + settings.row_blocks))
                request = Request(str(serial), (1,) * settings.context, SamplingParams(max_tokens=settings.steps + 1))
                admissions.append(Admission(serial, microbatch, row, blocks, request, (), (1,), settings.context))
                rows.append(RowWork(serial, row, 1, settings.context + step, False, True, settings.context))
            number = turn * settings.steps + step
            new = tuple(admissions) if step == 0 else ()
            works.append(Work(number, microbatch, tuple(rows), new, (1,) * settings.batch))
    return works
