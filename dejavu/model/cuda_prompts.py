"""Process prompts on CUDA: rows of any lengths one after the other, without padding, through flash attention."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from dejavu.model.attention import TorchAttention
from dejavu.model.batch import Batch
from dejavu.model.cuda_pass import StageParts, StagePass
from dejavu.model.cuda_plan import PromptPlan, plan_prompts
from dejavu.model.cuda_products import Product, can_activate, multiply, multiply_activated

FLASH_TYPES = (torch.float16, torch.bfloat16)


def to_device(array: NDArray[np.generic], device: torch.device) -> Tensor:
    """Queue a copy of an array to the device, from pinned memory."""
    return torch.from_numpy(array).pin_memory().to(device, non_blocking=True)


class PromptPass(StagePass):
    """Run prompts, or any rows with new tokens, in memory of their own."""

    def __init__(self, parts: StageParts, batch: Batch, hidden: Tensor | None, pool: Tensor) -> None:
        device, num_layers, block_size = pool.device, pool.shape[1], pool.shape[3]
        plan = plan_prompts(batch, num_layers, block_size)
        self.batch, self.pool, self.plan = batch, pool, plan
        self.positions, self.slots = to_device(plan.positions, device), to_device(plan.slots, device)
        first = parts.embedding is not None
        super().__init__(parts, self._embed(parts) if first else _copied(hidden))
        self._attention = make_attention(self)

    def run(self, layer_done: Callable[[int], None] | None) -> Tensor:
        """Queue the pass, and give hidden states or logits, a new tensor."""
        self.run_layers(layer_done)
        if self.parts.head is None:
            self.settle()
            return self.hidden
        return self._logits()

    def multiply(self, product: Product, x: Tensor) -> Tensor:
        """Multiply by cuBLAS."""
        out = x.new_empty(len(x), product.linear.weight.shape[0])
        multiply(product.linear, x, out)
        return out

    def enter(self, product: Product) -> Tensor:
        """Normalise, then multiply."""
        return self.multiply(product, self.entered(product))

    def feed(self, product: Product) -> Tensor:
        """Let cuBLAS activate where it can."""
        x = self.entered(product)
        out = x.new_empty(len(x), product.num_out)
        if can_activate(product):
            multiply_activated(product, x, out)
        else:
            self.operations.activate(out, self.multiply(product, x), False)
        return out

    def add(self, product: Product, x: Tensor) -> None:
        """Leave the sum to the next normalisation."""
        self.reduced(self.multiply(product, x))

    def attend(self, layer: int, qkv: Tensor) -> Tensor:
        """Rotate, store, attend."""
        operations = self.operations
        operations.append(qkv, self.pool, self.positions, self.slots, layer)
        heads = qkv.view(len(qkv), -1, self.parts.spec.head_dim)
        return self._attention(layer, heads).reshape(len(qkv), -1)

    def normalised(self, name: str) -> Tensor:
        """Allocate."""
        return torch.empty_like(self.hidden)

    def _embed(self, parts: StageParts) -> Tensor:
        embedding, project, operations = parts.embedding, parts.project_in, parts.operations
        assert embedding is not None
        ids = self.batch.token_ids
        if ids.device.type == "cpu":
            ids = ids.to(torch.int32).pin_memory()
        ids = ids.to(operations.device, torch.int32, non_blocking=True)
        shape = len(ids), embedding.tokens.shape[1]
        hidden = torch.empty(shape, dtype=operations.dtype, device=operations.device)
        places = embedding.positions if project is None else None
        operations.embed(hidden, ids, embedding.tokens, self.positions, places, False)
        if project is not None:
            hidden = self.multiply(project, hidden)
            if embedding.positions is not None:
                operations.add_positions(hidden, self.positions, embedding.positions, False)
        if embedding.norm is not None:
            operations.add_norm(hidden, hidden, None, embedding.norm, False)
        return hidden

    def _logits(self) -> Tensor:
        head, project = self.parts.head, self.parts.project_out
        assert head is not None
        self._keep(self.batch.logit_tokens)
        if not len(self.hidden):
            return torch.empty(0, head.logits.weight.shape[0], dtype=torch.float32, device=self.hidden.device)
        if head.norm is not None:
            x = self.norm(head.norm)
        else:
            self.settle()
            x = self.hidden
        if project is not None:
            x = self.multiply(project, x)
        return torch.mm(x, head.logits.weight.t()).float()

    def _keep(self, tokens: list[int]) -> None:
        index = to_device(np.array(tokens, dtype=np.int64), self.hidden.device)
        self.hidden = self.hidden.index_select(0, index)
        if self.pending is not None:
            self.pending = self.pending.index_select(0, index)


def _copied(hidden: Tensor | None) -> Tensor:
    assert hidden is not None, "every stage but the first needs hidden states"
    return hidden.clone()


Attend = Callable[[int, Tensor], Tensor]


def make_attention(work: PromptPass) -> Attend:
    """Pick how a pass attends: flash attention, or torch's other kernels for float32, ALiBi and odd head sizes.

    The result takes a layer of the stage and heads [tokens, heads + 2 kv_heads, head_dim], rotated and stored, and
    gives [tokens, heads, head_dim]. The slower way attends row by row and holds masks; BLOOM goes there.
    """
    operations, spec = work.operations, work.parts.spec
    if operations.dtype in FLASH_TYPES and operations.slopes is None and spec.head_dim % 8 == 0:
        return FlashAttention(work.plan, work.pool, operations.num_heads, operations.scale)
    num_heads, num_kv_heads = operations.num_heads, operations.num_kv_heads
    planned = TorchAttention(num_heads, num_kv_heads, operations.slopes).plan(work.batch, work.pool)

    def attend(layer: int, heads: Tensor) -> Tensor:
        kv = heads[:, num_heads:].view(len(heads), 2, num_kv_heads, spec.head_dim)
        return planned.attend(layer, heads[:, :num_heads], kv)

    return attend


class FlashAttention:
    """Attend over rows of any lengths in one call; rows with a context read K and V back from the pool."""

    __slots__ = ("_keys", "_num_heads", "_plan", "_pool", "_queries", "_row_slots", "_scale")

    def __init__(self, plan: PromptPlan, pool: Tensor, num_heads: int, scale: float) -> None:
        self._plan, self._pool, self._num_heads, self._scale = plan, pool, num_heads, scale
        self._queries, self._keys = (to_device(s, pool.device) for s in (plan.query_starts, plan.key_starts))
        self._row_slots = to_device(plan.row_slots, pool.device) if len(plan.row_slots) else None

    def __call__(self, layer: int, heads: Tensor) -> Tensor:
        """Attend from each new token to its row up to itself."""
        query = heads[:, : self._num_heads]
        keys, values = self._rows(layer, heads)
        result: Tensor = torch.ops.aten._flash_attention_forward(
            query,
            keys,
            values,
            self._queries,
            self._keys,
            self._plan.longest_query,
            self._plan.longest_row,
            0.0,
            True,
            False,
            scale=self._scale,
        )[0]
        return result

    def _rows(self, layer: int, heads: Tensor) -> tuple[Tensor, Tensor]:
        if self._row_slots is None:
            keys, values = heads[:, self._num_heads :].chunk(2, dim=1)
            return keys, values
        _, _, _, block_size, num_kv_heads, head_dim = self._pool.shape
        rows = self._pool.view(-1, num_kv_heads, head_dim)
        first = self._row_slots + layer * 2 * block_size
        return rows.index_select(0, first), rows.index_select(0, first + block_size)
