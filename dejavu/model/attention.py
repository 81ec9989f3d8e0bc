"""Append a pass's K and V to the block pool, and attend from its queries to what the pool then holds.

The work is planned once per pass (`Attention.plan`): slots, views, masks. Each layer then only runs the plan. A row
whose tokens lie in one block is read in place; one that spans several is gathered.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import groupby
from typing import Protocol

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor

from dejavu.model.batch import Batch

_QUERY_CHUNK = 256  # queries of a prompt per masked call: bounds the mask's memory


class AttentionPass(Protocol):
    """The attention of one pass, ready to run layer by layer."""

    def run(self, layer: int, query: Tensor, kv: Tensor) -> Tensor:
        """Store kv [tokens, 2, kv_heads, head_dim] as layer `layer` of the stage, and attend from query.

        `query` is [tokens, heads, head_dim]; the result has its shape and order.
        """
        ...


class Attention(Protocol):
    """A way to attend over a block pool: one per stage."""

    def plan(self, batch: Batch, pool: Tensor) -> AttentionPass:
        """Prepare a pass over pool [block, layer, 2, token, kv_head, head_dim]."""
        ...


@dataclass(frozen=True, slots=True)
class TorchAttention:
    """Attend with torch's scaled_dot_product_attention, on any device; `slopes` (float32 [heads]) for ALiBi."""

    num_heads: int
    num_kv_heads: int
    slopes: Tensor | None = None

    def plan(self, batch: Batch, pool: Tensor) -> TorchPass:
        """Prepare a pass: rows with one new token together, prompts of one length together, others by themselves."""
        num_tokens = [c + n for c, n in zip(batch.context, batch.num_new, strict=True)]
        assert all(len(b) * pool.shape[3] >= n for b, n in zip(batch.blocks, num_tokens, strict=True)), "blocks"
        assert pool.is_contiguous()
        slots = pool_slots(batch, pool).to(pool.device)
        return TorchPass(pool.view(-1, pool.shape[4] * pool.shape[5]), list(slots.unbind(0)), self._parts(batch, pool))

    def _parts(self, batch: Batch, pool: Tensor) -> list[Part]:
        rows = range(batch.num_rows)
        tokens = [row for row in rows if batch.num_new[row] == 1 and batch.context[row] > 0]
        parts: list[Part] = [TokenPart(self, batch, tokens, pool)] if tokens else []
        others = [row for row in rows if not (batch.num_new[row] == 1 and batch.context[row] > 0)]
        starts = batch.row_starts
        for context, length, group in _runs(batch, others):
            start, stop = starts[group[0]], starts[group[-1] + 1]
            if context == 0:
                parts.append(PromptPart(self, start, stop, length, pool))
            else:
                parts.append(ChunkPart(self, start, stop, context, batch.blocks[group[0]], pool))
        return parts


def _runs(batch: Batch, rows: list[int]) -> list[tuple[int, int, list[int]]]:
    """Split rows into runs of neighbours that start a prompt with equal lengths; a row with context stays alone."""

    def kind(pair: tuple[int, int]) -> tuple[int, int, int]:
        place, row = pair
        alone = row if batch.context[row] else place - row  # neighbours have equal place - row
        return batch.context[row], batch.num_new[row], alone

    groups = ((key, [row for _, row in pairs]) for key, pairs in groupby(enumerate(rows), kind))
    return [(context, length, group) for (context, length, _), group in groups]


def pool_slots(batch: Batch, pool: Tensor) -> Tensor:
    """Give where each new token's K and V go, as rows of the pool seen as [rows, kv_heads * head_dim].

    int64 [num_layers, 2 * num_tokens], K and V of a token side by side.
    """
    num_layers, block_size = pool.shape[1], pool.shape[3]
    per_layer = 2 * block_size
    first = [
        batch.blocks[row][position // block_size] * num_layers * per_layer + position % block_size
        for row in range(batch.num_rows)
        for position in range(batch.context[row], batch.context[row] + batch.num_new[row])
    ]
    pairs = torch.tensor(first)[:, None] + torch.tensor([0, block_size])
    return torch.arange(0, num_layers * per_layer, per_layer)[:, None] + pairs.view(1, -1)


class Part(Protocol):
    """Some of a pass's rows, attended together."""

    def attend(self, layer: int, query: Tensor, kv: Tensor, out: Tensor | None) -> Tensor:
        """Give the part's result, [its tokens, heads, head_dim], or write it to its place in `out` and give `out`."""
        ...


@dataclass(slots=True)
class TorchPass:
    """Run the parts of a pass one after the other."""

    rows: Tensor  # the pool as [rows, kv_heads * head_dim]
    slots: list[Tensor]  # per layer
    parts: list[Part]

    def run(self, layer: int, query: Tensor, kv: Tensor) -> Tensor:
        """Store and attend."""
        self.rows.index_copy_(0, self.slots[layer], kv.reshape(-1, self.rows.shape[1]))
        return self.attend(layer, query, kv)

    def attend(self, layer: int, query: Tensor, kv: Tensor) -> Tensor:
        """Attend; the pool holds kv already."""
        if len(self.parts) == 1:
            return self.parts[0].attend(layer, query, kv, None)
        out = torch.empty_like(query)
        for part in self.parts:
            part.attend(layer, query, kv, out)
        return out


class Cache:
    """The first `length` tokens of several rows: per layer, K and V as [rows, kv_heads, length, head_dim]."""

    __slots__ = ("_gather", "_shape", "_views", "length", "num_rows")

    def __init__(self, pool: Tensor, blocks: list[list[int]], length: int) -> None:
        block_size = pool.shape[3]
        num_blocks = -(-length // block_size)
        self.length, self.num_rows = length, len(blocks)
        # [layers * 2] views of [block, token, kv_head, head_dim], of the tokens that are needed
        views = pool[:, :, :, : min(length, block_size)].permute(1, 2, 0, 3, 4, 5).flatten(0, 1)
        first = [row[0] for row in blocks]
        self._gather: Tensor | None = None
        if num_blocks == 1 and first == list(range(first[0], first[0] + len(first))):
            views = views[:, first[0] : first[0] + len(first)]
        else:
            # A row shorter than the longest reads its own last block again; the mask hides what it reads.
            table = [row[min(i, len(row) - 1)] for row in blocks for i in range(num_blocks)]
            self._gather = torch.tensor(table, device=pool.device)
        self._shape = (len(blocks), num_blocks * views.shape[2], *pool.shape[4:])
        self._views = views.unbind(0)

    def read(self, layer: int) -> tuple[Tensor, Tensor]:
        """Give K and V of a layer: views of the pool where they can be, else copies."""
        return self._read(2 * layer), self._read(2 * layer + 1)

    def _read(self, index: int) -> Tensor:
        view = self._views[index]
        if self._gather is not None:
            view = view.index_select(0, self._gather).view(self._shape)[:, : self.length]
        return view.transpose(1, 2)


def _span(first_blocks: list[int]) -> tuple[int, int]:
    return min(first_blocks), max(first_blocks) + 1


class TokenPart:
    """Rows with one new token each, in one call: a group of query heads takes the place of the query's length."""

    __slots__ = ("_attention", "_bias", "_cache", "_places", "_tokens")

    def __init__(self, attention: TorchAttention, batch: Batch, rows: list[int], pool: Tensor) -> None:
        self._attention = attention
        starts = batch.row_starts
        everything = len(rows) == batch.num_rows
        self._tokens = None if everything else torch.tensor([starts[row] for row in rows], device=pool.device)
        lengths = [batch.context[row] + 1 for row in rows]
        blocks = [batch.blocks[row] for row in rows]
        self._places: Tensor | None = None
        if max(lengths) <= pool.shape[3]:
            blocks, lengths = self._spread(blocks, lengths, pool)
        self._cache = Cache(pool, blocks, max(lengths))
        self._bias = self._make_bias(lengths, pool)

    def _spread(self, blocks: list[list[int]], lengths: list[int], pool: Tensor) -> tuple[list[list[int]], list[int]]:
        """Take blocks in the pool's order with small gaps filled, so that they are one view of it."""
        first = [row[0] for row in blocks]
        start, stop = _span(first)
        ordered = first == list(range(start, stop))
        if ordered or stop - start > max(len(first) + 1, 3 * len(first) // 2) or len(set(first)) < len(first):
            return blocks, lengths
        self._places = torch.tensor([block - start for block in first], device=pool.device)
        by_block = dict(zip(first, lengths, strict=True))
        return [[block] for block in range(start, stop)], [by_block.get(block, 1) for block in range(start, stop)]

    def _make_bias(self, lengths: list[int], pool: Tensor) -> Tensor | None:
        """Hide what lies beyond a row's end, and add ALiBi: [rows, kv_heads or 1, group or 1, length], or nothing."""
        slopes, longest = self._attention.slopes, max(lengths)
        if slopes is None and min(lengths) == longest:
            return None
        last = torch.tensor(lengths, device=pool.device).view(-1, 1, 1, 1) - 1
        distance = torch.arange(longest, device=pool.device).view(1, 1, 1, -1) - last
        bias = torch.zeros((), device=pool.device)
        if slopes is not None:
            bias = distance * slopes.view(1, self._attention.num_kv_heads, -1, 1)
        return torch.where(distance > 0, -torch.inf, bias).to(pool.dtype)

    def attend(self, layer: int, query: Tensor, kv: Tensor, out: Tensor | None) -> Tensor:
        """Attend from every row's token to its whole row."""
        if self._tokens is not None:
            query = query[self._tokens]
        _, num_heads, head_dim = query.shape
        if self._places is not None:
            query = query.new_zeros(self._cache.num_rows, num_heads, head_dim).index_copy_(0, self._places, query)
        grouped = query.reshape(len(query), self._attention.num_kv_heads, -1, head_dim)
        keys, values = self._cache.read(layer)
        result = F.scaled_dot_product_attention(grouped, keys, values, self._bias)
        result = result.reshape(len(query), num_heads, head_dim)
        if self._places is not None:
            result = result.index_select(0, self._places)
        return result if out is None else out.index_copy_(0, _known(self._tokens), result)


def _known(tokens: Tensor | None) -> Tensor:
    assert tokens is not None, "a part of a pass knows its tokens"
    return tokens


def _attend_masked(
    query: Tensor, keys: Tensor, values: Tensor, bias: Tensor, slopes: Tensor | None, is_grouped: bool
) -> Tensor:
    """Attend with bias [queries, keys], 0 or (ALiBi) the distance times each head's slope, -inf where hidden."""
    results = []
    for part, hidden in zip(torch.split(query, _QUERY_CHUNK, dim=2), torch.split(bias, _QUERY_CHUNK), strict=True):
        mask = hidden if slopes is None else (slopes.view(-1, 1, 1) * hidden)
        mask = mask.to(query.dtype)
        results.append(F.scaled_dot_product_attention(part, keys, values, mask, enable_gqa=is_grouped))
    return results[0] if len(results) == 1 else torch.cat(results, dim=2)


def _causal_bias(num_new: int, num_keys: int, with_distance: bool, device: torch.device) -> Tensor:
    """Hide later tokens from each of the last `num_new`: float32 [num_new, num_keys] of 0 or distance, and -inf."""
    positions = torch.arange(num_keys - num_new, num_keys, device=device)
    distance = torch.arange(num_keys, device=device) - positions[:, None]
    seen = distance.float() if with_distance else torch.zeros((), device=device)
    return torch.where(distance > 0, -torch.inf, seen)


class PromptPart:
    """Neighbouring rows that start with prompts of one length: attend within the pass, without the pool."""

    __slots__ = ("_attention", "_bias", "_length", "_start", "_stop")

    def __init__(self, attention: TorchAttention, start: int, stop: int, length: int, pool: Tensor) -> None:
        self._attention, self._start, self._stop, self._length = attention, start, stop, length
        has_alibi = attention.slopes is not None
        self._bias = _causal_bias(length, length, True, pool.device) if has_alibi else None

    def attend(self, layer: int, query: Tensor, kv: Tensor, out: Tensor | None) -> Tensor:
        """Attend causally within each prompt."""
        attention = self._attention
        new, new_kv = query[self._start : self._stop], kv[self._start : self._stop]
        rows, keys, values = (self._by_prompt(x) for x in (new, *new_kv.unbind(1)))
        is_grouped = attention.num_kv_heads < attention.num_heads
        if self._bias is None:
            result = F.scaled_dot_product_attention(rows, keys, values, is_causal=True, enable_gqa=is_grouped)
        else:
            result = _attend_masked(rows, keys, values, self._bias, attention.slopes, is_grouped)
        result = result.transpose(1, 2).reshape(new.shape)
        return result if out is None else _write(out, self._start, self._stop, result)

    def _by_prompt(self, x: Tensor) -> Tensor:
        """See [tokens, heads, head_dim] as [prompts, heads, length, head_dim]."""
        return x.view(-1, self._length, x.shape[1], x.shape[2]).transpose(1, 2)


class ChunkPart:
    """One row that goes on with several new tokens after a context: attend to the pool."""

    __slots__ = ("_attention", "_bias", "_cache", "_start", "_stop")

    def __init__(
        self, attention: TorchAttention, start: int, stop: int, context: int, blocks: list[int], pool: Tensor
    ) -> None:
        self._attention, self._start, self._stop = attention, start, stop
        length = context + stop - start
        self._cache = Cache(pool, [blocks], length)
        self._bias = _causal_bias(stop - start, length, attention.slopes is not None, pool.device)

    def attend(self, layer: int, query: Tensor, kv: Tensor, out: Tensor | None) -> Tensor:
        """Attend from the new tokens to the row up to each of them."""
        attention, new = self._attention, query[self._start : self._stop]
        keys, values = self._cache.read(layer)
        is_grouped = attention.num_kv_heads < attention.num_heads
        rows = new.transpose(0, 1).unsqueeze(0)
        result = _attend_masked(rows, keys, values, self._bias, attention.slopes, is_grouped)
        result = result.squeeze(0).transpose(0, 1)
        return result if out is None else _write(out, self._start, self._stop, result)


def _write(out: Tensor, start: int, stop: int, result: Tensor) -> Tensor:
    out[start:stop] = result
    return out
