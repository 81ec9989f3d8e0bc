"""Two hosts on one machine, for tests: network namespaces with names of their own, joined by a virtual cable."""

import os
import shutil
import subprocess
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import pytest

ON = """#!/bin/bash
# NODE COMMAND...: run a command on a host
space={prefix}$1
exec ip netns exec $space setsid -w unshare --uts --mount bash -c \
    'mount --bind {directory}/hosts /etc/hosts; hostname $0; exec "$@"' "$@"
"""


@dataclass(frozen=True, slots=True)
class TwoHosts:
    """Say how the two are called, and where the program `on` is that runs a command on one of them."""

    directory: Path
    prefix: str
    names: tuple[str, str]

    @property
    def on(self) -> str:
        """Give the program."""
        return str(self.directory / "on")

    def processes(self, name: str) -> list[int]:
        """Give the processes of a host."""
        return [int(process) for process in ip("netns", "pids", self.prefix + name, check=False).stdout.split()]

    def add_program(self, name: str, text: str) -> None:
        """Write a program beside `on`."""
        (self.directory / name).write_text(text)
        (self.directory / name).chmod(0o755)


def ip(*arguments: str, check: bool = True) -> subprocess.CompletedProcess[str]:
    return subprocess.run(["ip", *arguments], capture_output=True, text=True, check=check)


@contextmanager
def two_hosts(directory: Path, names: Sequence[str], network: str) -> Iterator[TwoHosts]:
    """Make two hosts with addresses NETWORK.1 and .2, or skip; kill what runs there, and remove them, at the end."""
    first, second = names
    hosts = TwoHosts(directory, f"dv{os.getpid()}", (first, second))
    spaces = [hosts.prefix + name for name in names]
    if shutil.which("ip") is None or os.geteuid() or ip("netns", "add", spaces[0], check=False).returncode:
        pytest.skip("no second host: namespaces need root and iproute2")
    try:
        ip("netns", "add", spaces[1])
        ends = [f"name lan netns {space}".split() for space in spaces]
        ip("link", "add", *ends[0], "type", "veth", "peer", *ends[1])
        for number, space in enumerate(spaces, 1):
            ip("-n", space, "addr", "add", f"{network}.{number}/24", "dev", "lan")
            ip("-n", space, "link", "set", "lan", "up")
            ip("-n", space, "link", "set", "lo", "up")
        (directory / "hosts").write_text(f"127.0.0.1 localhost\n{network}.1 {first}\n{network}.2 {second}\n")
        hosts.add_program("on", ON.format(directory=directory, prefix=hosts.prefix))
        yield hosts
    finally:
        for name, space in zip(names, spaces, strict=True):
            for process in hosts.processes(name):
                os.kill(process, 9)
            ip("netns", "del", space, check=False)
