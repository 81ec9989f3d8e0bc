"""Jobs by scripts that stand in for mpirun, and by a few real ones of two ranks."""

import json
import os
import secrets
import signal
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

import pytest

from dejavu.cluster import supervisor
from dejavu.cluster.launcher import Launch, Terminal, build_launch, find_mpirun
from dejavu.cluster.leftovers import job_processes, kill_job, remove_session_files
from dejavu.cluster.progress import QuietDisplay
from dejavu.cluster.segments import clear_segments, directory_of
from dejavu.cluster.supervisor import Supervisor, run_job
from dejavu.measure.run_directory import RunDirectory

REPOSITORY = Path(__file__).parents[2]


class Recorder(QuietDisplay):
    """Keep what is shown."""

    def __init__(self):
        self.out, self.err, self.states = [], [], []

    def write(self, line, *, error=False):
        (self.err if error else self.out).append(line)

    def update(self, status):
        self.states.append(status.state)


class Job:
    """Run one script as if it were mpirun."""

    def __init__(self, tmp_path, script, *arguments):
        self.directory = RunDirectory.create("test", tmp_path / "run")
        self.mark = secrets.token_hex(8)
        environment = clean_environment() | {"DEJAVU_RUN_DIR": str(self.directory.path), "DEJAVU_JOB": self.mark}
        self.launch = Launch(("/bin/bash", "-c", script, "mpirun", *arguments), environment)
        self.display = Recorder()

    def run(self, **settings):
        return Supervisor(self.launch, self.directory, self.display, **settings).run()


def clean_environment():
    prefixes = ("OMPI_", "PMIX_", "PRTE_")
    return {name: value for name, value in os.environ.items() if not name.startswith(prefixes)}


def result_command(outcome="ok", exit_code=0, error=None):
    text = json.dumps({"outcome": outcome, "exit_code": exit_code, "error": error, "rank": 0})
    return f"echo '{text}' > $DEJAVU_RUN_DIR/result.json"


def ended(mark, within_s=1.0):
    deadline = time.monotonic() + within_s
    while job_processes(mark) and time.monotonic() < deadline:
        time.sleep(0.02)
    return not job_processes(mark)


def test_result_file_decides_and_not_the_exit_code(tmp_path):
    job = Job(tmp_path, f"echo out; echo err >&2; printf unfinished; {result_command()}; exit 7")
    assert job.run().ok
    assert job.display.out == ["out", "unfinished"]
    assert job.display.err == ["err"]


def test_error_of_a_rank_gives_its_exit_code_and_hides_the_notice(tmp_path):
    notice = "-" * 74 + "\\nMPI_ABORT was invoked on rank 0\\n" + "-" * 74 + "\\n\\0"
    job = Job(
        tmp_path, f"{result_command('error', 2, 'bad model')}; echo rank 0: mine >&2; printf -- '{notice}' >&2; exit 0"
    )
    result = job.run()
    assert (result.exit_code, result.error) == (2, "bad model")
    assert job.display.err == ["rank 0: mine"]


def test_job_without_a_result_has_failed_and_says_all_it_knows(tmp_path):
    notice = "-" * 74 + "\\nprterun noticed that process rank 1 exited on signal 9\\n" + "-" * 74 + "\\n"
    job = Job(tmp_path, f"printf -- '{notice}' >&2; exit 0")
    result = job.run()
    assert result.exit_code == 1
    assert "without a result" in result.error
    assert any("exited on signal 9" in line for line in job.display.err)


def test_rank_that_dies_before_all_have_met_ends_the_job(tmp_path, monkeypatch):
    """The others wait in MPI's start for ever; helpers of mpirun may come and go."""
    monkeypatch.setattr(supervisor, "FAILED_GRACE_S", 0.3)
    rank = "OMPI_COMM_WORLD_RANK={} sleep {} &"
    job = Job(tmp_path, f"{rank.format(0, 100)} {rank.format(1, 0.5)} sleep 0.1; wait")
    started = time.monotonic()
    result = run_job(job.launch, job.directory, job.display)
    assert time.monotonic() - started < 10
    assert "a rank died before all had started" in result.error
    assert sum("trying once more" in line for line in job.display.err) == 1
    assert ended(job.mark)
    (tmp_path / "other").mkdir()
    slow = Job(tmp_path / "other", f"{rank.format(0, 1)} sleep 0.1; sleep 1; wait; {result_command()}")
    assert slow.run().ok


def test_progress_comes_from_the_status_file(tmp_path):
    status = '{"state": "serving", "requests_total": 3, "unknown": 1}'
    job = Job(tmp_path, f"sleep 0.4; echo '{status}' > $DEJAVU_RUN_DIR/status.json; sleep 0.6; {result_command()}")
    assert job.run().ok
    assert [
        state for state, before in zip(job.display.states, ["", *job.display.states], strict=False) if state != before
    ] == [
        "starting",
        "serving",
    ]


def test_job_that_stays_after_an_error_is_gone_within_five_seconds(tmp_path):
    script = (
        "trap '' TERM; sleep 100 & " + result_command("error", 1, "rank 1 failed: ValueError: x") + "; wait; sleep 100"
    )
    job = Job(tmp_path, script)
    started = time.monotonic()
    assert job.run().error == "rank 1 failed: ValueError: x"
    assert time.monotonic() - started < 5
    assert ended(job.mark)


def test_orphans_that_hold_the_output_open_are_swept(tmp_path):
    job = Job(tmp_path, f"setsid sleep 100 & {result_command()}")
    started = time.monotonic()
    assert job.run().ok
    assert time.monotonic() - started < 3
    assert ended(job.mark)


@pytest.fixture
def heeded_signals():
    """Heed the signals that a shell's background job, or nohup, ignores from its start on."""
    handlers = {signal.SIGINT: signal.default_int_handler, signal.SIGTERM: signal.SIG_DFL}
    before = {signum: signal.signal(signum, handler) for signum, handler in handlers.items()}
    yield
    for signum, handler in before.items():
        signal.signal(signum, handler)


@pytest.mark.usefixtures("heeded_signals")
@pytest.mark.parametrize(("signum", "exit_code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_signal_ends_the_whole_job(tmp_path, signum, exit_code):
    job = Job(tmp_path, "trap '' TERM INT; setsid sleep 100 & while true; do sleep 0.1; done")
    threading.Timer(0.4, os.kill, (os.getpid(), signum)).start()
    started = time.monotonic()
    assert job.run(grace_s=0.5).exit_code == exit_code
    assert time.monotonic() - started < 3
    assert ended(job.mark)
    assert signal.getsignal(signum) in (signal.default_int_handler, signal.SIG_DFL)


def test_failed_launch_is_tried_once_more(tmp_path):
    script = (
        f"echo x >> $DEJAVU_RUN_DIR/tries; [ $(wc -l < $DEJAVU_RUN_DIR/tries) = $0 ] && {result_command()} || exit 213"
    )
    for number, expected in (("2", "ok"), ("3", "error")):
        job = Job(tmp_path / number, "")
        job.launch = Launch(("/bin/bash", "-c", script, number), job.launch.environment)
        assert run_job(job.launch, job.directory, job.display).outcome == expected
        assert (job.directory.path / "tries").read_text() == "x\nx\n"
        assert job.directory.read_result()["outcome"] == expected


def test_sweep_spares_other_jobs():
    environment = clean_environment() | {"DEJAVU_JOB": "this-one"}
    process = subprocess.Popen(["sleep", "30"], env=environment)
    try:
        assert kill_job("this") == 0
        assert kill_job("this-one") == 1
        assert process.wait(5) == -signal.SIGKILL
    finally:
        process.kill()


RANK = """
import os, sys, time
from dejavu.cluster.process import JobResult, guarded, record
def body():
    from mpi4py import MPI
    rank = MPI.COMM_WORLD.Get_rank()
    if rank == 1 and sys.argv[1] == "raise":
        raise ValueError("no such row")
    if sys.argv[1] != "pass":
        print("pid", os.getpid(), flush=True)
        time.sleep(60)
    print("hello from", rank, "columns", os.environ["COLUMNS"], flush=True)
    MPI.COMM_WORLD.Barrier()
    if rank == 0:
        record(JobResult("ok", rank=0))
    return 0
sys.exit(guarded(body))
"""


def real_launch(tmp_path, mode):
    directory = RunDirectory.create("test", tmp_path / "run")
    launch = build_launch(
        2,
        (sys.executable, "-c", RANK, mode),
        mpirun=find_mpirun(os.environ["PATH"]),
        environment=clean_environment() | {"PYTHONPATH": str(REPOSITORY)},
        terminal=Terminal(71, color=False),
        run_dir=directory.path,
        job=secrets.token_hex(8),
    )
    return launch, directory


def test_real_job_passes(tmp_path):
    launch, directory = real_launch(tmp_path, "pass")
    display = Recorder()
    result = run_job(launch, directory, display)
    assert result.ok, display.err
    assert sorted(display.out) == ["hello from 0 columns 71", "hello from 1 columns 71"]
    assert display.err == []


def test_exception_on_one_rank_ends_a_real_job_with_its_traceback(tmp_path):
    launch, directory = real_launch(tmp_path, "raise")
    display = Recorder()
    started = time.monotonic()
    result = run_job(launch, directory, display)
    assert time.monotonic() - started < 8  # of which starting takes up to three on a busy machine
    assert (result.exit_code, result.error, result.rank) == (1, "rank 1 failed: ValueError: no such row", 1)
    assert display.err[0] == "rank 1: Traceback (most recent call last):"
    assert display.err[-1] == "rank 1: ValueError: no such row"
    assert ended(launch.environment["DEJAVU_JOB"])


def test_ranks_die_with_a_killed_mpirun_and_what_they_leave_can_be_removed(tmp_path):
    launch, directory = real_launch(tmp_path, "sleep")
    mark = launch.environment["DEJAVU_JOB"]
    process = subprocess.Popen(launch.command, env=dict(launch.environment), stdout=subprocess.PIPE, text=True)
    assert process.stdout
    pids = [int(process.stdout.readline().split()[1]) for _ in range(2)]
    assert set(pids) <= set(job_processes(mark))
    maps = "".join(Path(f"/proc/{pid}/maps").read_text() for pid in pids)
    segments = {line.split()[5] for line in maps.splitlines() if f"{directory_of(mark)}/sm_segment." in line}
    session = Path(tempfile.gettempdir(), f"ompi.{process.pid}")
    assert session.is_dir()
    assert segments
    process.kill()
    process.wait()
    assert ended(mark, within_s=3.0)
    assert directory.read_result() is None
    remove_session_files(process.pid)
    assert not session.exists()
    assert any(Path(path).exists() for path in segments)
    clear_segments(mark, 3.0)
    assert not directory_of(mark).exists()
