"""Two rank processes of a link, which the test's process tells what to do over a socket."""

import os
import re
import subprocess
import sys
import time
from multiprocessing.connection import Listener, wait
from pathlib import Path

from tests.transport.carriers import CARRIERS

ROOT = Path(__file__).parents[2]
START_S, CASE_S = 60.0, 45.0
MPIRUN = (
    "mpirun -n 2 --oversubscribe --with-ft ulfm --bind-to none --mca coll ^han "
    "--mca btl_tcp_eager_limit 1048576 --mca btl_tcp_rndv_eager_limit 1048576 --mca btl_tcp_max_send_size 1048576"
)


class Pair:
    """Start two ranks of a carrier; `run` has both do a case at the same time."""

    def __init__(self, name, kind, directory):
        self.directory = directory
        (directory / "tmp").mkdir()
        self.listener = Listener(str(directory / "line"), backlog=2)
        self.processes = []
        self.lines = {}
        try:
            self.start(name, kind)
        except BaseException:
            self.kill()
            raise

    def start(self, name, kind):
        arguments = ["-m", "tests.transport.rank", name, kind, str(self.directory / "line"), str(self.directory)]
        if CARRIERS[name].start == "mpirun":
            self.launch([*MPIRUN.split(), sys.executable, *arguments], "ranks", kind)
        else:
            for rank in "01":
                self.launch([sys.executable, *arguments, rank], rank, kind)
        self.listener._listener._socket.settimeout(START_S)
        for _ in range(2):
            line = self.listener.accept()
            self.lines[line.recv()[1]] = line
        assert self.collect("ready", START_S) == {0: None, 1: None}, self.output()

    def launch(self, command, label, kind):
        environment = {k: v for k, v in os.environ.items() if not k.startswith(("OMPI_", "PMIX_", "PRTE_"))}
        environment |= {
            "TMPDIR": str(self.directory / "tmp"),
            "OMPI_ALLOW_RUN_AS_ROOT": "1",
            "OMPI_ALLOW_RUN_AS_ROOT_CONFIRM": "1",
            "OMPI_MCA_btl_sm_backing_directory": str(self.directory / "tmp"),  # a killed rank leaves its segment
            "OMP_NUM_THREADS": "1",
            "PATH": f"{Path(sys.executable).parent}:{environment['PATH']}",
        }
        if kind == "cpu":  # memory of a file on a disk cannot be pinned
            environment["OMPI_MCA_osc_sm_backing_directory"] = str(self.directory / "tmp")
        with (self.directory / f"{label}.log").open("wb") as log:
            self.processes.append(subprocess.Popen(command, cwd=ROOT, env=environment, stdout=log, stderr=log))

    def run(self, case):
        """Run a case on both ranks; raises AssertionError with the tracebacks of those that failed."""
        for line in self.lines.values():
            line.send(case)
        results = self.collect("result", CASE_S)
        wrong = {rank: result for rank, result in results.items() if result is not None}
        assert not wrong, "".join(f"\n--- rank {rank}\n{result}" for rank, result in wrong.items()) + self.output()
        return results

    def collect(self, awaited, limit_s):
        """Serve exchanges until every rank that lives has said `awaited`; gives what each said. A dead rank is gone."""
        end_s, results, offered = time.monotonic() + limit_s, {}, {}
        while len(results) < len(self.lines):
            rank, word, data = self.hear(end_s)
            if word == awaited:
                results[rank] = data
            elif word == "exchange":
                offered[rank] = data
                if len(offered) == len(self.lines):
                    for line in self.lines.values():
                        line.send([offered[i] for i in sorted(offered)])
                    offered = {}
            else:
                del self.lines[rank]
                assert word == "gone", (rank, word, data)
        return results

    def hear(self, end_s):
        ready = wait(list(self.lines.values()), max(0.0, end_s - time.monotonic()))
        assert ready, f"the ranks said nothing for too long{self.output()}"
        rank = next(rank for rank, line in self.lines.items() if line is ready[0])
        try:
            return rank, *ready[0].recv()
        except (EOFError, ConnectionResetError):
            return rank, "gone", None

    def output(self):
        return "".join(f"\n--- {log.name}\n{log.read_text()[-4000:]}" for log in sorted(self.directory.glob("*.log")))

    def close(self):
        """End the ranks, and check that they leave nothing behind."""
        try:
            for line in self.lines.values():
                line.send(None)
            self.collect("end", START_S)
            for process in self.processes:
                process.wait(START_S)
        finally:
            pids = {str(process.pid) for process in self.processes}
            self.kill()
        left = list((self.directory / "tmp").rglob("dejavu*"))
        left += [path for path in Path("/dev/shm").iterdir() if pids & set(re.split(r"\W|_", path.name))]
        assert not left, f"left behind: {left}{self.output()}"

    def kill(self):
        for process in self.processes:
            process.kill()
            process.wait()
        for line in self.lines.values():
            line.close()
        self.listener.close()
