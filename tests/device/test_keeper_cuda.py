"""The keeper with device memory: what a killed process had on a GPU is there for the next one, at once."""

import os
import secrets
import signal
import subprocess
import sys
import time

import pytest

from dejavu.device import num_cuda_devices, open_device
from dejavu.device.keeper_line import Guardian, end_keeper, keeper_directory
from dejavu.device.vault import Vault

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(num_cuda_devices() == 0, reason="needs a CUDA device")]
GIB = 1 << 30
PUTTER = """
import os, signal, sys, torch
from dejavu.device import open_device
from dejavu.device.keeper_line import Guardian
from dejavu.device.vault import Vault
job, guardian, nbytes = sys.argv[1], int(sys.argv[2]), int(sys.argv[3])
device = open_device("cuda")
vault = Vault(job, Guardian(guardian))
for name, allocate in (("pool", device.allocate_exportable), ("replica", device.allocate_host_exportable)):
    memory = allocate(nbytes if name == "pool" else 1 << 20)
    words = memory.tensor().view(torch.int64)
    words[:] = torch.arange(len(words), device=words.device)
    vault.put("0.0.0/" + name, memory)
device.synchronize()
os.kill(os.getpid(), signal.SIGKILL)
"""


def test_device_memory_outlives_a_killed_process():
    import torch

    job, nbytes = secrets.token_hex(16), 8 * GIB
    try:
        with open_device("cuda") as device:
            before = device.free_bytes()
            command = [sys.executable, "-c", PUTTER, job, str(os.getpid()), str(nbytes)]
            assert subprocess.run(command, timeout=100, check=False).returncode == -signal.SIGKILL
            assert device.free_bytes() < before - nbytes + GIB  # the keeper holds it
            vault = Vault(job, Guardian(os.getpid()))
            started = time.perf_counter()
            memory, _ = vault.get("0.0.0/pool", device)
            seconds = time.perf_counter() - started
            print(f"8 GiB of a killed process mapped in {1e3 * seconds:.2f} ms")
            assert seconds < 0.2
            words = memory.tensor().view(torch.int64)
            assert torch.equal(words[:: 1 << 20], torch.arange(0, len(words), 1 << 20, device=words.device))
            host, _ = vault.get("0.0.0/replica", device)
            assert torch.equal(host.tensor().view(torch.int64), torch.arange(1 << 17))
            del words
            host.close()
            memory.close()
            end_keeper(job)
            assert not keeper_directory(job).exists()
            device.synchronize()
            assert device.free_bytes() > before - GIB
    finally:
        end_keeper(job)
