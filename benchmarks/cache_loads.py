"""Loads that are parts of a KV cache, moved by the library's own calls: a whole prompt, and one token step."""

from typing import Any

import numpy as np

from dejavu.kv import CacheSide, KVPool, RankCache, Resharding, RowMap, Selection, StepStreamer, stream_in, stream_out
from dejavu.kv.steps import make_template
from dejavu.kv.stream import LARGEST_KEY, Level, cut_messages
from dejavu.transport.carrier import Carrier
from dejavu.transport.link import LinkCarrier

from .contents import Check
from .message_loads import POST_DEADLINE_S, allocate, release
from .shapes import CacheShape
from .timing import World

SOURCE_SEED, TARGET_SEED = 11, 13  # of the orders of blocks
TRANSFER = 7


class CacheLoad:
    """Own the pools of a microbatch on either side, whose rows have their blocks in different orders."""

    window = 1
    can_gate = True
    arrival = -1

    def __init__(self, world: World, carrier: Carrier, shape: CacheShape, direction: str, level: Level) -> None:
        self.world = world
        self.carrier = carrier
        self.shape = shape
        self.direction = direction
        self.level = level
        self.is_driven = isinstance(carrier, LinkCarrier)
        self.stream = world.device.create_stream("load")
        is_link = direction == "link"
        self.target_rank = 1 if is_link else 0
        self.source = self._pool(0, SOURCE_SEED) if world.rank == 0 else None
        self.target = self._pool(self.target_rank, TARGET_SEED) if world.rank > 0 or not is_link else None
        pieces = self.plan().transfers[0].pieces()
        self.check = Check(world.device, pieces, shape.layout.total_bytes, shape.layout.total_bytes)
        self.nbytes = pieces.total_bytes
        self.num_pieces = self.count_pieces()
        self.num_copies = self.num_pieces if level is Level.NAIVE else 2 * shape.layout.num_layers

    @property
    def selection(self) -> Selection:
        """Give the tokens that move."""
        raise AssertionError("a load says which tokens it moves")

    @property
    def resharding(self) -> Resharding:
        """Give the two sides as a rank sees them: without the other's rows."""
        layout = self.shape.layout
        sides = (CacheSide((RankCache(rank, layout),), {}) for rank in (0, self.target_rank))
        return Resharding(*sides)

    def plan(self) -> Any:
        """Plan with both sides' rows, for the check: from pool to pool."""
        layout, rows = self.shape.layout, range(self.shape.batch)
        sides = []
        for rank, seed in ((0, SOURCE_SEED), (self.target_rank, TARGET_SEED)):
            table = self.shape.row_table(seed)
            sides.append(CacheSide((RankCache(rank, layout),), {row: table[row] for row in rows}))
        return Resharding(*sides).plan(self.selection)

    def count_pieces(self) -> int:
        """Count the pieces of the source's side."""
        return len(self.pool.region(self.selection).pieces)

    @property
    def pool(self) -> KVPool:
        """Give one of the pools of this rank."""
        pool = self.source or self.target
        assert pool is not None
        return pool

    def prepare(self, index: int) -> list[Any]:
        """Post the receive of a link."""
        return [self.receive(index)] if self.direction == "link" and self.target else []

    def start(self, index: int) -> list[Any]:
        """Post the send, or the fetch from a store."""
        if self.source is None:
            return []
        return [self.receive(index) if self.direction == "in" else self.send(index)]

    def send(self, index: int) -> Any:
        """Post the source's side."""
        raise AssertionError("a load says how it sends")

    def receive(self, index: int) -> Any:
        """Post the target's side."""
        raise AssertionError("a load says how it receives")

    def refresh(self, seed: int) -> None:
        """Make fresh contents, and spoil the target."""
        if self.source:
            self.check.fill(self.source.memory, seed)
        if self.target:
            self.check.poison(self.target.memory, seed)
        if self.source and self.direction == "in":
            self.send(0).wait(POST_DEADLINE_S)

    def count_wrong(self, seed: int) -> int:
        """Count what differs after the last transfer."""
        if self.target is None:
            return 0
        if self.direction == "out":
            self.receive(0).wait(POST_DEADLINE_S)
        return self.check.count_wrong(self.target.memory)

    def keys(self) -> list[int]:
        """Give the keys that a store keeps the messages under."""
        raise AssertionError("a load says which keys it uses")

    def close(self) -> None:
        """Free the pools."""
        for key in self.keys():
            self.carrier.forget(key)
        release(self.carrier, *(pool.memory for pool in (self.source, self.target) if pool))
        self.stream.close()

    def _pool(self, rank: int, seed: int) -> KVPool:
        import torch

        layout, shape = self.shape.layout, self.shape
        rows = RowMap(1, shape.batch, shape.row_blocks, shape.block_size)
        memory = allocate(self.world.device, layout.total_bytes)
        pool = KVPool(self.world.device, RankCache(rank, layout), rows, torch.float16, memory=memory)
        for row, blocks in enumerate(shape.row_table(seed)):
            pool.admit(row, 0, row, blocks)
        return pool


class PromptLoad(CacheLoad):
    """Move all rows' prompts, by stream_out and stream_in."""

    @property
    def selection(self) -> Selection:
        """Give the prompts."""
        return Selection.of(dict.fromkeys(range(self.shape.batch), (0, self.shape.prompt_len)))

    def send(self, index: int) -> Any:
        """Stream the prompts out."""
        return self._stream(stream_out, self.source)

    def receive(self, index: int) -> Any:
        """Stream the prompts in."""
        return self._stream(stream_in, self.target)

    def keys(self) -> list[int]:
        """Give the keys of the messages."""
        pairs = self.resharding.select(self.selection)
        messages = cut_messages(self.pool, pairs, self.selection, TRANSFER, self.level, self.carrier.message_bytes)
        return [message.key for message in messages]

    def _stream(self, call: Any, pool: KVPool | None) -> Any:
        key = {"transfer": TRANSFER, "stream": self.stream, "level": self.level}
        return call(self.carrier, pool, self.resharding, self.selection, **key)


class TokenStepLoad(CacheLoad):
    """Move the one new token of every row, by a StepStreamer."""

    def __init__(self, world: World, carrier: Carrier, shape: CacheShape, direction: str, level: Level) -> None:
        super().__init__(world, carrier, shape, direction, level)
        self._sender = self._streamer(self.source)
        self._receiver = self._streamer(self.target)
        self._rows = np.arange(shape.batch)
        self._position = np.full(shape.batch, shape.prompt_len)

    @property
    def selection(self) -> Selection:
        """Give the token behind the prompt."""
        position = self.shape.prompt_len
        return Selection.of(dict.fromkeys(range(self.shape.batch), (position, position + 1)))

    def send(self, index: int) -> Any:
        """Stream the step out."""
        return self._sender.send(index, self._rows, self._position, stream=self.stream)

    def receive(self, index: int) -> Any:
        """Stream the step in."""
        return self._receiver.receive(index, self._rows, self._position, stream=self.stream)

    def keys(self) -> list[int]:
        """Give the key of the one step."""
        return [make_template(self.pool, pair, TRANSFER).first_key & LARGEST_KEY for pair in self.resharding.overlaps]

    def _streamer(self, pool: KVPool | None) -> Any:
        if pool is None:
            return None
        return StepStreamer(self.carrier, pool, self.resharding, 0, transfer=TRANSFER, level=self.level)
