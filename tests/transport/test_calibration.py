"""The choice of an engine: the rule, measured points, and the file."""

import pytest

from dejavu.device import open_device
from dejavu.errors import ConfigError
from dejavu.transport import calibration
from dejavu.transport.calibration import (
    Calibration,
    Engine,
    Point,
    Route,
    read_calibration,
    route_of,
    write_calibration,
)


def point(pieces, piece_bytes, copies, batch, direct):
    return Point(pieces, piece_bytes, {Engine.COPIES: copies, Engine.BATCH: batch, Engine.DIRECT: direct})


def test_the_rule_without_a_file():
    choose = Calibration().choose
    assert choose(Route.OUT, 512, 512 * 160 * 1024) is Engine.BATCH  # a prompt's planes
    assert choose(Route.IN, 512, 512 * 160 * 1024) is Engine.BATCH
    assert choose(Route.OUT, 640, 640 * 10240) is Engine.DIRECT  # a token step
    assert choose(Route.DEVICE, 512, 512 << 20) is Engine.BATCH
    assert choose(Route.DEVICE, 640, 640 * 10240) is Engine.DIRECT


def test_the_nearest_point_decides():
    made = Calibration({Route.DEVICE: (point(2, 1024, 2.0, 9.0, 8.0), point(640, 65536, 900.0, 700.0, 120.0))})
    assert made.choose(Route.DEVICE, 3, 3 * 2000) is Engine.COPIES
    assert made.choose(Route.DEVICE, 500, 500 * 40_000) is Engine.DIRECT
    assert made.choose(Route.OUT, 3, 3 << 20) is Engine.BATCH  # a route without points follows the rule


def test_over_the_bus_a_copy_engine_may_be_slower_than_a_kernel():
    here = point(128, 65536, 471.0, 170.0, 150.0)
    assert here.fastest(Route.OUT) is Engine.BATCH
    assert here.fastest(Route.DEVICE) is Engine.DIRECT
    assert point(640, 10240, 1580.0, 199.0, 135.0).fastest(Route.OUT) is Engine.DIRECT


def test_posting_counts():
    assert point(640, 1024, 600.0, 900.0, 700.0).fastest(Route.DEVICE) is Engine.DIRECT  # 640 posts cost 640 us more


def test_routes_are_named_by_locations():
    assert route_of(from_host=False, to_host=True) is Route.OUT
    assert route_of(from_host=True, to_host=False) is Route.IN
    assert route_of(from_host=False, to_host=False) is Route.DEVICE
    assert route_of(from_host=True, to_host=True) is Route.HOST


def test_a_file_comes_back(tmp_path, monkeypatch):
    monkeypatch.setenv("DEJAVU_CACHE", str(tmp_path))
    path = calibration.calibration_path("NVIDIA H200")
    assert path == tmp_path / "calibration" / "nvidia-h200.yaml"
    made = Calibration({Route.OUT: (point(2, 1024, 1.25, 2.5, 3.0),)})
    write_calibration(path, "NVIDIA H200", made)
    calibration.calibration_of.cache_clear()
    assert calibration.calibration_of("NVIDIA H200") == made
    assert calibration.calibration_of("another") == Calibration()
    calibration.calibration_of.cache_clear()


@pytest.mark.parametrize(
    "text",
    [
        "no: routes",
        "routes: [1]",
        "routes: {sideways: []}",
        "routes: {out: [{pieces: 1, piece_bytes: 1, times_us: {direct: 1}}]}",
        "routes: {out: [{pieces: 0, piece_bytes: 1, times_us: {direct: 1, batch: 1, copies: 1}}]}",
        "{",
    ],
)
def test_a_malformed_file_says_how_to_make_it_again(text, tmp_path):
    path = tmp_path / "wrong.yaml"
    path.write_text(text)
    with pytest.raises(ConfigError, match=r"wrong\.yaml cannot be read .*dejavu bench calibrate"):
        read_calibration(path)


def test_a_cpu_asks_for_no_file(monkeypatch):
    from dejavu.device import make_pieces
    from dejavu.transport.staging import choose_engine

    monkeypatch.setattr("dejavu.transport.staging.calibration_of", lambda name: pytest.fail(name))
    with open_device("cpu") as device:
        memory = device.allocate(64)
        assert choose_engine(device, memory, memory, make_pieces([0, 8], [0, 8], 8)) is Engine.DIRECT
