"""Run all tests: `python -m tests.run`. Serial ones first, then tests/mpi as one job of several ranks under mpirun.

mpirun's exit code says nothing about a fault-tolerant job, so what each rank reports in its own junit file decides.
Rank 0 alone writes to the terminal; what another rank wrote is shown where a test failed on it. The last line counts
all tests as pytest does; a test that runs on several ranks counts once, as failed if it failed on any.
"""

import argparse
import os
import shlex
import subprocess
import sys
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from signal import SIGKILL, SIGTERM
from xml.etree import ElementTree

from dejavu.cluster.launcher import FLAGS, ROOT_VARIABLES, THREAD_VARIABLES, find_mpirun, without_mpi, world_rank

ROOT = Path(__file__).resolve().parents[1]
NUM_RANKS = 7
DEADLINE_S = 240
GRACE_S = 5
TAIL_LINES = 120
OUTCOMES = ("failed", "passed", "skipped")  # the first that a test has on any rank is its outcome


@dataclass(frozen=True, slots=True)
class Report:
    """Say what one pytest process found: the outcome of each test, and where its output is."""

    name: str
    outcomes: dict[str, str]
    log: Path | None = None

    @property
    def failures(self) -> list[str]:
        """Name the tests that failed."""
        return [test for test, outcome in self.outcomes.items() if outcome == "failed"]


def read_report(name: str, junit: Path, log: Path | None = None) -> Report:
    """Read a junit file; a process that left none, or half of one, or that ran no test, has failed."""
    try:
        cases = list(ElementTree.parse(junit).getroot().iter("testcase"))
    except (OSError, ElementTree.ParseError):
        return Report(name, {"(ended before its tests did)": "failed"}, log)
    if not cases:
        return Report(name, {"(ran no test)": "failed"}, log)
    return Report(name, {f"{case.get('classname')}::{case.get('name')}": outcome(case) for case in cases}, log)


def outcome(case: ElementTree.Element) -> str:
    """Give one test's outcome."""
    if case.find("failure") is not None or case.find("error") is not None:
        return "failed"
    return "passed" if case.find("skipped") is None else "skipped"


def run_serial(junit: Path, arguments: Sequence[str]) -> Report:
    """Run pytest on everything but tests/mpi."""
    target = junit / "serial.xml"
    spread = ["-n", "2", "--dist", "loadfile"]  # a file's fixtures are made once
    command = [sys.executable, "-m", "pytest", "--ignore=tests/mpi", *spread, f"--junitxml={target}", *arguments]
    code = subprocess.run(command, cwd=ROOT, check=False).returncode
    report = read_report("serial", target)
    if code and not report.failures:
        report.outcomes[f"(pytest ended with exit code {code})"] = "failed"
    return report


def run_mpi(junit: Path, options: argparse.Namespace, arguments: Sequence[str]) -> list[Report]:
    """Run pytest on the MPI tests as one job; give each rank's report."""
    color = f"--color={'yes' if sys.stdout.isatty() else 'no'}"  # ranks always see a terminal
    own = ["--rank", "--junit", str(junit), "--mpi-tests", options.mpi_tests]
    program = [sys.executable, "-m", "tests.run", *own, color, *arguments]
    mpirun = find_mpirun(os.environ.get("PATH", ""))
    command = [str(mpirun), *FLAGS, "-n", str(options.ranks), *program]
    environment = dict.fromkeys((*ROOT_VARIABLES, *THREAD_VARIABLES), "1") | without_mpi(os.environ)
    print(f"\n{shlex.join(command)}", flush=True)
    process = subprocess.Popen(command, cwd=ROOT, env=environment, stdin=subprocess.DEVNULL, start_new_session=True)
    try:
        watch(process, junit, options.ranks, time.monotonic() + options.deadline)
    finally:
        end(process)
    return [read_report(f"rank {rank}", *rank_files(junit, rank)) for rank in range(options.ranks)]


def watch(process: subprocess.Popen[bytes], junit: Path, num_ranks: int, deadline: float) -> None:
    """Wait for the end of the job, but no longer than the deadline, nor than a while for the others of a lost rank."""
    while process.poll() is None:
        lost = [rank for rank in range(num_ranks) if is_lost(junit, rank)]
        if lost:
            deadline = min(deadline, time.monotonic() + GRACE_S)
        if time.monotonic() > deadline:
            print(f"ended the MPI tests: {f'lost rank {lost[0]}' if lost else 'they took too long'}", flush=True)
            return
        time.sleep(0.2)


def is_lost(junit: Path, rank: int) -> bool:
    """Tell whether a rank has started, and is gone without a report."""
    pid_file = junit / f"rank{rank}.pid"
    gone = pid_file.is_file() and not Path("/proc", pid_file.read_text()).exists()
    return gone and not rank_files(junit, rank)[0].is_file()  # in this order: a rank reports, then it ends


def end(process: subprocess.Popen[bytes]) -> None:
    """End mpirun, which ends its ranks, if it still runs; kill what does not heed it."""
    for signum in (SIGTERM, SIGKILL):
        if process.poll() is None:
            os.killpg(process.pid, signum)
            with suppress(subprocess.TimeoutExpired):
                process.wait(10)


def rank_files(junit: Path, rank: int) -> tuple[Path, Path]:
    """Name the junit file and the log of a rank."""
    return junit / f"rank{rank}.xml", junit / f"rank{rank}.log"


def be_rank(junit: Path, tests: str, arguments: Sequence[str]) -> int:
    """Be one rank of the MPI job: run pytest, with its output in a log except on rank 0."""
    from dejavu.cluster.process import die_with_parent

    die_with_parent()
    rank = world_rank(os.environ) or 0
    target, log = rank_files(junit, rank)
    (junit / f"rank{rank}.pid").write_text(str(os.getpid()))
    if rank:
        file = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o644)
        os.dup2(file, 1)
        os.dup2(file, 2)
    import pytest

    return pytest.main(["--with-mpi", "-p", "no:cacheprovider", f"--junitxml={target}", tests, *arguments])


def show(serial: Sequence[Report], ranks: Sequence[Report], elapsed_s: float) -> int:
    """Print what failed, the output of the ranks on which it did, and the counts; give the exit code."""
    for report in ranks:
        if report.failures and report.log and report.log.is_file():
            print(f"\n---- output of {report.name} (whole in {report.log})")
            print("\n".join(report.log.read_text(errors="replace").splitlines()[-TAIL_LINES:]))
    for report in (*serial, *ranks):
        for test in report.failures:
            print(f"FAILED on {report.name}: {test}" if ranks else f"FAILED {test}")
    found = [*(value for report in serial for value in report.outcomes.values()), *merge(ranks).values()]
    counts = [f"{found.count(word)} {word}" for word in OUTCOMES if word in found]
    print(f"\n===== {', '.join(counts)} in {elapsed_s:.2f}s =====")
    return 1 if "failed" in found or "passed" not in found else 0


def merge(ranks: Sequence[Report]) -> dict[str, str]:
    """Give each test's outcome over all ranks: failed where one failed, skipped where all skipped it."""
    tests = dict.fromkeys(test for report in ranks for test in report.outcomes)
    return {
        test: min((r.outcomes[test] for r in ranks if test in r.outcomes), key=OUTCOMES.index)  # the worst
        for test in tests
    }


def parse(arguments: Sequence[str] | None) -> tuple[argparse.Namespace, list[str]]:
    """Read the command line; what it does not know is pytest's."""
    parser = argparse.ArgumentParser(description="Run all tests; further options go to pytest.", allow_abbrev=False)
    parser.add_argument("--only", choices=("serial", "mpi"), help="run the serial tests or those under mpirun")
    parser.add_argument("--ranks", type=int, default=NUM_RANKS, help="ranks of the MPI tests")
    parser.add_argument("--deadline", type=float, default=DEADLINE_S, help="seconds that the MPI tests may take")
    parser.add_argument("--junit", type=Path, default=ROOT / "results" / "junit", help="directory of the reports")
    parser.add_argument("--mpi-tests", default="tests/mpi", help="the tests to run under mpirun")
    parser.add_argument("--rank", action="store_true", help=argparse.SUPPRESS)
    return parser.parse_known_args(arguments)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run what was asked for and give the exit code."""
    options, rest = parse(arguments)
    junit = options.junit.absolute()
    if options.rank:
        return be_rank(junit, options.mpi_tests, rest)
    started = time.monotonic()
    junit.mkdir(parents=True, exist_ok=True)
    for old in [file for suffix in ("xml", "log", "pid") for file in junit.glob(f"*.{suffix}")]:
        old.unlink()
    serial = [] if options.only == "mpi" else [run_serial(junit, rest)]
    ranks = [] if options.only == "serial" else run_mpi(junit, options, rest)
    return show(serial, ranks, time.monotonic() - started)


if __name__ == "__main__":
    sys.exit(main())
