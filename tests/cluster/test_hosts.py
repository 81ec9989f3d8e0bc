"""A job on two hosts, started as Slurm does: two network namespaces of this machine, stand-ins for its commands."""

import json
import os
import subprocess
import sys
from dataclasses import asdict
from pathlib import Path

import pytest
import yaml

from dejavu.cluster.injection import FAULTS, Fault
from dejavu.measure.failures import FailureRecord
from dejavu.measure.records import TransferRecord, read_csv
from tests.cluster.two_hosts import two_hosts
from tests.model_zoo import make_checkpoint

pytestmark = pytest.mark.timeout(150)

REPOSITORY = Path(__file__).parents[2]
SRUN = """#!/bin/bash
[ "$1" = --version ] && echo "slurm 23.11.4" && exit
number=0
while [[ $1 == -* ]]; do [[ $1 == --nodelist=* ]] && nodes=${{1#*=}}; shift; done
for node in ${{nodes//,/ }}; do
    SLURM_PROCID=$number SLURM_NODEID=$number SLURM_LOCALID=0 {directory}/on $node "$@" &
    number=$((number + 1))
done
wait
"""
SLURM = {
    "SLURM_JOB_ID": "77",
    "SLURM_JOBID": "77",
    "SLURM_NODELIST": "node[1-2]",
    "SLURM_JOB_NODELIST": "node[1-2]",
    "SLURM_NNODES": "2",
    "SLURM_NTASKS_PER_NODE": "3",
    "SLURM_TASKS_PER_NODE": "3(x2)",
    "SLURM_CPUS_ON_NODE": "3",
    "SLURM_JOB_CPUS_PER_NODE": "3(x2)",
}
PROMPT = [5, 6, 7]


@pytest.fixture
def hosts(tmp_path):
    """Make two hosts that a cable joins, with the command that Slurm would have."""
    with two_hosts(tmp_path, ("node1", "node2"), "10.77.0") as made:
        made.add_program("srun", SRUN.format(directory=tmp_path))
        yield tmp_path


def expected_tokens(model, count):
    """Give what transformers generates."""
    import torch
    from transformers import AutoModelForCausalLM

    reference = AutoModelForCausalLM.from_pretrained(model)
    reference.generation_config.eos_token_id = None
    return reference.generate(torch.tensor([PROMPT]), max_new_tokens=count, do_sample=False)[0, len(PROMPT) :].tolist()


def test_slurm_template_serves_on_two_hosts_and_goes_on_from_the_other_ones_replica(hosts):
    """Two token stages and the spare are on the second host; the device of the first of them is lost.

    Then the spare that plays it: the process that follows is started where it was, and maps what that host has kept.
    """
    model = make_checkpoint("llama", hosts / "model")
    request = {"prompt_token_ids": PROMPT, "max_tokens": 24, "ignore_eos": True}
    (hosts / "workload.jsonl").write_text(json.dumps(request) + "\n")
    environment = {
        name: value for name, value in os.environ.items() if not name.startswith(("OMPI_", "PMIX_", "PRTE_"))
    }
    environment |= {
        "PATH": f"{hosts}:{Path(sys.executable).parent}:{os.environ['PATH']}",
        "PYTHONPATH": str(REPOSITORY),
    }
    environment |= {"OMPI_MCA_btl_tcp_if_include": "lan", "PRTE_MCA_prte_if_include": "lan", **SLURM}
    faults = [Fault(3, "kill", step=8, loses_memory=True), Fault(3, "kill", step=16)]
    environment |= {FAULTS: json.dumps([asdict(fault) for fault in faults])}
    template = [
        "bash",
        REPOSITORY / "launch" / "slurm.sbatch",
        "--model",
        model,
        "--workload",
        hosts / "workload.jsonl",
    ]
    stages = ["--prompt-pp", 1, "--token-pp", 3, "--transport", "tcp", "--spares", 1, "--replicate", "ring"]
    own = ["--on-failure", "wait", "--threads", 1, "--out", hosts / "run"]
    command = [hosts / "on", "node1", *template, *stages, *own]
    done = subprocess.run(
        [*map(str, command)], cwd=hosts, env=environment, capture_output=True, text=True, timeout=120, check=False
    )
    assert done.returncode == 0, f"{done.stdout}\n{done.stderr}"
    output = json.loads((hosts / "run" / "outputs.jsonl").read_text())
    assert output["token_ids"] == expected_tokens(model, 24)
    ranks = yaml.safe_load((hosts / "run" / "run.yaml").read_text())["ranks"]
    assert [rank["host"] for rank in ranks][:4] == ["node1", "node1", "node1", "node2"]
    failures = read_csv(hosts / "run" / "failures.csv", FailureRecord)
    assert [(failure.target, failure.prompts_recomputed) for failure in failures] == [("token stage 1", 0)] * 2
    assert [failure.bytes_restored > 0 for failure in failures] == [True, False]
    assert "a new process has joined on node2" in done.stdout
    assert "tcp" in {copy.transport for copy in read_csv(hosts / "run" / "transfers.csv", TransferRecord)}
