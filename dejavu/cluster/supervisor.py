"""Watch a job from outside mpirun: show its output and progress, find its result, and leave nothing of it behind."""

import os
import secrets
import selectors
import signal
import subprocess
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import replace
from functools import partial
from types import FrameType

from dejavu.cluster.complaints import explain
from dejavu.cluster.launcher import JOB, RESUME, Launch
from dejavu.cluster.leftovers import child_ranks, job_processes, kill_job, remove_session_files
from dejavu.cluster.noise import BoilerplateFilter, Lines
from dejavu.cluster.process import JobResult, read_result, set_parent_death_signal
from dejavu.cluster.progress import Display, read_status
from dejavu.cluster.segments import clear_segments
from dejavu.device.keeper_line import end_keeper
from dejavu.measure.run_directory import RunDirectory

TICK_S = 0.1
STATUS_EVERY_S = 0.2
DRAIN_S = 1.0
GRACE_S = 5.0
FAILED_GRACE_S = 2.0
LINGER_S = {"ok": 10.0, "error": 1.0}  # how long a job may take to end by itself once its result is known
TAIL_LINES = 20
STOP_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
LAUNCH_FAILED = 213


class Stopped(BaseException):
    """Tell that a signal asks this process to end the job."""

    def __init__(self, signum: int) -> None:
        super().__init__(signum)
        self.signum = signum


@contextmanager
def handling(handler: Callable[[int, FrameType | None], None] | signal.Handlers) -> Iterator[None]:
    """Give Ctrl-C, SIGTERM and SIGHUP to `handler` for a while, but not those that are ignored (as nohup has it).

    In a thread, where that cannot be, do nothing.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    heeded = [signum for signum in STOP_SIGNALS if signal.getsignal(signum) is not signal.SIG_IGN]
    before = {signum: signal.signal(signum, handler) for signum in heeded}
    try:
        yield
    finally:
        for signum, previous in before.items():
            signal.signal(signum, previous)


def raise_stopped(signum: int, frame: FrameType | None) -> None:
    """Turn a signal into an exception."""
    raise Stopped(signum)


def new_job() -> str:
    """Make the unguessable name that marks every process of a job."""
    return secrets.token_hex(16)


class Supervisor:
    """Run one mpirun from start to end; the run directory is new."""

    def __init__(self, launch: Launch, directory: RunDirectory, display: Display, *, grace_s: float = GRACE_S) -> None:
        assert launch.environment[JOB]
        self.launch = launch
        self.directory = directory
        self.display = display
        self.grace_s = grace_s
        self.filters = BoilerplateFilter(), BoilerplateFilter()  # of output, of errors
        self.tail: deque[str] = deque(maxlen=TAIL_LINES)
        self.streams = selectors.DefaultSelector()
        self.process: subprocess.Popen[bytes] | None = None
        self.is_lost = False  # ended without a result, and nobody has asked for that
        self.ranks: set[int] = set()  # processes seen on this host while the job was starting
        self.incomplete_s = 0.0  # since when one of them has been missing

    def run(self) -> JobResult:
        """Start the job, watch it to its end, and give its result."""
        with handling(raise_stopped):
            try:
                self.start()
                self.watch()
                return self.result()
            except Stopped as stopped:
                name = signal.Signals(stopped.signum).name
                result = JobResult("error", 128 + stopped.signum, f"stopped by {name}")
                # written now, before a rank says that it has lost the others
                self.directory.write_result(result.outcome, result.exit_code, result.error, result.rank)
                self.stop(self.grace_s)
                return result
            finally:
                with handling(signal.SIG_IGN):
                    self.sweep()

    def start(self) -> None:
        """Start mpirun as the leader of its own session, where the terminal's Ctrl-C does not reach it."""
        self.process = subprocess.Popen(
            self.launch.command,
            env=dict(self.launch.environment),
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            start_new_session=True,
            preexec_fn=partial(set_parent_death_signal, signal.SIGTERM),
        )
        assert self.process.stdout
        assert self.process.stderr
        self.streams.register(self.process.stdout, selectors.EVENT_READ, Lines(partial(self.take, error=False)))
        self.streams.register(self.process.stderr, selectors.EVENT_READ, Lines(partial(self.take, error=True)))

    def watch(self) -> None:
        """Pass output and progress on until mpirun has ended, and end it where it does not after its result."""
        assert self.process
        status_due = known_since = 0.0
        while self.process.poll() is None:
            self.pump(TICK_S)
            now = time.monotonic()
            if now < status_due:
                continue
            status_due = now + STATUS_EVERY_S
            status, result = read_status(self.directory), read_result(self.directory)
            self.display.update(status)
            if status.state == "starting" and not result and self.cannot_start(now):
                self.stop(FAILED_GRACE_S)
            known_since = (known_since or now) if result else 0.0
            if result and (now - known_since > LINGER_S[result.outcome] or self.is_deserted):
                self.stop(FAILED_GRACE_S)
        self.drain(DRAIN_S)

    def cannot_start(self, now: float) -> bool:
        """Tell whether a rank of this host died before all had met, in MPI's start: the others wait for it for ever."""
        assert self.process
        here = child_ranks(self.process.pid)
        self.ranks |= here
        self.incomplete_s = (self.incomplete_s or now) if self.ranks - here else 0.0
        return self.incomplete_s > 0.0 and now - self.incomplete_s > FAILED_GRACE_S

    @property
    def is_deserted(self) -> bool:
        """Tell whether all ranks have ended: mpirun stays for ever where one of them was started by another one."""
        assert self.process
        return job_processes(self.launch.environment[JOB]) == [self.process.pid]

    def pump(self, timeout_s: float) -> bool:
        """Pass on what has come within `timeout_s`; give False at the end of both streams."""
        if not self.streams.get_map():
            time.sleep(timeout_s)
            return False
        ready = self.streams.select(timeout_s)
        for key, _ in ready:
            data = os.read(key.fd, 65536)
            key.data.feed(data) if data else self.close_stream(key)
        if not ready:
            self.show_rest()
        return bool(self.streams.get_map())

    def close_stream(self, key: selectors.SelectorKey) -> None:
        """Take the end of a stream."""
        self.streams.unregister(key.fileobj)
        key.data.flush()

    def show_rest(self) -> None:
        """Show what has waited too long for the end of its line or block."""
        for key in self.streams.get_map().values():
            key.data.flush()
        for error, held in enumerate(self.filters):
            for line in held.release():
                self.show(line, error=bool(error))

    def drain(self, timeout_s: float) -> None:
        """Pass on what the pipes still hold; a process that outlives mpirun may keep them open."""
        deadline = time.monotonic() + timeout_s
        while time.monotonic() < deadline and self.pump(TICK_S):
            continue
        self.show_rest()

    def show(self, line: str, *, error: bool = False) -> None:
        """Show one line of output."""
        self.tail.append(line)
        self.display.write(line, error=error)

    def take(self, line: str, *, error: bool) -> None:
        """Show one line, unless it is of one of mpirun's notices."""
        for shown in self.filters[error].push(line):
            self.show(shown, error=error)

    @property
    def withheld(self) -> list[str]:
        """Give what was not shown."""
        return [line for held in self.filters for line in held.withheld]

    def result(self) -> JobResult:
        """Find how the job ended: mpirun's exit code says little, so a job without a result has failed."""
        assert self.process
        result = read_result(self.directory)
        if result:
            return result
        self.is_lost = True
        if complaint := explain([*self.withheld, *self.tail]):
            return JobResult("error", 1, complaint)
        for line in self.withheld:
            self.show(line, error=True)
        if self.incomplete_s:
            return JobResult("error", 1, "a rank died before all had started: look for its last words above")
        code = self.process.returncode
        how = f"signal {-code}" if code < 0 else f"exit code {code}"
        return JobResult("error", 1, f"the job ended without a result (mpirun: {how})")

    @property
    def launch_failed(self) -> bool:
        """Tell whether mpirun itself could not start the ranks, which happens once in hundreds and passes."""
        if self.process is None or read_result(self.directory) or read_status(self.directory).state != "starting":
            return False
        said = any("listener thread failed" in line for line in [*self.tail, *self.withheld])
        return said or self.process.returncode == LAUNCH_FAILED or self.incomplete_s > 0.0

    def stop(self, grace_s: float) -> None:
        """End mpirun, which ends its ranks: ask it, then kill all after `grace_s` or at a second signal."""
        if self.process is None:
            return
        with suppress(Stopped):
            self.process.send_signal(signal.SIGTERM)
            deadline = time.monotonic() + grace_s
            while self.process.poll() is None and time.monotonic() < deadline:
                self.pump(TICK_S)
        self.kill()

    def kill(self) -> None:
        """Kill mpirun and every process of the job on this host."""
        if self.process is None:
            return
        if self.process.poll() is None:
            self.process.kill()
            self.process.wait()
        kill_job(self.launch.environment[JOB])

    def sweep(self) -> None:
        """Kill every process of the job that is left on this host, and remove the files of a killed mpirun."""
        self.streams.close()
        self.kill()
        if self.process is None:
            return
        for stream in (self.process.stdout, self.process.stderr):
            if stream:
                stream.close()
        remove_session_files(self.process.pid)
        clear_segments(self.launch.environment[JOB], DRAIN_S)


@contextmanager
def ending_keeper(job: str) -> Iterator[None]:
    """End this host's keeper with a job, whose memory it holds from one start of mpirun to the next."""
    try:
        yield
    finally:
        end_keeper(job)


def run_job(launch: Launch, directory: RunDirectory, display: Display, *, restarts: int = 0) -> JobResult:
    """Run a job to its end and give its result; try once more where mpirun itself failed to start it.

    Where it is lost while it serves, start it again up to so many times, from where its journal says that it was.
    """
    with display, ending_keeper(launch.environment[JOB]):
        supervisor = Supervisor(launch, directory, display)
        result = supervisor.run()
        if supervisor.launch_failed:
            display.write(f"mpirun could not start the ranks ({result.error}): trying once more", error=True)
            supervisor = Supervisor(launch, directory, display)
            result = supervisor.run()
        again = replace(launch, environment={**launch.environment, RESUME: "1"})
        while supervisor.is_lost and restarts and read_status(directory).state != "starting":
            restarts -= 1
            display.write(f"{result.error}: starting it again where it was", error=True)
            supervisor = Supervisor(again, directory, display)
            result = supervisor.run()
    directory.write_result(result.outcome, result.exit_code, result.error, result.rank)  # unless a rank has
    return result
