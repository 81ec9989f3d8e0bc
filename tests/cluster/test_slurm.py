"""The batch template under a real Slurm: a throw-away cluster of two nodes, where Debian's packages are installed."""

import json
import os
import secrets
import shutil
import signal
import subprocess
import sys
import time
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import asdict, dataclass
from pathlib import Path

import pytest
import yaml

from dejavu.cluster.injection import FAULTS, Fault
from dejavu.engine.journal import read_journal
from dejavu.measure.failures import FailureRecord
from dejavu.measure.records import read_csv
from tests.cluster.two_hosts import TwoHosts, two_hosts
from tests.model_zoo import make_checkpoint

DAEMONS = ("munged", "slurmctld", "slurmd")
pytestmark = [
    pytest.mark.timeout(300),
    pytest.mark.skipif(not all(map(shutil.which, DAEMONS)), reason="no Slurm: install slurmctld, slurmd, slurm-client"),
]

REPOSITORY = Path(__file__).parents[2]
NODES = ("blade1", "blade2")
PROMPT = [5, 6, 7]
CONFIGURATION = """
ClusterName=throwaway
SlurmctldHost=blade1(10.79.0.1)
SlurmUser=root
AuthInfo=socket={directory}/munge/socket
StateSaveLocation={directory}/state
SlurmdSpoolDir={directory}/%n
SlurmctldPidFile={directory}/slurmctld.pid
SlurmdPidFile={directory}/%n.pid
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
SlurmdParameters=config_overrides
KillWait=5
NodeName=blade[1-2] CPUs=32
PartitionName=main Nodes=ALL Default=YES State=UP
"""


@dataclass(frozen=True, slots=True)
class Cluster:
    """Give commands to the first node."""

    hosts: TwoHosts
    environment: dict[str, str]

    def run(self, *command: object, check: bool = True) -> str:
        """Run a command in the job's directory; give its output."""
        words = [self.hosts.on, NODES[0], *map(str, command)]
        done = subprocess.run(
            words,
            cwd=self.hosts.directory,
            env=self.environment,
            capture_output=True,
            text=True,
            timeout=60,
            check=False,
        )
        assert done.returncode == 0 or not check, done.stdout + done.stderr
        return done.stdout

    def submit(self, *options: object) -> str:
        """Submit the template for two nodes of three ranks; give the job's number."""
        sizes = ("--nodes=2", "--ntasks-per-node=3", "--cpus-per-task=1")
        return self.run("sbatch", "--parsable", *sizes, REPOSITORY / "launch" / "slurm.sbatch", *options).strip()

    def state(self, job: str) -> str:
        """Give the state of a job, such as RUNNING."""
        return dict(word.partition("=")[::2] for word in self.run("scontrol", "show", "job", job).split())["JobState"]

    def log(self, job: str) -> str:
        """Give what a job has printed so far."""
        path = self.hosts.directory / f"dejavu-{job}.log"
        return path.read_text() if path.exists() else ""

    def results(self, job: str) -> Path:
        """Give a job's run directory."""
        return self.hosts.directory / "results" / "runs" / f"slurm-{job}"

    def await_state(self, job: str, state: str) -> None:
        """Wait until a job has ended so, and is done with on all nodes."""
        wait_until(lambda: self.state(job) not in ("PENDING", "RUNNING", "COMPLETING"))
        assert self.state(job) == state, self.log(job)

    def await_tokens(self, job: str, count: int) -> None:
        """Wait until the journal of a job that serves has so many tokens."""
        journal = self.results(job) / "journal.jsonl"
        wait_until(lambda: journal.exists() and journal.read_text().count("token") > count)


def wait_until(ready, timeout_s=120.0):
    deadline = time.monotonic() + timeout_s
    while not ready():
        assert time.monotonic() < deadline
        time.sleep(0.2)


@contextmanager
def daemon(*command: object, environment: dict[str, str]):
    process = subprocess.Popen([*map(str, command)], env=environment, stderr=subprocess.DEVNULL)
    try:
        yield
    finally:
        process.send_signal(signal.SIGTERM)
        process.wait(20)


@pytest.fixture(scope="module")
def cluster(tmp_path_factory):
    """Start munge, the controller and each node's daemon, in directories and with a key of their own."""
    directory = tmp_path_factory.mktemp("slurm")
    for name in ("munge", "state", *NODES):
        (directory / name).mkdir()
    (directory / "munge" / "key").write_bytes(secrets.token_bytes(128))
    (directory / "munge" / "key").chmod(0o400)
    (directory / "slurm.conf").write_text(CONFIGURATION.format(directory=directory))
    (directory / "cgroup.conf").write_text("CgroupPlugin=cgroup/v1\n")  # not used, but looked for
    environment = {
        name: value for name, value in os.environ.items() if not name.startswith(("OMPI_", "PMIX_", "PRTE_", "SLURM_"))
    }
    environment |= {
        "SLURM_CONF": str(directory / "slurm.conf"),
        "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
        "PYTHONPATH": str(REPOSITORY),
    }
    files = [f"--{name}-file={directory}/munge/{name}" for name in ("key", "pid", "log", "seed")]
    with ExitStack() as stack:
        hosts = stack.enter_context(two_hosts(directory, NODES, "10.79.0"))
        munge = ("munged", "--foreground", "--force", f"--socket={directory}/munge/socket", *files)
        for command in (
            munge,
            (hosts.on, NODES[0], "slurmctld", "-D"),
            *((hosts.on, node, "slurmd", "-D", "-N", node) for node in NODES),
        ):
            stack.enter_context(daemon(*command, environment=environment))
        made = Cluster(hosts, environment)
        wait_until(lambda: made.run("sinfo", "--noheader", "--format=%D %t", check=False).split() == ["2", "idle"], 30)
        yield made


def expected_tokens(model, prompts, count):
    """Give what transformers generates."""
    import torch
    from transformers import AutoModelForCausalLM

    reference = AutoModelForCausalLM.from_pretrained(model)
    reference.generation_config.eos_token_id = None
    return [
        reference.generate(torch.tensor([prompt]), max_new_tokens=count, do_sample=False)[0, len(prompt) :].tolist()
        for prompt in prompts
    ]


def outputs(run):
    return [json.loads(line)["token_ids"] for line in (run / "outputs.jsonl").read_text().splitlines()]


def write_workload(path, prompts, count):
    lines = [{"prompt_token_ids": prompt, "max_tokens": count, "ignore_eos": True} for prompt in prompts]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))


def left_on(cluster):
    """Name what runs on the nodes besides Slurm's daemons."""
    found = []
    for process in (process for node in NODES for process in cluster.hosts.processes(node)):
        with suppress(FileNotFoundError, ProcessLookupError):
            found.append(Path(f"/proc/{process}/cmdline").read_text().replace("\0", " "))
    return [command for command in found if command and not command.removeprefix(": ").startswith("slurm")]


STAGES = ("--prompt-pp", 1, "--token-pp", 2, "--transport", "tcp", "--spares", 1, "--replicate", "ring", "--threads", 1)


def test_job_on_two_nodes_goes_on_after_the_loss_of_a_device(cluster, tmp_path):
    model = make_checkpoint("llama", tmp_path / "model")
    write_workload(tmp_path / "workload.jsonl", [PROMPT], 24)
    fault = json.dumps([asdict(Fault(3, "kill", step=8, loses_memory=True))])
    options = ("--model", model, "--workload", tmp_path / "workload.jsonl", *STAGES)
    with_fault = Cluster(cluster.hosts, cluster.environment | {FAULTS: fault})
    job = with_fault.submit(*options)
    cluster.await_state(job, "COMPLETED")
    assert outputs(cluster.results(job)) == expected_tokens(model, [PROMPT], 24)
    ranks = yaml.safe_load((cluster.results(job) / "run.yaml").read_text())["ranks"]
    assert [rank["host"] for rank in ranks][:4] == [*[NODES[0]] * 3, NODES[1]]
    (failure,) = read_csv(cluster.results(job) / "failures.csv", FailureRecord)
    assert (failure.target, failure.prompts_recomputed) == ("token stage 1", 0)
    assert failure.bytes_restored > 0


def test_cancelled_job_leaves_nothing_and_can_be_gone_on_with_and_a_requeued_one_goes_on_by_itself(cluster, tmp_path):
    model = make_checkpoint("llama", tmp_path / "model")
    prompts = [[5 + number, 6, 7] for number in range(20)]
    write_workload(tmp_path / "workload.jsonl", prompts, 40)
    expected = expected_tokens(model, prompts, 40)
    job = cluster.submit("--model", model, "--workload", tmp_path / "workload.jsonl", *STAGES)
    cluster.await_tokens(job, 40)
    cluster.run("scancel", job)
    cluster.await_state(job, "CANCELLED")
    assert cluster.log(job).endswith("error: stopped by SIGTERM\n")
    wait_until(lambda: not left_on(cluster), 15)
    assert read_journal(cluster.results(job) / "journal.jsonl").is_complete

    again = cluster.submit("--resume", cluster.results(job))
    wait_until(lambda: "go on where they were" in cluster.log(again))
    cluster.run("scontrol", "requeue", again)
    wait_until(lambda: cluster.state(again) == "PENDING")
    cluster.run("scontrol", "update", f"jobid={again}", "StartTime=now")  # Slurm lets two minutes pass
    cluster.await_state(again, "COMPLETED")
    assert outputs(cluster.results(job)) == expected


def test_srun_is_refused_in_one_sentence(cluster):
    said = cluster.run("srun", "--ntasks=2", "--nodes=2", "bash", "-c", "dejavu serve synthetic 2>&1 || true")
    assert said.count("error: srun has started this 2 times: leave srun out") == 2
