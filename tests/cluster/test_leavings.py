"""What a job has left is found, and only that."""

import os
import subprocess
import sys

from dejavu.cluster import leavings, segments
from dejavu.cluster.launcher import JOB
from dejavu.cluster.leavings import Before, left_behind
from dejavu.device.claims import claim
from dejavu.device.keeper_line import keeper_directory


def test_everything_that_is_left_is_named(tmp_path, monkeypatch):
    monkeypatch.setattr(leavings, "SETTLE_S", 0.0)
    monkeypatch.setattr(segments, "SHARED_MEMORY", tmp_path)
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
        shared = segments.directory_of("mine")
        shared.mkdir()
        segments.directory_of("another").mkdir()
        directory = keeper_directory("mine")
        directory.mkdir()
        assert left_behind(before, ["mine"]) == [
            f"process {child.pid}",
            f"keeper's directory {directory}",
            f"shared memory {shared}",
            f"session directory {tmp_path}/ompi.{gone.pid}",
            "2 open descriptors",
        ]
        assert f"process {child.pid}" not in left_behind(before, ["another"])
    finally:
        os.close(read)
        os.close(write)
        child.kill()
        child.wait()


def test_ranks_of_a_job_share_a_directory_and_remove_those_of_jobs_that_are_gone(tmp_path, monkeypatch):
    claims = []
    monkeypatch.setattr(segments, "SHARED_MEMORY", tmp_path)
    monkeypatch.setattr(segments, "claim", lambda path: claims.append(claim(path)))
    environment = {segments.NAMESPACE: "prterun-vm-17@2"}  # of a process that joined the job
    monkeypatch.setattr(segments.os, "environ", environment)
    gone = segments.directory_of("another job")
    gone.mkdir()
    segments.claim_segments()
    mine = segments.directory_of("prterun-vm-17")
    assert list(tmp_path.iterdir()) == [mine]
    assert {environment[name] for name in segments.PARAMETERS} == {str(mine)}
    assert segments.segment_directory(environment) == mine
    assert segments.segment_directory({segments.PARAMETERS[0]: "/mnt", JOB: "x"}) is None, "the user has said where"
    assert segments.segment_directory({}) is None
    os.close(*claims)
    segments.clear_segments()
    assert list(tmp_path.iterdir()) == []
