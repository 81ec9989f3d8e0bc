"""What a prompt pass takes of a GPU's memory beside weights and KV: no more than is reckoned when prompts are cut."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from dejavu.device import num_cuda_devices
from dejavu.engine.sizing import activation_bytes
from dejavu.model.batch import Batch
from dejavu.model.decoder import StageModel
from dejavu.model.spec import Shard
from dejavu.model.table import MODELS
from dejavu.model.weights import dummy_stage

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(num_cuda_devices() == 0, reason="no CUDA device, or no cuda-python"),
]
ROWS, LENGTH, BLOCK_SIZE = 8, 512, 32


@pytest.mark.parametrize("name", ["opt-1.3b", "llama-3-8b"])
def test_a_pass_takes_no_more_than_was_reckoned(name):
    spec, shard = replace(MODELS[name], num_layers=2), Shard(0, 2, 2)
    stage = StageModel(spec, shard, dummy_stage(spec, shard, torch.float16, torch.device("cuda", 0)))
    per_row = LENGTH // BLOCK_SIZE
    shape = (ROWS * per_row, 2, 2, BLOCK_SIZE, spec.num_kv_heads, spec.head_dim)
    pool = torch.zeros(shape, dtype=torch.float16, device="cuda:0")
    blocks = [list(range(row * per_row, (row + 1) * per_row)) for row in range(ROWS)]
    prompts = Batch(
        torch.zeros(ROWS * LENGTH, dtype=torch.int64), [LENGTH] * ROWS, [0] * ROWS, blocks, list(range(ROWS))
    )
    stage.forward(prompts, None, pool)  # libraries take their workspaces once
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    stage.forward(prompts, None, pool)
    torch.cuda.synchronize()
    taken = torch.cuda.max_memory_allocated() - before
    reckoned = activation_bytes(spec, shard, ROWS * LENGTH, ROWS, "float16")
    assert 0.2 * reckoned < taken <= reckoned, f"{taken / reckoned:.2f} of what was reckoned"
