"""Hold a worker's KV memory, and know which tokens in it are valid.

A row's tokens [0, length) are valid. What is streamed in lies behind that until every layer of it has arrived:

    tokens     0          length                  stop
    layer 0    |  valid   | arrived | arrived     |              state[microbatch, row, token, layer]
    layer 1    |  valid   | arrived | being written              `length` moves to `stop` when the last one has arrived
    layer 2    |  valid   | arrived | void

A transfer takes its tokens with `begin`: they are void from then on, and a part of a row that was valid behind them
counts again once they have arrived. They become valid layer by layer with `arrive`; `abort` leaves them void.
"""

from collections.abc import Hashable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from dejavu.device.base import Buffer, Closing, Device, Location
from dejavu.kv.layout import Ints, PoolLayout, RowMap
from dejavu.kv.packing import Packing, pack
from dejavu.kv.side import CacheSide, RankCache, Selection

if TYPE_CHECKING:
    import torch

VOID, WRITING, ARRIVED = range(3)

Span = tuple[int, int, int, int]  # microbatch, row, and its tokens [start, stop)


class Blocks(Mapping[Any, Ints]):
    """Show the block ids of the rows of a pool by what they are called: the `rows` of a `CacheSide`."""

    __slots__ = ("_places", "_rows")

    def __init__(self, rows: RowMap, places: Mapping[Any, tuple[int, int]]) -> None:
        self._rows = rows
        self._places = places

    def __getitem__(self, key: Hashable) -> Ints:
        return self._rows.blocks(*self._places[key])

    def __iter__(self) -> Iterator[Any]:
        return iter(self._places)

    def __len__(self) -> int:
        return len(self._places)


class KVPool(Closing):
    """Own the KV memory of one rank: a buffer of `layout.total_bytes`, and whose tokens lie in it.

    Tokens of a row are addressed by its key, which both sides of a transfer know (a request), or by (microbatch, row).
    `rows` is the caller's, who may also mark there what the rank has computed itself. Not for several threads at once.
    """

    def __init__(
        self,
        device: Device,
        cache: RankCache,
        rows: RowMap,
        dtype: "torch.dtype",
        *,
        location: Location = Location.DEVICE,
        memory: Buffer | None = None,
    ) -> None:
        """Allocate exportable memory, contents undefined, or take over `memory`; CapacityError where it does not fit.

        In host memory (`location`) the pool is a replica or swapped out: the same layout, so blocks move whole.
        """
        layout = cache.layout
        assert rows.block_size == layout.block_size, (rows.block_size, layout.block_size)
        assert dtype.itemsize == layout.itemsize, (dtype, layout.itemsize)
        allocate = device.allocate_exportable if location is Location.DEVICE else device.allocate_host_exportable
        self.device = device
        self.rank = cache.rank  # in the communicator of the carriers; a recovery may change it
        self.layout: PoolLayout = layout
        self.rows = rows
        self.dtype = dtype
        self.memory = allocate(layout.total_bytes) if memory is None else memory
        assert self.memory.nbytes >= layout.total_bytes, (self.memory, layout)
        self.places: dict[Any, tuple[int, int]] = {}
        self.blocks = Blocks(rows, self.places)
        capacity = rows.max_blocks * rows.block_size
        shape = rows.num_microbatches, rows.num_rows, capacity, layout.num_layers
        self._state = np.zeros(shape, dtype=np.uint8)
        self._num_landings = np.zeros(shape[:2], dtype=np.int64)  # that are open
        self._reach = np.zeros(shape[:2], dtype=np.int64)  # no token at or behind it has been received

    @property
    def tensor(self) -> "torch.Tensor":
        """Give the pool as a tensor [block, layer, 2, token, kv_head, head_dim], without a copy; it owns nothing."""
        return self.memory.view(0, self.layout.total_bytes).tensor(self.dtype, self.layout.shape)

    def block(self, block: int) -> Buffer:
        """Give the memory of a whole block: one contiguous piece."""
        return self.memory.view(block * self.layout.block_bytes, self.layout.block_bytes)

    def admit(self, key: Hashable, microbatch: int, row: int, blocks: Sequence[int]) -> None:
        """Let a free row hold `key`, in these blocks."""
        assert key not in self.places, key
        assert len(self.rows.blocks(microbatch, row)) == 0, (microbatch, row)
        self.rows.append(microbatch, row, blocks)
        self.places[key] = microbatch, row

    def release(self, key: Hashable) -> list[int]:
        """Free the row of `key` and give back its block ids; no transfer may be writing into it."""
        place = self.places[key]
        assert not self._num_landings[place], f"a transfer writes into {key}: cancel it, and wait for it"
        del self.places[key]
        self._state[place] = VOID
        self._reach[place] = 0
        return self.rows.release(*place)

    def length(self, key: Hashable) -> int:
        """Count the valid tokens of `key`."""
        return int(self.rows.length[self.places[key]])

    def region(self, selection: Selection) -> Packing:
        """Cut the selected tokens, in the selected layers and all heads of the pool, out of it: for scatter, gather."""
        window = self.layout.window.clip_layers(selection.first_layer, selection.last_layer)
        return pack(self.side, self.layout, window, selection)

    @property
    def side(self) -> CacheSide:
        """Describe this pool alone as the side of a transfer."""
        return CacheSide((RankCache(self.rank, self.layout),), self.blocks)

    def spans(self, selection: Selection) -> list[Span]:
        """Give the selected tokens by their places."""
        bounds = zip(selection.rows, selection.start.tolist(), selection.stop.tolist(), strict=True)
        return [(*self.places[row], start, stop) for row, start, stop in bounds if start < stop]

    def begin(self, spans: Sequence[Span], first_layer: int = 0, last_layer: int | None = None) -> "Landing":
        """Take tokens for a transfer into layers [first_layer, last_layer): they are void until they have arrived.

        A row appears once in `spans`, and its blocks hold the tokens. No other transfer may be writing there.
        """
        window = self.layout.window.clip_layers(first_layer, last_layer)
        landing = Landing(self, tuple(spans), window.first_layer, window.last_layer)
        for microbatch, row, start, stop in spans:
            assert self.rows.table[microbatch, row, (stop - 1) // self.rows.block_size] >= 0, (microbatch, row, stop)
            self._void(microbatch, row, start)
            part = self._part(microbatch, row, start, stop, window.first_layer, window.last_layer)
            is_taken = self._num_landings[microbatch, row] and (part == WRITING).any()
            assert not is_taken, f"two transfers into tokens [{start}, {stop}) of row {(microbatch, row)}"
            part[...] = WRITING
            self._num_landings[microbatch, row] += 1
            if stop > self._reach[microbatch, row]:
                self._reach[microbatch, row] = stop
        return landing

    def arrive(self, landing: "Landing", first_layer: int, last_layer: int) -> None:
        """Mark layers of a landing as arrived, and tokens as valid that have all layers now."""
        is_whole = last_layer - first_layer == self.layout.num_layers
        for microbatch, row, start, stop in landing.spans:
            self._part(microbatch, row, start, stop, first_layer, last_layer)[...] = ARRIVED
            if is_whole and start <= self.rows.length[microbatch, row] < stop:
                self.rows.length[microbatch, row] = stop
            self._advance(microbatch, row)

    def end(self, landing: "Landing", *, keep: bool) -> None:
        """End a landing: make void what it has not brought, and unless `keep` what it has brought, too."""
        for microbatch, row, start, stop in landing.spans:
            self._num_landings[microbatch, row] -= 1
            part = self._part(microbatch, row, start, stop, landing.first_layer, landing.last_layer)
            if keep:
                part[part == WRITING] = VOID
            else:
                self._void(microbatch, row, start)
                part[...] = VOID

    def close(self) -> None:
        """Free the memory; all transfers have ended."""
        self.memory.close()

    def _part(self, microbatch: int, row: int, start: int, stop: int, first_layer: int, last_layer: int) -> Any:
        first = self.layout.first_layer
        return self._state[microbatch, row, start:stop, first_layer - first : last_layer - first]

    def _void(self, microbatch: int, row: int, start: int) -> None:
        """Shorten a row to `start`; what was valid behind it has arrived, and will count again."""
        length = int(self.rows.length[microbatch, row])
        if start < length:
            self._state[microbatch, row, start:length] = ARRIVED
            self._reach[microbatch, row] = max(self._reach[microbatch, row], length)
            self.rows.length[microbatch, row] = start

    def _advance(self, microbatch: int, row: int) -> None:
        """Let the row's length pass the tokens of which all layers have arrived."""
        length, reach = int(self.rows.length[microbatch, row]), int(self._reach[microbatch, row])
        if length == reach or not (self._state[microbatch, row, length] == ARRIVED).all():
            return
        whole = (self._state[microbatch, row, length:reach] == ARRIVED).all(axis=1)
        self.rows.length[microbatch, row] = reach if whole.all() else length + int(whole.argmin())


@dataclass(eq=False, slots=True)
class Landing:
    """Follow tokens that a transfer brings into a pool, from `KVPool.begin` to `commit`, `close` or `abort`."""

    pool: KVPool
    spans: tuple[Span, ...]
    first_layer: int
    last_layer: int
    is_open: bool = True

    def arrive(self, first_layer: int, last_layer: int) -> None:
        """State that layers [first_layer, last_layer) are here, with all heads of the pool."""
        assert self.is_open, self
        assert self.first_layer <= first_layer < last_layer <= self.last_layer, (self, first_layer, last_layer)
        self.pool.arrive(self, first_layer, last_layer)

    def commit(self) -> None:
        """State that all is here, and end."""
        self.arrive(self.first_layer, self.last_layer)
        self.close()

    def close(self) -> None:
        """End with what is here; a second call, or one after `commit` or `abort`, does nothing."""
        if self.is_open:
            self.pool.end(self, keep=True)
            self.is_open = False

    def abort(self) -> None:
        """End early, once nothing writes any more: none of the tokens is valid, whatever has arrived of them."""
        if self.is_open:
            self.pool.end(self, keep=False)
            self.is_open = False
