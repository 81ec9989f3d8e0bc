"""The lock that tells of a process's death, before its memory is gone."""

import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from dejavu.transport.lifeline import Lifeline

OTHER = """
import sys
from dejavu.transport.lifeline import Lifeline
line = Lifeline()
memory = bytearray(int(sys.argv[1]))
memory[::4096] = b"x" * len(memory[::4096])
print(line.fd, flush=True)
sys.stdin.readline()
"""
NUMBER = 7  # of the other process in its run


@pytest.fixture
def line():
    with_fds = len(list(Path("/proc/self/fd").iterdir()))
    line = Lifeline()
    yield line
    line.close()
    assert len(list(Path("/proc/self/fd").iterdir())) <= with_fds  # fewer where another test's garbage went meanwhile


def start(line, nbytes=0):
    """Start another process, which is followed."""
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
    other = subprocess.Popen([sys.executable, "-c", OTHER, str(nbytes)], text=True, **pipes)
    line.follow(NUMBER, other.pid, int(other.stdout.readline()))
    return other


def end(other):
    other.kill()
    other.communicate()


def test_a_living_process_has_not_ended(line):
    other = start(line)
    assert not line.has_ended(NUMBER)
    started = time.monotonic()
    assert not line.await_end(NUMBER, 0.05)
    assert time.monotonic() - started >= 0.05
    assert not line.has_ended(NUMBER)
    end(other)


def test_a_killed_process_is_known_before_its_memory_is_gone(line):
    other = start(line, 400 << 20)
    killer = threading.Timer(0.1, lambda: os.kill(other.pid, signal.SIGKILL))
    killer.start()
    assert line.await_end(NUMBER, 20)
    told = os.waitid(os.P_PID, other.pid, os.WEXITED | os.WNOWAIT | os.WNOHANG)
    assert told is None  # its parent, this process, does not know yet
    assert line.has_ended(NUMBER)
    assert line.await_end(NUMBER, 20)  # and whoever else asks is told
    end(other)


def test_who_ends_by_itself_is_known_too(line):
    other = start(line)
    other.communicate("end\n")
    assert other.returncode == 0
    assert line.await_end(NUMBER, 0)


def test_who_gives_its_lock_back_has_not_ended(line):
    mine = Lifeline()
    line.follow(NUMBER, os.getpid(), mine.fd)
    mine.close()
    assert not line.await_end(NUMBER, 0)
