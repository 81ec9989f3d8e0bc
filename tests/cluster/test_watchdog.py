"""Who watches whom for hanging: all on a host, whoever of them has died."""

import os
import signal
import subprocess
import sys
from types import SimpleNamespace

import pytest

from dejavu.cluster.injection import Incident, IncidentLog
from dejavu.cluster.watchdog import Watchdog, next_on_host
from dejavu.transport.membership import Membership


@pytest.fixture
def sleepers():
    command = [sys.executable, "-c", "import time; time.sleep(60)"]
    processes = [subprocess.Popen(command) for _ in range(3)]
    yield processes
    for process in processes:
        process.kill()
        process.wait()


def test_stopped_process_is_ended_though_its_own_watcher_is_dead(sleepers, tmp_path):
    """Process 0 watches 1, which watches 2: 1 is dead, and the survivors cannot agree on that before 2 is ended."""
    pids = [os.getpid(), *(sleeper.pid for sleeper in sleepers)]
    channel = SimpleNamespace(membership=Membership.first(4), near={1, 2, 3}, process=0, pids=pids)
    channel.follow_lives, channel.is_followed = lambda: None, lambda process: process == 3
    watchdog = Watchdog(channel, 1.0, IncidentLog(tmp_path))
    assert next_on_host(channel) == 1
    sleepers[0].kill()
    sleepers[0].wait()
    sleepers[1].send_signal(signal.SIGSTOP)
    os.waitpid(sleepers[1].pid, os.WUNTRACED)
    assert next_on_host(channel) == 2
    for now in (11.0, 11.5, 11.9):
        watchdog.look(2, now)
    assert sleepers[1].poll() is None
    watchdog.look(2, 12.1)
    assert sleepers[1].wait(10) == -signal.SIGKILL
    assert IncidentLog(tmp_path).read() == [Incident(2, "hang", 12.1, pid=pids[2])]
    sleepers[2].kill()
    sleepers[2].wait()
    assert next_on_host(channel) == 3, "nobody would tell of its death"
    assert next_on_host(channel, {3}) is None
