"""The keeper: what it holds outlives its maker, and it outlives nothing that it should not."""

import os
import secrets
import signal
import socket
import subprocess
import sys
import time
from contextlib import contextmanager

import pytest
import torch

from dejavu.device import Location, open_device
from dejavu.device.handles import connect, send_message
from dejavu.device.keeper import LOCK, SOCKET
from dejavu.device.keeper_line import MARK, Guardian, end_keeper, keeper_directory, start_keeper
from dejavu.device.vault import Vault
from dejavu.errors import DeviceError, PeerLostError

DEADLINE_S = 10.0
PUTTER = """
import os, signal, sys
from dejavu.device import open_device
from dejavu.device.keeper_line import Guardian
from dejavu.device.vault import Vault
job, guardian = sys.argv[1], int(sys.argv[2])
device = open_device("cpu")
memory = device.allocate_exportable(1 << 20)
memory.tensor()[:] = 7
vault = Vault(job, Guardian(guardian))
vault.put("0.1.0/pool", memory, {"num_rows": 3})
os.kill(os.getpid(), signal.SIGKILL)
"""


@pytest.fixture
def device():
    with open_device("cpu") as opened:
        yield opened


@pytest.fixture
def job():
    name = secrets.token_hex(16)
    yield name
    end_keeper(name)
    assert not keeper_directory(name).exists()
    until(lambda: not keepers(name))


@contextmanager
def sleeper():
    process = subprocess.Popen(["sleep", "60"])
    try:
        yield process
    finally:
        process.kill()
        process.wait()


def keepers(job):
    mark = f"{MARK}={keeper_directory(job).name}".encode()
    found = []
    for name in filter(str.isdigit, os.listdir("/proc")):
        try:
            with open(f"/proc/{name}/environ", "rb") as file:
                if mark in file.read().split(b"\0"):
                    found.append(int(name))
        except (FileNotFoundError, ProcessLookupError, PermissionError):
            continue
    return found


def is_gone(job):
    return not keepers(job) and not keeper_directory(job).exists()


def until(condition):
    end_s = time.monotonic() + DEADLINE_S
    while not condition():
        assert time.monotonic() < end_s
        time.sleep(5e-3)


def test_memory_outlives_a_killed_process(device, job):
    with sleeper() as guardian:
        putter = subprocess.run([sys.executable, "-c", PUTTER, job, str(guardian.pid)], timeout=60, check=False)
        assert putter.returncode == -signal.SIGKILL
        with Vault(job, Guardian(guardian.pid)) as vault:
            memory, about = vault.get("0.1.0/pool", device)
            with memory:
                assert (memory.location, about["num_rows"]) == (Location.DEVICE, 3)
                assert torch.equal(memory.tensor(), torch.full((1 << 20,), 7, dtype=torch.uint8))
        assert len(keepers(job)) == 1  # the killed one has not left


def test_it_ends_with_the_process_that_it_watches(job):
    with sleeper() as guardian:
        Vault(job, Guardian(guardian.pid))
        assert len(keepers(job)) == 1
    until(lambda: is_gone(job))


def test_it_ends_at_once_where_the_watched_process_is_gone_already(job):
    with sleeper() as guardian:
        pass
    with pytest.raises(PeerLostError):
        Vault(job, Guardian(guardian.pid))
    until(lambda: is_gone(job))


def test_a_job_that_is_started_again_in_time_finds_it(device, job):
    with sleeper() as first:
        vault = Vault(job, Guardian(first.pid, grace_s=5.0))
        with device.allocate_host_exportable(100) as memory:
            vault.put("a/b", memory)
    with sleeper() as second:
        again = Vault(job, Guardian(second.pid))
        assert again.contents()["a/b"].nbytes == 100
    until(lambda: is_gone(job))


def test_it_ends_with_the_last_who_leaves(job):
    with sleeper() as guardian:
        code = f"from dejavu.device.vault import *; Vault({job!r}, Guardian({guardian.pid})); input()"
        other = subprocess.Popen([sys.executable, "-c", code], stdin=subprocess.PIPE)
        until(lambda: (keeper_directory(job) / SOCKET).exists())
        with Vault(job, Guardian(guardian.pid)):
            assert len(keepers(job)) == 1
        other.communicate(timeout=DEADLINE_S)  # it ends without a word
        assert len(keepers(job)) == 1
    until(lambda: is_gone(job))


def test_one_that_ends_before_it_is_joined_is_started_again(job, monkeypatch):
    """As where the last rank leaves one engine of a job while the first one begins the next."""
    before = Vault(job, Guardian(os.getpid()))

    def start(directory, guardian):
        start_keeper(directory, guardian)
        before.close()
        until(lambda: not before.directory.exists())
        monkeypatch.undo()

    monkeypatch.setattr("dejavu.device.vault.start_keeper", start)
    with Vault(job, Guardian(os.getpid())) as vault:
        assert vault.contents() == {}


def test_many_start_one(job):
    code = f"from dejavu.device.vault import *; Vault({job!r}, Guardian({os.getpid()}))"
    starters = [subprocess.Popen([sys.executable, "-c", code]) for _ in range(4)]
    assert [starter.wait(60) for starter in starters] == [0] * 4
    assert len(keepers(job)) == 1


def test_nobody_else_can_call(job):
    Vault(job, Guardian(os.getpid()))
    directory = keeper_directory(job)
    assert [path.stat().st_mode & 0o777 for path in (directory, directory / SOCKET, directory / LOCK)] == [
        0o700,
        0o600,
        0o600,
    ]


def test_a_directory_of_others_is_refused(job):
    keeper_directory(job).mkdir(mode=0o755)
    with pytest.raises(DeviceError, match="0700"):
        Vault(job, Guardian(os.getpid()))


def test_what_is_no_request_is_refused(device, job):
    vault = Vault(job, Guardian(os.getpid()))
    path = keeper_directory(job) / SOCKET
    for message in (b"", b"\xff", b"[]", b"1", b'{"do": []}'):
        with connect(path) as caller:
            send_message(caller, message)
    with socket.socket(socket.AF_UNIX) as stranger:
        stranger.connect(str(path))
        stranger.sendall(b"GET / HTTP/1.1\r\n\r\n")
    with pytest.raises(DeviceError, match="0 descriptors"):
        vault._call({"do": "put", "name": "x", "nbytes": 1, "about": {}})
    with pytest.raises(DeviceError, match="KeyError"):
        vault._call({"do": "format"})
    assert vault.contents() == {}
    assert vault.get("x", device) is None


def test_what_is_dropped_or_replaced_is_closed(device, job):
    vault = Vault(job, Guardian(os.getpid()))
    (keeper,) = keepers(job)

    def num_fds():
        return len(os.listdir(f"/proc/{keeper}/fd"))

    time.sleep(0.05)  # it hangs up on the last caller
    before = num_fds()
    with device.allocate_exportable(10) as memory, device.allocate_host_exportable(20) as other:
        for name in ("0.1.0/pool", "0.1.0/weights", "0.11.0/pool", "0.1.0/pool"):
            vault.put(name, memory)
        vault.put("0.11.0/pool", other)
        assert {name: kept.nbytes for name, kept in vault.contents().items()} == {
            "0.1.0/pool": 10,
            "0.1.0/weights": 10,
            "0.11.0/pool": 20,
        }
        until(lambda: num_fds() == before + 3)
        assert sorted(vault.drop("0.1.0/")) == ["0.1.0/pool", "0.1.0/weights"]
        until(lambda: num_fds() == before + 1)


def test_one_that_hangs_is_killed(job):
    Vault(job, Guardian(os.getpid()))
    (keeper,) = keepers(job)
    os.kill(keeper, signal.SIGSTOP)
    end_keeper(job, timeout_s=0.2)
    assert is_gone(job)
