"""A pipeline of one stage in one process, whose passes stream their new KV to host memory: what `overhead` times."""

from contextlib import ExitStack
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from dejavu.device import Device
from dejavu.kv import (
    CacheSide,
    KVPool,
    LayerStreamer,
    PoolLayout,
    RankCache,
    Resharding,
    RowMap,
    Selection,
    StepStreamer,
    stream_in,
)
from dejavu.kv.stream import Level
from dejavu.model.batch import Batch
from dejavu.model.decoder import StageModel
from dejavu.model.spec import Shard
from dejavu.model.table import MODELS
from dejavu.model.weights import dummy_stage
from dejavu.transport.carrier import Carrier, Gathering
from dejavu.transport.local import LocalStore

from .contents import count_differing, move_reference

if TYPE_CHECKING:
    from .overhead import Settings

NUM_SETS = 2  # microbatches, so that one may still be streamed while the next one's prompts are computed
STEP_TRANSFER = 100
SLACK_BYTES = 1 << 20
DEADLINE_S = 60.0


class Serving:
    """Own a model, its pool, and a store for each gathering."""

    num_prompts = 2 * NUM_SETS  # passes of a turn

    def __init__(self, device: Device, settings: "Settings", held: ExitStack) -> None:
        """Make dummy weights and a pool; `held` closes what has to be closed."""
        if settings.threads:
            torch.set_num_threads(settings.threads)
        self.device = device
        self.settings = settings
        self.stream = device.compute_stream
        self.dtype: torch.dtype = getattr(torch, settings.dtype)
        spec = MODELS[settings.model]
        shard = Shard(0, spec.num_layers, spec.num_layers)
        self.model = StageModel(spec, shard, dummy_stage(spec, shard, self.dtype, device.torch_device))
        self.layout = self._layout(spec)
        self.pool, self.back = (held.enter_context(self._pool()) for _ in range(2))
        side = CacheSide((RankCache(0, self.layout),), {})
        self.resharding = Resharding(side, side)
        capacity = NUM_SETS * self.settings.batch * self.settings.capacity * self.layout.bytes_per_token
        room = {Gathering.NAIVE: capacity, Gathering.PACKED: 2 * capacity}  # prompts whole, and layer by layer
        self.stores: dict[Gathering, Carrier] = {
            each: held.enter_context(LocalStore(device, room[each] + SLACK_BYTES, gathering=each)) for each in room
        }
        self._prompt = self._batch(torch.randint(1, spec.vocab_size, (settings.batch * settings.prompt_len,)), 0)
        self._token = torch.randint(1, spec.vocab_size, (settings.batch,))

    @property
    def phase_bytes(self) -> dict[str, int]:
        """Count the bytes that a pass of each phase streams."""
        settings, row_bytes = self.settings, self.settings.batch * self.layout.bytes_per_token
        prompt = settings.prompt_len * row_bytes
        return {"prompt": prompt, "token": row_bytes, "cache": prompt + settings.steps * row_bytes}

    def run_prompts(self, level: str) -> None:
        """Compute prompts of the sets in turn, streaming each; returns when all is computed and has left."""
        handles: list[Any] = [None] * NUM_SETS
        for turn in range(self.num_prompts):
            index = turn % NUM_SETS
            if handles[index] is not None:
                handles[index].order(self.stream)  # its rows are written again
            handles[index] = self._run_prompt(level, index)
        self._settle(handles)

    def run_steps(self, level: str) -> None:
        """Compute token steps, streaming each; returns when all is computed and has left."""
        streamer = None if level == "none" else self._steps(level, self.pool)
        rows = np.arange(self.settings.batch)
        handles = []
        for step in range(self.settings.steps):
            position = self.settings.prompt_len + step
            self.model.forward(self._batch(self._token, position), None, self.pool.tensor)
            if streamer is not None:
                handles.append(streamer.send(step, rows, np.full(len(rows), position), stream=self.stream))
        self._settle(handles)

    def count_wrong(self, level: str) -> int:
        """Stream once more, fetch the whole cache back into memory that holds its opposite, and compare."""
        self.run_prompts(level)
        self.run_steps(level)
        self.device.synchronize()
        self.back.memory.tensor().copy_(self.pool.memory.tensor().bitwise_not())
        self.device.synchronize()
        for index in range(NUM_SETS):
            selection = self._prompts(index)
            how: dict[str, Any] = {"transfer": index, "stream": self.stream, "level": Level(level)}
            stream_in(self._store(level), self.back, self.resharding, selection, **how).wait(DEADLINE_S)
        rows, streamer = np.arange(self.settings.batch), self._steps(level, self.back)
        for step in range(self.settings.steps):
            position = np.full(len(rows), self.settings.prompt_len + step)
            streamer.receive(step, rows, position, stream=self.stream).wait(DEADLINE_S)
        self.device.synchronize()
        return count_differing(self._whole(self.pool), self._whole(self.back))

    def _run_prompt(self, level: str, index: int) -> Any:
        """Compute one set's prompts; below `full` the stream then waits until their KV has left."""
        batch = self._prompt if index == 0 else self._in_set(self._prompt, index)
        if level == "none":
            self.model.forward(batch, None, self.pool.tensor)
            return None
        how: dict[str, Any] = {"transfer": index, "stream": self.stream, "level": Level(level)}
        streamer = LayerStreamer(self._store(level), self.pool, self.resharding, self._prompts(index), **how)
        self.model.forward(batch, None, self.pool.tensor, streamer.layer_done)
        if level != "full":
            streamer.handle.order(self.stream)
        return streamer.handle

    def _settle(self, handles: list[Any]) -> None:
        for handle in handles:
            if handle is not None:
                handle.wait(DEADLINE_S)
        if self.device.properties.kind == "cuda":
            torch.cuda.synchronize(self.device.torch_device)

    def _store(self, level: str) -> Carrier:
        return self.stores[Level(level).gathering]

    def _steps(self, level: str, pool: KVPool) -> StepStreamer:
        store = self._store(level)
        return StepStreamer(store, pool, self.resharding, 0, transfer=STEP_TRANSFER, level=Level(level))

    def _prompts(self, index: int) -> Selection:
        rows = range(self.settings.batch)
        return Selection.of(dict.fromkeys(((index, row) for row in rows), (0, self.settings.prompt_len)))

    def _whole(self, pool: KVPool) -> torch.Tensor:
        """Cut what was streamed out of a pool: all prompts, and the first set's steps."""
        spans = {}
        for index, row in pool.places:
            spans[index, row] = (0, self.settings.prompt_len if index else self.settings.capacity)
        pieces = pool.region(Selection.of(spans)).pieces
        message = torch.zeros(pieces.total_bytes, dtype=torch.uint8, device=self.device.torch_device)
        move_reference(message, pool.memory.tensor(), pieces)
        return message

    def _layout(self, spec: Any) -> PoolLayout:
        settings = self.settings
        num_blocks = NUM_SETS * settings.batch * self._row_blocks
        heads = (0, spec.num_kv_heads, spec.head_dim)
        return PoolLayout(num_blocks, 0, spec.num_layers, settings.block_size, *heads, self.dtype.itemsize)

    @property
    def _row_blocks(self) -> int:
        return -(-self.settings.capacity // self.settings.block_size)

    def _row(self, index: int, row: int) -> list[int]:
        first = (index * self.settings.batch + row) * self._row_blocks
        return list(range(first, first + self._row_blocks))

    def _pool(self) -> KVPool:
        settings = self.settings
        rows = RowMap(NUM_SETS, settings.batch, self._row_blocks, settings.block_size)
        pool = KVPool(self.device, RankCache(0, self.layout), rows, self.dtype)
        self.device.fill(pool.memory, 0, stream=self.stream)
        for index in range(NUM_SETS):
            for row in range(settings.batch):
                pool.admit((index, row), index, row, self._row(index, row))
        return pool

    def _batch(self, token_ids: torch.Tensor, context: int) -> Batch:
        num_rows = self.settings.batch
        blocks = [self._row(0, row) for row in range(num_rows)]
        num_new = len(token_ids) // num_rows
        return Batch(token_ids, [num_new] * num_rows, [context] * num_rows, blocks, list(range(num_rows)))

    def _in_set(self, batch: Batch, index: int) -> Batch:
        blocks = [self._row(index, row) for row in range(self.settings.batch)]
        return Batch(batch.token_ids, batch.num_new, batch.context, blocks, batch.logit_rows)
