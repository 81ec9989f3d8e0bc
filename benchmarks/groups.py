"""How long ranks of one model wait for each other: sums over a tensor group, and hidden states to the next stage.

Token steps sum 10 KiB to 1 MiB twice a layer, prompts tens of MiB; a pipeline hands the same sizes on. Each way is
timed by itself at every size that it takes, so that the limits in `dejavu/transport/reduction.py` can be read off:
`us` is the device's time of one, in a captured graph where the way can be captured (on a CPU the host's), `copy_us`
that of a plain copy of the same bytes into the other rank's memory, both ways at once, in the same run. What is summed
is compared bit for bit with the sum in the order of ranks in float32; what is handed over must come back unchanged.
"""

import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import rich_click as click

from dejavu.errors import UsageError
from dejavu.measure.render import format_value

from .driver import Row, finish, keep_rows, open_run_directory, run_ranks
from .generate import numbers

if TYPE_CHECKING:
    from torch import Tensor

    from .links import RankWorld

KIB = 1024
SUM_KIB = "10,40,80,160,320,640,1024,2048,4096,8192,16384,40960"
HOP_KIB = "10,80,320,1024,20480"
ONE_SHOT_KIB = 2048  # the most that is tried
DEADLINE_S = 30.0
TURNS = 20
Work = Callable[["Tensor"], None]


@click.command()
@click.option("--device", type=click.Choice(["auto", "cpu", "cuda"]), default="auto", show_default=True, help="Where.")
@click.option("--ranks", default=2, show_default=True, type=click.IntRange(2, 8), help="Ranks of the tensor group.")
@click.option("--sum-kib", default=SUM_KIB, show_default=True, help="Sizes of sums, KiB.")
@click.option("--hop-kib", default=HOP_KIB, show_default=True, help="Sizes of hidden states handed over, KiB.")
@click.option("--grids", default="1024x128", show_default=True, help="Threads and blocks of kernels: 256x64,1024x128.")
@click.option("--repeats", default=7, show_default=True, type=click.IntRange(1), help="Repeats; the median counts.")
@click.option("--verbose", is_flag=True, help="Print each row as it is measured.")
@click.option("--out", help="The run directory.")
@click.pass_context
def command(context: click.Context, /, out: str | None, **options: Any) -> int:
    """Time sums over a tensor group, and the hand-over between stages."""
    sums, hops = ([kib * KIB for kib in numbers(options[f"{name}_kib"], f"--{name}-kib")] for name in ("sum", "hop"))
    return run_ranks(context, options["ranks"], "groups", out, lambda: run_rank(sums, hops, options, out))


def run_rank(sum_sizes: list[int], hop_sizes: list[int], options: Row, out: str | None) -> int:
    """Measure on every rank; rank 0 reports."""
    import torch
    from mpi4py import MPI

    from .links import RankWorld, choose_device

    if MPI.COMM_WORLD.size != options["ranks"]:
        raise UsageError(f"--ranks {options['ranks']} on {MPI.COMM_WORLD.size} ranks: give mpirun -n the same number")
    comm = MPI.COMM_WORLD.Dup()
    torch.set_num_threads(1)
    with choose_device(options["device"], MPI.COMM_WORLD.Split_type(MPI.COMM_TYPE_SHARED).rank) as device:
        world = RankWorld(device, comm)
        rows, notes = measure_sums(world, sum_sizes, options)
        rows += measure_hops(world, hop_sizes, options)
        code = publish(world, rows, notes, options, out) if comm.rank == 0 else 0
        world.share()
        world.close()
    return code


def publish(world: "RankWorld", rows: list[Row], notes: list[str], options: Row, out: str | None) -> int:
    """Write the results."""
    wrong = sum(row["wrong"] for row in rows)
    error = f"{wrong} numbers were wrong" if wrong else None
    directory = open_run_directory("groups", out)
    return finish(directory, "groups", rows, options, notes=notes, error=error, device=world.device.properties.name)


def tell(world: "RankWorld", row: Row, options: Row) -> None:
    """Print a row as it is measured, where that is wanted."""
    if options["verbose"] and world.rank == 0:
        click.echo(", ".join(f"{name} {format_value(value)}" for name, value in row.items()))


# Sums


def measure_sums(world: "RankWorld", sizes: list[int], options: Row) -> tuple[list[Row], list[str]]:
    """Time every way at every size; also say what the library chooses here."""
    rows = []
    with ExitStack() as held:
        ways, notes = open_ways(world, held, max(sizes), options["grids"])
        ceiling = CopyCeiling(world, max(sizes))
        held.callback(ceiling.close)
        for nbytes in sizes:
            copy_us = ceiling.measure(nbytes, options["repeats"])
            for way in ways:
                if nbytes <= way.most_bytes:
                    rows.append(measure_sum(world, way, nbytes, copy_us, options["repeats"]))
                    tell(world, rows[-1], options)
                    if world.rank == 0:
                        keep_rows("groups", rows)
    return rows, notes


@dataclass(frozen=True, slots=True)
class Summing:
    """Be one way to sum, with the grid of its kernels, where it has one."""

    name: str
    work: Work
    most_bytes: int
    threads: int | None = None
    blocks: int | None = None


def open_ways(world: "RankWorld", held: ExitStack, largest: int, grids: str) -> tuple[list[Summing], list[str]]:
    """Open each way by itself; also say what the library chooses."""
    from dejavu.transport.mpi import Channel

    if world.device.properties.kind == "cpu":
        channel = Channel(world.comm, DEADLINE_S)
        held.callback(channel.close)
        return [Summing("mpi", lambda tensor: channel.all_reduce(tensor, range(channel.size)), largest)], []
    return open_cuda_ways(world, held, largest, grids)


def open_cuda_ways(world: "RankWorld", held: ExitStack, largest: int, grids: str) -> tuple[list[Summing], list[str]]:
    """Open the two kinds of kernels, and NCCL where the ranks have a GPU each."""
    from dejavu.transport.nccl_group import NcclGroup
    from dejavu.transport.reduction import GroupSum, meet, without_nccl

    device, exchange = world.device, world.comm.allgather
    ways = [way for grid in grids.split(",") for way in open_kernels(world, held, largest, grid)]
    if without_nccl(meet(device, exchange)) is None:
        nccl = NcclGroup(device, exchange, world.rank)
        held.callback(nccl.close)
        ways.append(Summing("nccl", nccl.sum, largest))
    chosen = held.enter_context(GroupSum(device, exchange, world.rank))
    return [*ways, Summing("chosen", chosen, largest)], [chosen.describe()]


def open_kernels(world: "RankWorld", held: ExitStack, largest: int, grid: str) -> list[Summing]:
    """Open one shot and two shots with one grid."""
    from dejavu.transport.reduction import GroupSum
    from dejavu.transport.sum_plan import SumPlan

    threads, blocks = (numbers(part, "--grids")[0] for part in grid.split("x"))
    most = {"one-shot": ONE_SHOT_KIB * KIB, "two-shot": largest}
    ways = []
    for name, most_bytes in most.items():
        one_bytes = most_bytes if name == "one-shot" else 0
        plan = SumPlan(world.comm.size, one_bytes, most_bytes, threads, blocks, blocks)
        group = held.enter_context(GroupSum(world.device, world.comm.allgather, world.rank, plan=plan))
        ways.append(Summing(name, group, most_bytes, threads, blocks))
    return ways


def measure_sum(world: "RankWorld", way: Summing, nbytes: int, copy_us: float, repeats: int) -> Row:
    """Check and time one way at one size."""
    import torch

    dtype = torch.float32 if world.device.properties.kind == "cpu" else torch.float16
    wrong = 0
    for turn in range(3):
        parts = [random_part(world, nbytes, dtype, rank, turn) for rank in range(world.comm.size)]
        mine = parts[world.rank].clone()
        way.work(mine)
        wrong += count_wrong(mine, parts)
    us, post_us = Timer(world, way.work, nbytes, repeats).measure()
    wrong = int(sum(each[0] for each in world.share(wrong)))
    percent = 100 * copy_us / us
    grid = {"threads": way.threads, "blocks": way.blocks}
    columns = {"what": "sum", "way": way.name, **grid, "kib": nbytes / KIB, "us": us, "copy_us": copy_us}
    return {**columns, "of_copy_percent": percent, "post_us": post_us, "wrong": wrong}


def random_part(world: "RankWorld", nbytes: int, dtype: Any, rank: int, turn: int) -> "Tensor":
    """Give a rank's tensor, the same wherever it is made."""
    import torch

    device = world.device.torch_device
    generator = torch.Generator(device).manual_seed(1000 * turn + rank + nbytes)
    return torch.randn(nbytes // dtype.itemsize, generator=generator, dtype=dtype, device=device)


def count_wrong(result: "Tensor", parts: "list[Tensor]") -> int:
    """Count what is not the sum in the order of ranks, in float32; NCCL's order is another one beyond two ranks."""
    import torch

    total = torch.zeros_like(parts[0], dtype=torch.float32)
    for part in parts:
        total += part
    if len(parts) == 2:
        return int((result != total.to(result.dtype)).sum())
    return int(((result.float() - total).abs() > 0.01 * total.abs() + 0.01).sum())


class Timer:
    """Time many sums in a row, captured on CUDA, so that ranks that begin apart do not count."""

    def __init__(self, world: "RankWorld", work: Work, nbytes: int, repeats: int) -> None:
        import torch

        self.world = world
        self.work = work
        self.repeats = repeats
        self.count = max(5, min(50, (256 << 20) // nbytes)) if world.device.properties.kind == "cuda" else 5
        self.tensor = torch.empty(nbytes // 2, dtype=torch.bfloat16, device=world.device.torch_device)

    def measure(self) -> tuple[float, float]:
        """Give the median microseconds of one sum, and those that queueing one takes the host."""
        if self.world.device.properties.kind == "cpu":
            times = [self.run_eagerly() for _ in range(self.repeats + 1)][1:]
            return statistics.median(times), statistics.median(times)
        return self.measure_captured(), self.measure_posts()

    def refill(self) -> None:
        """Make small numbers again: each sum grows them."""
        self.tensor.normal_(std=1e-3)

    def run_eagerly(self) -> float:
        """Time sums on the host."""
        self.refill()
        self.world.share()
        start_s = time.perf_counter()
        for _ in range(self.count):
            self.work(self.tensor)
        return (time.perf_counter() - start_s) / self.count * 1e6

    def measure_captured(self) -> float:
        """Time replays between events, behind one sum that brings the ranks together."""
        device = self.world.device
        with device.create_stream("groups") as stream:
            self.queue(stream, 1)
            graph = device.capture(self.work_all, stream=stream)
            times = [self.replay(graph, stream) for _ in range(self.repeats + 1)]
            graph.close()
        return statistics.median(times[1:])

    def work_all(self) -> None:
        """Queue all sums of a replay."""
        for _ in range(self.count):
            self.work(self.tensor)

    def replay(self, graph: Any, stream: Any) -> float:
        """Time one replay."""
        import torch

        from dejavu.device.cuda_stream import external

        device = self.world.device
        with torch.cuda.stream(external(stream)):
            self.refill()
        stream.synchronize(DEADLINE_S)
        self.world.share()
        with device.create_event(timing=True) as start, device.create_event(timing=True) as end:
            self.queue(stream, 1)
            start.record(stream)
            graph.replay(stream=stream)
            end.record(stream)
            stream.synchronize(DEADLINE_S)
            return end.elapsed_ms(start) * 1e3 / self.count

    def queue(self, stream: Any, count: int) -> float:
        """Queue sums outside a graph; gives the microseconds that one took the host."""
        import torch

        from dejavu.device.cuda_stream import external

        with torch.cuda.stream(external(stream)):
            start_s = time.perf_counter()
            for _ in range(count):
                self.work(self.tensor)
            return (time.perf_counter() - start_s) / count * 1e6

    def measure_posts(self) -> float:
        """Time the host alone."""
        times = []
        with self.world.device.create_stream("groups") as stream:
            for _ in range(self.repeats):
                self.refill()
                times.append(self.queue(stream, 10))
                stream.synchronize(DEADLINE_S)
        return statistics.median(times)


class CopyCeiling:
    """Time plain copies into the next rank's memory, all ranks at once."""

    def __init__(self, world: "RankWorld", largest: int) -> None:
        device = world.device
        self.world = world
        self.own, self.source = device.allocate(largest), device.allocate(largest)
        handles = world.comm.allgather(self.own.ipc_handle())
        self.there = device.open_ipc(handles[(world.rank + 1) % world.comm.size], largest)

    def measure(self, nbytes: int, repeats: int) -> float:
        """Give the median microseconds of one copy."""
        device, count, times = self.world.device, 20, []
        with device.create_stream("ceiling") as stream:
            for _ in range(repeats + 1):
                self.world.share()
                with device.create_event(timing=True) as start, device.create_event(timing=True) as end:
                    self.world.gate.shut(stream)
                    start.record(stream)
                    for _ in range(count):
                        device.copy(self.there.view(0, nbytes), self.source.view(0, nbytes), stream=stream)
                    end.record(stream)
                    self.world.gate.open()
                    stream.synchronize(DEADLINE_S)
                    times.append(end.elapsed_ms(start) * 1e3 / count)
        return statistics.median(times[1:])

    def close(self) -> None:
        """Unmap, then free."""
        self.there.close()
        self.world.share()
        self.own.close()
        self.source.close()


# Hops


def measure_hops(world: "RankWorld", sizes: list[int], options: Row) -> list[Row]:
    """Time hidden states that ranks 0 and 1 hand each other."""
    from mpi4py import MPI

    comm = world.comm.Split(0 if world.rank < 2 else MPI.UNDEFINED, world.rank)
    if world.rank >= 2:
        return []
    from .links import RankWorld

    pair = RankWorld(world.device, comm)
    rows = []
    with ExitStack() as held:
        for way, echo in open_hops(pair, held, max(sizes)):
            for nbytes in sizes:
                rows.append(measure_hop(pair, way, echo, nbytes, options["repeats"]))
                tell(pair, rows[-1], options)
    pair.close()
    return rows


Echo = Callable[["Tensor", int], "Tensor"]  # sends a tensor to and fro so many times; gives what came back


def open_hops(pair: "RankWorld", held: ExitStack, largest: int) -> Iterator[tuple[str, Echo]]:
    """Give each way between two ranks."""
    import torch

    from dejavu.transport.mailbox import MailboxIn, MailboxOut
    from dejavu.transport.mpi import Channel

    device = pair.device
    ends: list[Any] = [None, None]
    for sender in (0, 1):

        def exchange(data: bytes, step: int = 1 - 2 * sender) -> list[bytes]:
            sides: list[bytes] = pair.comm.allgather(data)
            return sides[::step]

        if pair.rank == sender:
            ends[0] = MailboxOut(device, exchange)
        else:
            ends[1] = MailboxIn(device, exchange, largest, 1, torch.uint8)
    for end in ends if pair.rank == 0 else ends[::-1]:  # in the order in which they met
        held.enter_context(end)
    yield "mailbox", lambda tensor, turns: echo_mailbox(pair.rank, ends[0], ends[1], tensor, turns)
    channel = Channel(pair.comm, DEADLINE_S)
    held.callback(channel.close)
    yield "mpi", lambda tensor, turns: echo_mpi(channel, tensor, turns)


def echo_mailbox(rank: int, outbox: Any, inbox: Any, tensor: "Tensor", turns: int) -> "Tensor":
    """Send to and fro, all queued ahead; gives what came back, which the caller keeps no longer than until the next."""
    for turn in range(turns):
        if rank == 0:
            outbox.send(tensor)
        back = inbox.receive(tensor.nbytes)
        if rank == 1:
            outbox.send(back)
        elif turn == turns - 1:
            tensor = back.flatten().clone()
        inbox.release()
    return tensor


def echo_mpi(channel: Any, tensor: "Tensor", turns: int) -> "Tensor":
    """Send to and fro through host memory."""
    import torch

    peer, held = 1 - channel.rank, torch.empty(tensor.nbytes, dtype=torch.uint8)
    for _ in range(turns):
        if channel.rank == 0:
            channel.send_tensor(peer, tensor.cpu())
        channel.receive_tensor(peer, held)
        back = held.to(tensor.device)
        if channel.rank == 1:
            channel.send_tensor(peer, back.cpu())
        channel.flush()
    return back


def measure_hop(pair: "RankWorld", way: str, echo: Echo, nbytes: int, repeats: int) -> Row:
    """Time one way at one size: half a turn."""
    import torch

    from .contents import count_differing, random_bytes

    times, wrong = [], 0
    for repeat in range(repeats + 1):
        tensor = random_bytes(pair.device, nbytes, seed=repeat)
        if pair.device.properties.kind == "cuda":
            torch.cuda.synchronize()
        pair.share()
        start_s = time.perf_counter()
        back = echo(tensor, TURNS)
        posted_s = time.perf_counter()
        if pair.device.properties.kind == "cuda":
            torch.cuda.synchronize()
        times.append(((time.perf_counter() - start_s) / (2 * TURNS) * 1e6, (posted_s - start_s) / (2 * TURNS) * 1e6))
        wrong += count_differing(back, tensor) if pair.rank == 0 else 0
    us, post_us = (statistics.median(column) for column in zip(*times[1:], strict=True))
    copy_us = copy_between(pair, nbytes, repeats)
    columns = {
        "what": "hop",
        "way": way,
        "threads": None,
        "blocks": None,
        "kib": nbytes / KIB,
        "us": us,
        "copy_us": copy_us,
    }
    wrong = int(pair.share(wrong)[0][0])
    return {**columns, "of_copy_percent": 100 * copy_us / us, "post_us": post_us, "wrong": wrong}


def copy_between(pair: "RankWorld", nbytes: int, repeats: int) -> float:
    """Time the plain copy that is a hop's ceiling."""
    ceiling = CopyCeiling(pair, nbytes)
    copy_us = ceiling.measure(nbytes, repeats)
    ceiling.close()
    return copy_us
