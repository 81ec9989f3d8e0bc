"""Measure what moves pieces fastest between two memories, and write it down for the library to choose by.

For each route (device to pinned host memory, back, and to the other device where there is one), number of pieces and
size of a piece: one copy for each piece (`copies`), all of them in one call to the copy engine (`batch`), a kernel that
stores them where they belong (`direct`), and a kernel that packs them into staging beside them, and one copy from there
(`packed`; for comparison, since the library's carriers store directly). Times are the device's, between two events,
with everything posted ahead. What each engine has moved is compared byte for byte.
"""

import statistics
from collections.abc import Callable
from pathlib import Path
from typing import Any

import rich_click as click

from dejavu.transport.calibration import Calibration, Engine, Point, Route, calibration_path, write_calibration

from .driver import Row, finish, open_run_directory

COUNTS, SIZES = (2, 16, 128, 640), (1 << 10, 10 << 10, 64 << 10, 1 << 20)
MOST_BYTES = {"cuda": 256 << 20, "cpu": 8 << 20}
DEADLINE_S = 30.0


@click.command()
@click.option("--device", type=click.Choice(["auto", "cpu", "cuda"]), default="auto", show_default=True, help="Where.")
@click.option("--repeats", default=7, show_default=True, type=click.IntRange(1), help="Repeats; the median counts.")
@click.option("--out-file", type=click.Path(dir_okay=False, path_type=Path), help="Instead of the one in the cache.")
@click.option("--out", help="The run directory.")
def command(device: str, repeats: int, out_file: Path | None, out: str | None) -> int:
    """Measure copy engine, pack kernel and direct store, for the library to choose by."""
    from .links import choose_device

    with choose_device(device, 0) as here:
        name = here.properties.name
        rows = [row for ends in open_routes(here) for row in measure_route(here, *ends, repeats)]
    path = out_file or calibration_path(name)
    write_calibration(path, name, make_calibration(rows))
    click.echo(f"wrote {path}")
    wrong = sum(row["wrong"] for row in rows)
    error = f"{wrong} bytes were copied wrong" if wrong else None
    options = {"device": device, "repeats": repeats, "out_file": str(path)}
    return finish(open_run_directory("calibrate", out), "calibrate", rows, options, error=error, device=name)


def make_calibration(rows: list[Row]) -> Calibration:
    """Turn rows into points."""
    points: dict[Route, list[Point]] = {}
    for row in rows:
        times = {engine: row[f"{engine}_us"] for engine in Engine}
        points.setdefault(Route(row["route"]), []).append(Point(row["pieces"], row["piece_bytes"], times))
    return Calibration(points)


def open_routes(device: Any) -> list[tuple[Route, Any, Any, str, str]]:
    """Give each route with the source's and the target's memory and their names."""
    nbytes = MOST_BYTES[device.properties.kind]
    here, host = device.allocate(nbytes), device.allocate_host(nbytes)
    other, other_name = open_peer(device, nbytes)
    name = str(device)
    return [
        (Route.OUT, here, host, name, "host"),
        (Route.IN, host, here, "host", name),
        (Route.DEVICE, here, other, name, other_name),
    ]


def open_peer(device: Any, nbytes: int) -> tuple[Any, str]:
    """Allocate on another device that this one reaches, or else on this one."""
    from dejavu.device import open_device

    index = next(
        (i for i in range(device.num_devices()) if i != device.properties.index and device.can_access(i)), None
    )
    if index is None:
        return device.allocate(nbytes), str(device)
    device.enable_peer(index)
    peer = open_device("cuda", index)
    memory = peer.allocate(nbytes)
    device.activate()
    return memory, str(peer)


def measure_route(
    device: Any, route: Route, source: Any, target: Any, source_name: str, target_name: str, repeats: int
) -> list[Row]:
    """Measure all shapes of a route."""
    staging = device.allocate(source.nbytes) if route is not Route.IN else device.allocate_host(source.nbytes)
    rows = []
    for count in COUNTS:
        for size in SIZES:
            if count * size <= source.nbytes // 2:
                names = {"route": route.value, "source": source_name, "target": target_name}
                rows.append(names | measure_shape(device, route, (target, source, staging), (count, size), repeats))
    staging.close()
    return rows


def measure_shape(
    device: Any, route: Route, memories: tuple[Any, Any, Any], shape: tuple[int, int], repeats: int
) -> Row:
    """Time every engine on pieces in random order, and check what each has moved."""
    from .contents import Check
    from .shapes import shuffled

    count, size = shape
    pairs = shuffled(count, size, seed=count).pairs
    nbytes = count * size
    target, source, staging = (memory.view(0, nbytes) for memory in memories)
    check = Check(device, pairs, nbytes, nbytes)
    check.fill(source, 1)
    works = make_works(device, target, source, staging, pairs)
    times: Row = {}
    wrong = 0
    with device.create_stream("calibrate") as stream:
        for engine, work in works.items():
            check.poison(target, 1)
            times[f"{engine}_us"] = time_work(device, stream, work, repeats)
            wrong += check.count_wrong(target)
    point = Point(count, size, {engine: times[f"{engine}_us"] for engine in Engine})
    chosen = point.fastest(route).value
    return {"pieces": count, "piece_bytes": size, **times, "chosen": chosen, "wrong": wrong}


def make_works(device: Any, target: Any, source: Any, staging: Any, pairs: Any) -> dict[str, Callable[[Any], None]]:
    """Give what each engine queues."""
    from dejavu.device import make_pieces
    from dejavu.transport.carrier import Gathering
    from dejavu.transport.staging import move

    to_staging = make_pieces(pairs.source, pairs.target, pairs.nbytes)

    def packed(stream: Any) -> None:
        device.pack(staging, source, to_staging, stream=stream)
        device.copy(target, staging, stream=stream)

    return {
        "copies": lambda stream: move(device, target, source, pairs, Gathering.NAIVE, stream=stream),
        "batch": lambda stream: device.copy_batch(target, source, pairs, stream=stream),
        "direct": lambda stream: device.pack(target, source, pairs, stream=stream),
        "packed": packed,
    }


def time_work(device: Any, stream: Any, work: Callable[[Any], None], repeats: int) -> float:
    """Give the median microseconds on the device between the events around the work, all of it posted ahead."""
    from .timing import Gate

    gate = Gate(device)
    times = []
    for turn in range(repeats + 1):
        with device.create_event(timing=True) as start, device.create_event(timing=True) as end:
            gate.shut(stream)
            start.record(stream)
            work(stream)
            end.record(stream)
            gate.open()
            stream.synchronize(DEADLINE_S)
            times += [end.elapsed_ms(start) * 1e3] if turn else []
    gate.close()
    return float(statistics.median(times))
