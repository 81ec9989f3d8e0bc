"""Generate tokens on CUDA: one graph per number of rows, fed by one small copy from pinned memory."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from dejavu.model.batch import Batch
from dejavu.model.cuda_operations import StepInputs
from dejavu.model.cuda_pass import StageParts, StagePass
from dejavu.model.cuda_plan import SHORTEST_ITEM, BlockTables, StepLayout, Words, write_step
from dejavu.model.cuda_products import Product, Products, can_activate, capture, multiply_activated

ROW_COUNTS = (1, 2, 4, 8, 16, 24, 32, 48, 64, 96, 128, 192, 256, 384, 512)
ATTENTION_BLOCKS = 924  # that an H200 holds at once: 132 multiprocessors of 7
MOST_SPARE_ITEMS = 96  # so that rows' parts come in several rounds of blocks, and the last round is short
RING_SLOTS = 16


def padded_rows(num_rows: int) -> int:
    """Give the number of rows of the graph that runs `num_rows`."""
    return next((count for count in ROW_COUNTS if count >= num_rows), -(-num_rows // 128) * 128)


class StepMemory:
    """Own the device memory of the graphs of one number of rows: inputs, activations, outputs."""

    def __init__(self, parts: StageParts, layout: StepLayout) -> None:
        operations, num_rows = parts.operations, layout.num_rows
        self.parts, self.layout = parts, layout
        # Not inference tensors, which could not be changed in place outside inference mode.
        with torch.inference_mode(mode=False):
            self.words = torch.zeros(layout.num_words, dtype=torch.int32, device=operations.device)
            self.words[num_rows : 2 * num_rows] = -1
            self.words[layout.tables_start - 1] = SHORTEST_ITEM
            self.hidden = self.make(parts.spec.hidden_size)
            heads = operations.num_heads, parts.spec.head_dim + 2
            self.partials = self.make(layout.num_items, *heads, dtype=torch.float32, rows=False)
            self.arrivals = torch.zeros(
                num_rows, operations.attention_blocks, dtype=torch.int32, device=operations.device
            )
            self.likeliest = torch.zeros(num_rows, dtype=torch.int64, device=operations.device)
        self._named: dict[str, Tensor] = {}

    def make(self, *shape: int, dtype: torch.dtype | None = None, rows: bool = True) -> Tensor:
        """Allocate [rows, *shape]."""
        with torch.inference_mode(mode=False):
            sizes = (self.layout.num_rows, *shape) if rows else shape
            operations = self.parts.operations
            return torch.zeros(sizes, dtype=dtype or operations.dtype, device=operations.device)

    def named(self, name: str, width: int, dtype: torch.dtype | None = None) -> Tensor:
        """Give the memory [rows, width] of a name, the same in every layer."""
        if name not in self._named:
            self._named[name] = self.make(width, dtype=dtype)
        return self._named[name]

    @property
    def inputs(self) -> StepInputs:
        """Give the kernels' views of the words."""
        rows, layout = self.layout.num_rows, self.layout
        ids, context, starts = (self.words[i * rows : (i + 1) * rows] for i in range(3))
        longest, tables = self.words[layout.tables_start - 1 :], self.words[layout.tables_start :]
        return StepInputs(ids, context, starts, longest, tables)


class TokenPass(StagePass):
    """Run a token step in memory that stays."""

    def __init__(self, parts: StageParts, products: Products, memory: StepMemory, pool: Tensor) -> None:
        super().__init__(parts, memory.hidden)
        self.products, self.memory, self.pool = products, memory, pool
        self.inputs = memory.inputs
        self.num_rows = memory.layout.num_rows

    def run(self) -> Tensor:
        """Queue the whole step, and give its output's memory."""
        if self.parts.embedding is not None:
            self._embed()
        self.run_layers()
        if self.parts.head is None:
            self.settle()
            return self.hidden
        return self._logits()

    def multiply(self, product: Product, x: Tensor) -> Tensor:
        """Multiply into the product's memory."""
        out = self.memory.named(product.name, product.linear.weight.shape[0])
        self.products.run(product, x, out, None)
        return out

    def enter(self, product: Product) -> Tensor:
        """Normalise in the product where it can and nothing is pending."""
        if not self._takes_norm(product):
            return self.multiply(product, self.entered(product))
        out = self.memory.named(product.name, product.linear.weight.shape[0])
        self.products.run(product, self.hidden, out, None, normed=True)
        return out

    def feed(self, product: Product) -> Tensor:
        """Activate in the product or behind it."""
        out = self.memory.named(f"{product.name} activated", product.num_out)
        if self._takes_norm(product):
            self.products.run(product, self.hidden, out, None, normed=True)
            return out
        x = self.entered(product)
        if self.products.fuses(product, self.num_rows):
            self.products.run(product, x, out, None)
        elif can_activate(product):
            multiply_activated(product, x, out)
        else:
            self.operations.activate(out, self.multiply(product, x), True)
        return out

    def add(self, product: Product, x: Tensor) -> None:
        """Add in the product where it can, and where no other rank has a part of the sum."""
        if self.parts.all_reduce is None and self.products.fuses(product, self.num_rows):
            self.products.run(product, x, self.hidden, self.hidden)
        else:
            self.reduced(self.multiply(product, x))

    def attend(self, layer: int, qkv: Tensor) -> Tensor:
        """Attend by the kernel that appends too."""
        memory, operations = self.memory, self.operations
        out = memory.named("attended", operations.num_heads * self.parts.spec.head_dim)
        operations.attend(out, qkv, self.pool, self.inputs, memory.partials, memory.arrivals, layer)
        return out

    def normalised(self, name: str) -> Tensor:
        """Give the memory of a name."""
        return self.memory.named(name, self.parts.spec.hidden_size)

    def _takes_norm(self, product: Product) -> bool:
        return self.pending is None and self.products.normalises(product, self.num_rows)

    def _embed(self) -> None:
        embedding, project = self.parts.embedding, self.parts.project_in
        assert embedding is not None
        ids, positions, places = self.inputs.token_ids, self.inputs.context, embedding.positions
        if project is None:
            self.operations.embed(self.hidden, ids, embedding.tokens, positions, places, False)
        else:
            narrow = self.memory.named("embedded", embedding.tokens.shape[1])
            self.operations.embed(narrow, ids, embedding.tokens, positions, None, False)
            self.products.run(project, narrow, self.hidden, None)
            if places is not None:
                self.operations.add_positions(self.hidden, positions, places, True)
        if embedding.norm is not None:
            self.operations.add_norm(self.hidden, self.hidden, None, embedding.norm, True)

    def _logits(self) -> Tensor:
        head, logits, project = self.parts.head, self.parts.logits, self.parts.project_out
        assert head is not None
        assert logits is not None
        x = self.hidden
        if head.norm is not None:
            x = self.norm(head.norm)
        else:
            self.settle()
        if project is not None:
            x = self.multiply(project, x)
        out = self.memory.named("logits", logits.num_out, torch.float32)
        if logits.num_out:
            self.products.run(logits, x, out, None)
        if self.parts.shard.tp_size == 1:
            torch.argmax(out, dim=-1, out=self.memory.likeliest)
        return out


@dataclass(frozen=True, slots=True)
class StepGraph:
    """Hold a captured step and its memory."""

    graph: torch.cuda.CUDAGraph
    memory: StepMemory
    output: Tensor  # [rows, ...]


class PinnedRing:
    """Hand out pinned words in turn; each again when the copy out of it is complete, which is asked by halves."""

    def __init__(self, num_words: int, num_slots: int = RING_SLOTS) -> None:
        with torch.inference_mode(mode=False):
            self._slots = [torch.zeros(num_words, dtype=torch.int32, pin_memory=True) for _ in range(num_slots)]
        self._arrays: list[Words] = [slot.numpy() for slot in self._slots]
        self._half = num_slots // 2
        self._events = [torch.cuda.Event() for _ in range(2)]  # type: ignore[no-untyped-call]
        self._next = 0

    def upload(self, write: Callable[[Words], int], target: Tensor) -> None:
        """Let `write` fill words and say how many there are, and queue their copy to the start of `target`."""
        place = self._next
        self._next = (place + 1) % len(self._slots)
        half, first = divmod(place, self._half)
        if first == 0:
            self._events[half].synchronize()  # returns at once unless half of the slots are in flight
        count = write(self._arrays[place])
        target[:count].copy_(self._slots[place][:count], non_blocking=True)
        if first == self._half - 1:
            self._events[half].record()


class TokenSteps:
    """Own the graphs of a stage, by the number of rows."""

    def __init__(self, parts: StageParts, products: Products) -> None:
        self.parts, self.products = parts, products
        self._graphs: dict[tuple[int, int], StepGraph] = {}
        self._rings: dict[int, PinnedRing] = {}
        self._tables = BlockTables()
        self._last: StepGraph | None = None

    def forward(self, batch: Batch, hidden: Tensor | None, pool: Tensor) -> Tensor:
        """Queue a step, without waiting for the device; the output is the graph's, until its next step."""
        step = self.prepare(batch.num_rows, pool)
        layout, memory = step.memory.layout, step.memory
        on_host = self.parts.embedding is not None and batch.token_ids.device.type == "cpu"

        def write(words: Words) -> int:
            if on_host:
                words[: batch.num_rows] = batch.token_ids.numpy()
            return write_step(layout, batch, self._tables, words)

        self._rings[layout.num_rows].upload(write, memory.words)
        if self.parts.embedding is None:
            assert hidden is not None, "every stage but the first needs hidden states"
            if hidden.data_ptr() != memory.hidden.data_ptr():
                memory.hidden[: batch.num_rows].copy_(hidden)
        elif not on_host:
            memory.words[: batch.num_rows].copy_(batch.token_ids)
        step.graph.replay()
        self._last = step
        return self._selected(batch, step.output)

    def likeliest(self, logits: Tensor) -> Tensor | None:
        """Give the likeliest tokens, int64, where `logits` are those that `forward` gave last, of the whole vocabulary.

        They are the graph's, as the logits are.
        """
        step = self._last
        if step is None or self.parts.shard.tp_size > 1 or logits.data_ptr() != step.output.data_ptr():
            return None
        return step.memory.likeliest[: len(logits)]

    def prepare(self, num_rows: int, pool: Tensor) -> StepGraph:
        """Give the graph for so many rows, captured when it is first asked for."""
        num_rows = padded_rows(num_rows)
        key = num_rows, pool.data_ptr()
        if key not in self._graphs:
            self._graphs[key] = self._capture(num_rows, pool)
        return self._graphs[key]

    def _selected(self, batch: Batch, output: Tensor) -> Tensor:
        rows = batch.logit_rows
        if self.parts.head is None or rows == list(range(batch.num_rows)):
            return output[: batch.num_rows]
        index = torch.tensor(rows, dtype=torch.int64).pin_memory().to(output.device, non_blocking=True)
        return output.index_select(0, index)

    def _capture(self, num_rows: int, pool: Tensor) -> StepGraph:
        assert pool.is_contiguous()
        for alike in self.parts.alike:
            self.products.choose(alike, num_rows, 4 if alike[0].name == "logits" else 0)
        memory = StepMemory(self.parts, self._layout(num_rows, pool))
        if num_rows not in self._rings:
            self._rings[num_rows] = PinnedRing(memory.layout.num_words)
        # Rows of no context and no items: this reads and stores nothing in the pool, and readies all libraries.
        TokenPass(self.parts, self.products, memory, pool).run()
        outputs: list[Tensor] = []
        step = TokenPass(self.parts, self.products, memory, pool)
        graph = capture(lambda: outputs.append(step.run()), pool.device)
        return StepGraph(graph, memory, outputs[0])

    def _layout(self, num_rows: int, pool: Tensor) -> StepLayout:
        blocks_per_row = min(pool.shape[0], -(-self.parts.spec.max_positions // pool.shape[3]) + 1)
        spare = -(-ATTENTION_BLOCKS // self.parts.operations.attention_blocks) + min(MOST_SPARE_ITEMS, 3 * num_rows)
        return StepLayout(num_rows, num_rows + spare, num_rows * blocks_per_row)
