"""Choose the engine that moves many pieces at once: by what was measured on this device, or by a rule without that.

`dejavu bench calibrate` writes the file that is read here, once in a process. Pure but for that reading.
"""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from enum import StrEnum
from functools import lru_cache
from math import log2
from pathlib import Path
from typing import Any

from dejavu.assets import cache_dir
from dejavu.errors import ConfigError

BATCH_FROM_BYTES = 32 * 1024  # of a piece: below it a copy engine's cost per piece shows
PATIENCE = 1.25  # how much longer a copy engine may take over the bus than a kernel, which takes multiprocessors


class Engine(StrEnum):
    """Name a way to move pieces."""

    COPIES = "copies"  # one copy for each, by the copy engine
    BATCH = "batch"  # all of them in one call, by the copy engine
    DIRECT = "direct"  # one kernel that reads and writes both memories where they are


class Route(StrEnum):
    """Name the link between two memories, as seen from the device that moves."""

    OUT = "out"  # device to host
    IN = "in"  # host to device
    DEVICE = "device"  # device to device: the other device's memory where there is one
    HOST = "host"


# What posting one more piece costs the host (measured on a 3 GHz Xeon), which the times leave out. It counts a quarter,
# since most transfers are posted while the device still computes what they send.
POST_US = {Engine.COPIES: 4.0 / 4, Engine.BATCH: 0.45 / 4}


def route_of(*, from_host: bool, to_host: bool) -> Route:
    """Name the route between the locations of two memories."""
    return {(0, 0): Route.DEVICE, (0, 1): Route.OUT, (1, 0): Route.IN, (1, 1): Route.HOST}[from_host, to_host]


@dataclass(frozen=True, slots=True)
class Point:
    """Hold what moving `pieces` pieces of `piece_bytes` took with each engine, in microseconds."""

    pieces: int
    piece_bytes: int
    times_us: Mapping[Engine, float]

    def distance(self, pieces: int, piece_bytes: float) -> float:
        """Give how far a message is from this point, in doublings."""
        return abs(log2(pieces / self.pieces)) + abs(log2(max(1.0, piece_bytes) / self.piece_bytes))

    def fastest(self, route: Route) -> Engine:
        """Give the engine to use: over the bus a copy engine, unless the kernel is much faster."""
        patience = PATIENCE if route in (Route.OUT, Route.IN) else 1.0
        costs = dict(self.times_us)
        costs[Engine.DIRECT] = patience * costs[Engine.DIRECT]
        for engine, post_us in POST_US.items():
            costs[engine] += post_us * self.pieces
        return min(costs, key=costs.__getitem__)


@dataclass(frozen=True, slots=True)
class Calibration:
    """Hold the measured points of one device, by route; a route without any follows the rule."""

    points: Mapping[Route, Sequence[Point]] = field(default_factory=dict)

    def choose(self, route: Route, pieces: int, nbytes: int) -> Engine:
        """Give the engine for `pieces` pieces (at least 1) of `nbytes` together."""
        piece_bytes = nbytes / pieces
        measured = self.points.get(route)
        if measured:
            return min(measured, key=lambda point: point.distance(pieces, piece_bytes)).fastest(route)
        is_large = route is not Route.HOST and piece_bytes >= BATCH_FROM_BYTES
        return Engine.BATCH if is_large else Engine.DIRECT  # a kernel takes multiprocessors from what computes


def calibration_path(device_name: str) -> Path:
    """Give the file of a kind of device, as `dejavu bench calibrate` writes it by default."""
    slug = re.sub(r"[^a-z0-9]+", "-", device_name.lower()).strip("-")
    return cache_dir() / "calibration" / f"{slug}.yaml"


@lru_cache(maxsize=8)
def calibration_of(device_name: str) -> Calibration:
    """Read the file of a kind of device, once in a process; the rule alone where there is none."""
    path = calibration_path(device_name)
    return read_calibration(path) if path.exists() else Calibration()


def read_calibration(path: Path) -> Calibration:
    """Read a file. Raises ConfigError where it is malformed."""
    import yaml

    try:
        routes: dict[str, list[dict[str, Any]]] = yaml.safe_load(path.read_text())["routes"]
        return Calibration({Route(name): tuple(map(_point, rows)) for name, rows in routes.items()})
    except (OSError, yaml.YAMLError, TypeError, KeyError, ValueError, AttributeError) as error:
        reason = " ".join(str(error).split())
        raise ConfigError(
            f"the calibration {path} cannot be read ({reason}): delete it, or run `dejavu bench calibrate`"
        ) from error


def _point(row: dict[str, Any]) -> Point:
    times = {Engine(name): float(value) for name, value in row["times_us"].items()}
    if set(times) != set(Engine) or min(int(row["pieces"]), int(row["piece_bytes"])) < 1 or min(times.values()) < 0:
        raise ValueError(f"no measured point: {row}")
    return Point(int(row["pieces"]), int(row["piece_bytes"]), times)


def write_calibration(path: Path, device_name: str, calibration: Calibration) -> None:
    """Write a file, in one step."""
    import yaml

    routes = {
        route.value: [
            {
                "pieces": point.pieces,
                "piece_bytes": point.piece_bytes,
                "times_us": {engine.value: round(us, 2) for engine, us in point.times_us.items()},
            }
            for point in points
        ]
        for route, points in calibration.points.items()
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    draft = path.with_suffix(".draft")
    draft.write_text(yaml.safe_dump({"device": device_name, "routes": routes}, sort_keys=False))
    draft.replace(path)
