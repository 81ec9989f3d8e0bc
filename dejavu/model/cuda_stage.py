"""Run a stage on CUDA: token steps as replayed graphs, everything else launch by launch."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from dejavu.model.batch import Batch
from dejavu.model.cuda_operations import Operations
from dejavu.model.cuda_pass import AllReduce, StageParts, layer_parts
from dejavu.model.cuda_products import Products
from dejavu.model.cuda_prompts import PromptPass
from dejavu.model.cuda_steps import TokenSteps
from dejavu.model.spec import ModelSpec, Shard

if TYPE_CHECKING:
    from dejavu.model.decoder import DecoderLayer, Embedding, Head


TRIED_TOKENS = 1024  # of a prompt pass: larger ones use the same kernels


class CudaStage:
    """Hold the graphs and kernels of a stage. All work goes to torch's current stream, always the same one."""

    def __init__(
        self,
        spec: ModelSpec,
        shard: Shard,
        weights: tuple[Embedding | None, Sequence[DecoderLayer], Head | None],
        all_reduce: AllReduce | None,
        dtype: torch.dtype,
        device: torch.device,
    ) -> None:
        exact_sums()
        self.device = device
        operations = Operations(spec, shard, dtype, device)
        embedding, layers, head = weights
        parts = [layer_parts(spec, layer, operations.activation) for layer in layers]
        self.parts = StageParts(spec, shard, operations, embedding, head, parts, all_reduce)
        self.products = Products(operations)
        self.steps = TokenSteps(self.parts, self.products)

    def forward(
        self, batch: Batch, hidden: Tensor | None, pool: Tensor, layer_done: Callable[[int], None] | None
    ) -> Tensor:
        """Queue a pass, as `StageModel.forward` says."""
        with on_device(self.device):
            if not batch.is_token_generation:
                return PromptPass(self.parts, batch, hidden, pool).run(layer_done)
            output = self.steps.forward(batch, hidden, pool)
        if layer_done is not None:
            for layer in range(self.parts.shard.first_layer, self.parts.shard.last_layer):
                layer_done(layer)
        return output

    def likeliest(self, logits: Tensor) -> Tensor:
        """Give the likeliest token of each row of the logits that a pass gave; a token step has found them already."""
        found = self.steps.likeliest(logits)
        return logits.argmax(dim=-1) if found is None else found

    def warm_up(self, pool: Tensor, row_counts: Sequence[int], prompt_tokens: int) -> None:
        """Choose products and capture the graphs of token steps of so many rows; tensor ranks do it together.

        With `prompt_tokens`, the most of a pass, a prompt goes through the stage, too.
        """
        with torch.cuda.device(self.device):
            for num_rows in row_counts:
                self.steps.prepare(num_rows, pool)
            if prompt_tokens:
                self._try_prompt(min(prompt_tokens, TRIED_TOKENS, self.parts.spec.max_positions), pool)

    def _try_prompt(self, num_tokens: int, pool: Tensor) -> None:
        """Run a prompt, whose K and V go to one block of its own: libraries load their kernels when they need them."""
        block = pool.new_zeros((1, *pool.shape[1:]))
        batch = Batch(
            token_ids=torch.zeros(num_tokens, dtype=torch.int64),
            num_new=[num_tokens],
            context=[0],
            blocks=[[0] * -(-num_tokens // pool.shape[3])],
            logit_rows=[0],
        )
        hidden = pool.new_zeros(num_tokens, self.parts.spec.hidden_size)
        PromptPass(self.parts, batch, hidden, block).run(None)


def on_device(device: torch.device) -> AbstractContextManager[object]:
    """Make a device torch's current one, where it is not: to ask is cheaper."""
    is_current = torch.cuda.current_device() == device.index
    return nullcontext() if is_current else torch.cuda.device(device)


def exact_sums() -> None:
    """Let this process's matrix products be true float32, and sum in float32 where numbers are smaller."""
    torch.backends.cuda.matmul.allow_tf32 = False
    torch.backends.cuda.matmul.allow_fp16_reduced_precision_reduction = False
    torch.backends.cuda.matmul.allow_bf16_reduced_precision_reduction = False
