"""Carriers by name: what is there, why not, and that all ranks hear the same."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from dejavu.device import open_device
from dejavu.errors import ConfigError
from dejavu.transport.carrier import UnavailableError
from dejavu.transport.registry import LINKS, NAMES, available, open_carrier, read_secret

TWO_RANKS = """
import importlib
import json
import sys
from mpi4py import MPI
from dejavu.device import make_pieces, open_device
from dejavu.transport.carrier import UnavailableError
from dejavu.transport.registry import LINK_MODULES, LINKS, available, open_carrier

for name in LINK_MODULES:
    importlib.import_module(name)
before = set(sys.modules)

comm, device = MPI.COMM_WORLD, open_device("cpu")
answer = {"available": available(device, comm), "moved": []}
try:
    open_carrier("nccl", device, comm)
except UnavailableError as error:
    answer["nccl"] = str(error)
for name in LINKS:
    if answer["available"][name] is None:
        with open_carrier(name, device, comm) as carrier, device.allocate(100) as memory:
            device.fill(memory, comm.rank + 1, stream=device.compute_stream)
            call = carrier.send if comm.rank == 0 else carrier.receive
            call(1 - comm.rank, 9, memory, make_pieces([0], [0], [100]), stream=device.compute_stream).wait(20)
            assert (memory.tensor() == 1).all()
            answer["moved"].append(carrier.name)
            comm.Barrier()
answer["imported"] = sorted(name for name in set(sys.modules) - before if name.startswith("dejavu"))
print("ANSWER " + json.dumps(answer))
"""


def test_one_rank_has_stores_alone(tmp_path):
    device = open_device("cpu")
    reasons = available(device)
    assert set(reasons) == set(NAMES)
    assert [name for name, reason in reasons.items() if reason is None] == ["local", "disk"]
    for name in LINKS:
        with pytest.raises(UnavailableError, match=f"the carrier {name} is unavailable: .* mpirun -n 2"):
            open_carrier(name, device)
    with open_carrier("local", device, capacity_bytes=4096) as store:
        assert store.name == "local"
    with open_carrier("disk", device, directory=tmp_path / "store") as store:
        assert store.name == "disk"


def test_what_is_missing_is_said(tmp_path):
    device = open_device("cpu")
    with pytest.raises(ConfigError, match="choose one of ipc, nccl, mpi, rma, tcp, local, disk"):
        open_carrier("rdma", device)
    with pytest.raises(ConfigError, match="capacity_bytes"):
        open_carrier("local", device)
    with pytest.raises(ConfigError, match="directory"):
        open_carrier("disk", device)
    assert read_secret(None) is None
    assert read_secret("ab" * 32) == b"\xab" * 32
    for wrong in ("", "ab", "x" * 64):
        with pytest.raises(ConfigError, match="DEJAVU_TCP_SECRET"):
            read_secret(wrong)


def test_two_ranks_open_every_link_and_hear_the_same(tmp_path):
    environment = {k: v for k, v in os.environ.items() if not k.startswith(("OMPI_", "PMIX_", "PRTE_"))}
    environment |= {"OMPI_ALLOW_RUN_AS_ROOT": "1", "OMPI_ALLOW_RUN_AS_ROOT_CONFIRM": "1", "TMPDIR": str(tmp_path)}
    environment |= {f"OMPI_MCA_{part}_sm_backing_directory": str(tmp_path) for part in ("btl", "osc")}
    environment |= {"PATH": f"{Path(sys.executable).parent}:{environment['PATH']}", "DEJAVU_TCP_SECRET": "5a" * 32}
    command = [
        "mpirun",
        "-n",
        "2",
        "--oversubscribe",
        "--with-ft",
        "ulfm",
        "--bind-to",
        "none",
        "--mca",
        "coll",
        "^han",
    ]
    done = subprocess.run(
        [*command, sys.executable, "-c", TWO_RANKS], env=environment, capture_output=True, text=True, timeout=60
    )
    answers = [json.loads(line[7:]) for line in done.stdout.splitlines() if line.startswith("ANSWER ")]
    assert len(answers) == 2, done.stdout + done.stderr
    assert answers[0] == answers[1]
    assert answers[0]["moved"] == ["ipc", "mpi", "rma", "tcp"]
    assert "rank 0: it moves GPU memory" in answers[0]["nccl"]
