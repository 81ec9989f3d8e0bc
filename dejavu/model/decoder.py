"""Run one stage of a decoder: the layers [first, last) of a model, on one rank of its tensor group."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor

from dejavu.model.attention import Attention, AttentionPass, TorchAttention
from dejavu.model.batch import Batch
from dejavu.model.layers import (
    Linear,
    Matmul,
    Rotation,
    alibi_slopes,
    make_activation,
    make_norm,
    pick_matmul,
    rope_frequencies,
    share_matmul,
)
from dejavu.model.spec import ModelSpec, Shard

if TYPE_CHECKING:
    from dejavu.model.cuda_stage import CudaStage

__all__ = ["Batch", "StageModel"]

AllReduce = Callable[[Tensor], None]
Weights = dict[str, Tensor]


def _take_linear(weights: Weights, name: str, matmul: Matmul) -> Linear:
    return Linear(weights.pop(f"{name}.weight"), weights.pop(f"{name}.bias", None), matmul)


class Embedding:
    """Turn tokens and their positions into the first hidden states."""

    def __init__(self, spec: ModelSpec, weights: Weights, matmul: Matmul) -> None:
        self.tokens = weights["embed.tokens"]
        self.positions = weights.get("embed.positions")
        self.position_offset = spec.position_offset
        self.project = Linear(weights["embed.project_in"], None, matmul) if spec.embedding_size else None
        self.norm = make_norm(spec, weights, "embed.norm") if spec.embedding_norm else None

    def __call__(self, token_ids: Tensor, positions: Tensor) -> Tensor:
        """Give hidden states [num_tokens, hidden_size] for int64 ids and positions [num_tokens]."""
        hidden = F.embedding(token_ids, self.tokens)
        if self.project is not None:
            hidden = self.project(hidden)
        if self.positions is not None:
            hidden = hidden + F.embedding(positions + self.position_offset, self.positions)
        return hidden if self.norm is None else self.norm(hidden)


class DecoderLayer:
    """One layer's share of one tensor rank."""

    def __init__(self, spec: ModelSpec, shard: Shard, weights: Weights, index: int, matmul: Matmul) -> None:
        name = f"layers.{index}"
        self.index = index - shard.first_layer
        self.num_kv_heads = spec.num_kv_heads // shard.tp_size
        self.num_rotated = spec.num_heads // shard.tp_size + self.num_kv_heads  # heads of Q and K
        self.head_dim = spec.head_dim
        self.norm_first = spec.norm_first
        self.norm1, self.norm2 = make_norm(spec, weights, f"{name}.norm1"), make_norm(spec, weights, f"{name}.norm2")
        self.qkv, self.out = (_take_linear(weights, f"{name}.{part}", matmul) for part in ("qkv", "out"))
        self.ffn_in, self.ffn_out = (_take_linear(weights, f"{name}.{part}", matmul) for part in ("ffn_in", "ffn_out"))
        self.activate = make_activation(spec)

    def attend(self, x: Tensor, attention: AttentionPass, rotation: Rotation | None) -> Tensor:
        """Give this rank's part of the attention's output [num_tokens, hidden_size]."""
        num_tokens, num_queries = len(x), self.num_rotated - self.num_kv_heads
        heads = self.qkv(x).view(num_tokens, -1, self.head_dim)
        if rotation is not None:
            rotation.apply_(heads[:, : self.num_rotated])
        kv = heads[:, num_queries:].view(num_tokens, 2, self.num_kv_heads, self.head_dim)
        return self.out(attention.run(self.index, heads[:, :num_queries], kv).reshape(num_tokens, -1))

    def feed_forward(self, x: Tensor) -> Tensor:
        """Give this rank's part of the FFN's output [num_tokens, hidden_size]."""
        return self.ffn_out(self.activate(self.ffn_in(x)))


class Head:
    """Turn the last hidden states into the logits of this rank's share of the vocabulary."""

    def __init__(self, spec: ModelSpec, shard: Shard, weights: Weights, matmul: Matmul) -> None:
        self.norm = make_norm(spec, weights, "head.norm") if spec.final_norm else None
        self.project = Linear(weights["head.project_out"], None, matmul) if spec.embedding_size else None
        rows = weights.pop("head.logits", None)
        if rows is None:
            start, stop = shard.vocab_range(spec.vocab_size)
            self.logits = Linear(weights["embed.tokens"][start:stop], None, share_matmul(matmul))
        else:
            self.logits = Linear(rows, None, matmul)

    def __call__(self, hidden: Tensor) -> Tensor:
        """Give float32 logits [len(hidden), vocabulary share]."""
        if self.norm is not None:
            hidden = self.norm(hidden)
        if self.project is not None:
            hidden = self.project(hidden)
        return self.logits(hidden).float()


class StageModel:
    """A stage on one rank: embedding where it is the first, layers, head where it is the last.

    Takes `weights` over (the names of `stage_parameters`): what is packed anew is dropped from the dict, so the caller
    should keep no other reference to it. `all_reduce` sums a contiguous tensor over the tensor group in place; None
    where the group is one rank.
    """

    def __init__(self, spec: ModelSpec, shard: Shard, weights: Weights, all_reduce: AllReduce | None = None) -> None:
        assert (all_reduce is None) == (shard.tp_size == 1), "a tensor group of several ranks sums, one of one does not"
        first = next(iter(weights.values()))
        self.spec, self.shard, self.dtype, self.device = spec, shard, first.dtype, first.device
        self.hidden_size = spec.hidden_size
        self.matmul: Matmul = pick_matmul(self.dtype, self.device.type)
        self._all_reduce = all_reduce
        with torch.no_grad():
            self._embedding = Embedding(spec, weights, self.matmul) if shard.is_first else None
            self._head = Head(spec, shard, weights, self.matmul) if shard.is_last else None
            indices = range(shard.first_layer, shard.last_layer)
            self._layers = [DecoderLayer(spec, shard, weights, index, self.matmul) for index in indices]
        self._frequencies = rope_frequencies(spec).to(self.device) if spec.positions == "rope" else None
        self.attention = self._make_attention()
        self.cuda = self._make_cuda() if self.device.type == "cuda" else None

    def _make_attention(self) -> Attention:
        num_heads = self.spec.num_heads // self.shard.tp_size
        slopes = None
        if self.spec.positions == "alibi":
            start = self.shard.tp_rank * num_heads
            slopes = alibi_slopes(self.spec.num_heads)[start : start + num_heads].to(self.device)
        return TorchAttention(num_heads, self.spec.num_kv_heads // self.shard.tp_size, slopes)

    def _make_cuda(self) -> CudaStage:
        from dejavu.model.cuda_stage import CudaStage

        weights = self._embedding, self._layers, self._head
        return CudaStage(self.spec, self.shard, weights, self._all_reduce, self.dtype, self.device)

    @torch.no_grad()
    def warm_up(self, pool: Tensor, row_counts: Sequence[int], prompt_tokens: int = 0) -> None:
        """Prepare token steps of so many rows, each up to the numbers given; on CUDA only, else there is nothing to do.

        Compiles kernels, times the ways to multiply and captures graphs: seconds, and forward does the same when it
        first meets a number of rows. With `prompt_tokens`, the most of a pass, it also loads what prompts need: 0.2 s.
        What is in the pool stays. The ranks of a tensor group have to call it together.
        """
        if self.cuda is not None:
            self.cuda.warm_up(pool, row_counts, prompt_tokens)

    def likeliest(self, logits: Tensor) -> Tensor:
        """Give the likeliest token, int64, of each row of logits, at best of those that `forward` gave last.

        On CUDA they may be memory of the stage, for what is queued before the next pass.
        """
        return logits.argmax(dim=-1) if self.cuda is None else self.cuda.likeliest(logits)

    @torch.no_grad()
    def forward(
        self, batch: Batch, hidden: Tensor | None, pool: Tensor, layer_done: Callable[[int], None] | None = None
    ) -> Tensor:
        """Run the stage over the new tokens of `batch`, and append their K and V to `pool` in place.

        `hidden` [num_tokens, hidden_size] comes from the stage before (None for the first) and is not changed; `pool`
        is [block, layer, 2, token, kv_head, head_dim] in the model's dtype. Gives the hidden states for the next
        stage, or on the last one float32 logits [len(logit_rows), vocabulary share]; a new tensor, the caller's.
        `layer_done` is called with each layer's number in the model when its K and V are queued.

        On CUDA everything is queued on torch's current stream, which has to be the same one always, and the host waits
        for nothing. `token_ids` may lie on either side. The output of a token step is memory of the stage: the next
        token step of as many rows (padded) writes to it again, behind what is queued on the stream by then.
        """
        if self.cuda is not None:
            return self.cuda.forward(batch, hidden, pool, layer_done)
        positions = torch.tensor(batch.positions, device=self.device)
        if self._embedding is not None:
            hidden = self._embedding(batch.token_ids.to(self.device), positions)
        assert hidden is not None, "every stage but the first needs hidden states"
        rotation = None if self._frequencies is None else Rotation(positions, self._frequencies, self.dtype)
        attention = self.attention.plan(batch, pool)
        for index, layer in enumerate(self._layers, self.shard.first_layer):
            hidden = self._run_layer(layer, hidden, attention, rotation)
            if layer_done is not None:
                layer_done(index)
        return hidden if self._head is None else self._head(self._select(hidden, batch))

    def _run_layer(
        self, layer: DecoderLayer, hidden: Tensor, attention: AttentionPass, rotation: Rotation | None
    ) -> Tensor:
        if layer.norm_first:
            hidden = self._sum(layer.attend(layer.norm1(hidden), attention, rotation)).add_(hidden)
            return self._sum(layer.feed_forward(layer.norm2(hidden))).add_(hidden)
        hidden = layer.norm1(self._sum(layer.attend(hidden, attention, rotation)).add_(hidden))
        return layer.norm2(self._sum(layer.feed_forward(hidden)).add_(hidden))

    def _sum(self, partial: Tensor) -> Tensor:
        if self._all_reduce is not None:
            self._all_reduce(partial)
        return partial

    def _select(self, hidden: Tensor, batch: Batch) -> Tensor:
        """Keep the tokens whose logits are wanted."""
        tokens = batch.logit_tokens
        if tokens == list(range(len(hidden))):
            return hidden
        return hidden.index_select(0, torch.tensor(tokens, dtype=torch.int64, device=self.device))
