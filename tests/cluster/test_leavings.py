"""What a job has left is found, and only that."""

import os
import subprocess
import sys

from dejavu.cluster import leavings, leftovers
from dejavu.cluster.launcher import JOB
from dejavu.cluster.leavings import Before, left_behind
from dejavu.device.keeper_line import keeper_directory


def test_everything_that_is_left_is_named(tmp_path, monkeypatch):
    monkeypatch.setattr(leavings, "SETTLE_S", 0.0)
    monkeypatch.setattr(leftovers, "SHARED_MEMORY", tmp_path)
    monkeypatch.setattr(leavings.tempfile, "gettempdir", lambda: str(tmp_path))
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(tmp_path))
    before = Before()
    assert left_behind(before, ["mine"]) == []
    other = tmp_path / "ompi.1"  # of a process that runs
    other.mkdir()
    command = [sys.executable, "-c", "import time; time.sleep(60)"]
    child = subprocess.Popen(command, env={**os.environ, JOB: "mine"})
    gone = subprocess.Popen([sys.executable, "-c", ""])
    gone.wait()
    read, write = os.pipe()
    try:
        (tmp_path / f"ompi.{gone.pid}").mkdir()
        (tmp_path / "sm_segment.host.0.1.0").touch()
        directory = keeper_directory("mine")
        directory.mkdir()
        assert left_behind(before, ["mine"]) == [
            f"process {child.pid}",
            f"keeper's directory {directory}",
            f"shared memory {tmp_path}/sm_segment.host.0.1.0",
            f"session directory {tmp_path}/ompi.{gone.pid}",
            "2 open descriptors",
        ]
        assert f"process {child.pid}" not in left_behind(before, ["another"])
    finally:
        os.close(read)
        os.close(write)
        child.kill()
        child.wait()
