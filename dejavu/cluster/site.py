"""Say where a worker stands in a run, how large the memory there is, and what it holds."""

from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from dejavu.cluster.keeping import RestoredPool, StoreShelf
from dejavu.device.base import Buffer, Device
from dejavu.device.vault import Vault
from dejavu.engine.messages import Busy
from dejavu.engine.setup import EngineSetup
from dejavu.engine.sizing import CacheSize
from dejavu.engine.worker import Stage
from dejavu.kv.flushed import FlushedRows
from dejavu.kv.layout import PoolLayout, RowMap
from dejavu.kv.side import RankCache
from dejavu.measure.cpu import CpuMeter
from dejavu.measure.recorder import MemoryRecorder, Recorder
from dejavu.measure.records import TransferRecord
from dejavu.model.spec import Shard
from dejavu.topology import CONTROLLER, Pipeline, Placement
from dejavu.transport.mpi import Channel


@dataclass(frozen=True, slots=True)
class Site:
    """Say where in which run a worker stands."""

    channel: Channel
    setup: EngineSetup
    placement: Placement
    device: Device
    vault: Vault | None  # synthetic stages have nothing to keep
    shelf: StoreShelf | None = None  # of replicas; there where a worker is
    recorder: Recorder = field(default_factory=MemoryRecorder)

    @property
    def shard(self) -> Shard:
        """Give this rank's part of the model."""
        assert self.placement.shard is not None
        return self.placement.shard

    @property
    def pipeline(self) -> Pipeline:
        """Give the pipeline that this rank is part of."""
        return self.setup.topology.pipelines[self.placement.pipeline]

    @property
    def cache(self) -> CacheSize:
        """Give the size of this rank's pool."""
        return self.setup.caches[self.placement.pipeline]

    @property
    def sees_all_draws(self) -> bool:
        """Tell whether this rank draws the tokens that its own passes take, and nobody else writes into its pool.

        A GPU's next token step can then be queued before the host has seen the tokens: a row that turns out to have
        ended writes into its blocks once more, ahead of all that is queued later, but not of KV from elsewhere.
        """
        alone = len(self.pipeline.ranks) == 1 and not self.setup.config.is_disaggregated
        return self.setup.on_cuda and alone and not self.cache.is_swapped

    def tell_busy(self, compute_s: float, moves: Sequence[TransferRecord] = ()) -> None:
        """Tell the controller how long this rank has computed, and what it has moved, since it was told last."""
        fetched = [move.bytes for move in moves if move.kind == "fetch"]
        flushed = [move.bytes for move in moves if move.kind == "flush"]
        self.channel.send(CONTROLLER, Busy(compute_s, len(fetched), sum(fetched) + sum(flushed)))

    def neighbour(self, distance: int) -> int:
        """Give the same tensor rank of a stage before or behind this one."""
        return self.pipeline.rank_of(self.placement.stage + distance, self.shard.tp_rank)


@dataclass(slots=True)
class Holdings:
    """Hold what a worker keeps when another rank dies: its part of the model, and KV memory.

    The pool is `memory` as [block, layer, k/v, token, kv_head, head_dim]: zeros, or with `has_kv` what this place's
    last process or epoch left there. Synthetic stages have none; of swapped KV `memory` is all of it, on the host, and
    `flushed` says what has come there, while the device's part is made anew. `kept_bytes` are those that this process
    found, until it has told. `untold` is what came back of KV that was lost, until the controller is known to know.
    """

    stage: Stage
    pool: Tensor
    memory: Buffer | None
    meter: CpuMeter
    has_kv: bool = False
    kept_bytes: int = 0
    flushed: FlushedRows | None = None
    untold: RestoredPool | None = None

    @property
    def is_new(self) -> bool:
        """Tell whether nothing has come back yet of KV that was lost."""
        return not self.has_kv and self.untold is None

    def tell(self, restored: RestoredPool) -> RestoredPool:
        """Give what there is to tell: of what came back in an earlier round, too, if nobody may have heard it."""
        if self.untold is not None:
            restored = replace(self.untold, has_new_store=restored.has_new_store, nbytes=0)
        self.untold = None if self.has_kv else restored
        return restored

    def count_as_known(self) -> None:
        """Take note that the controller knows of KV that was lost: what is there from now on is what it thinks."""
        if self.untold is not None:
            self.has_kv, self.untold = True, None


def pool_layout(setup: EngineSetup, placement: Placement) -> PoolLayout:
    """Describe the pool of a worker."""
    return rank_cache(setup, placement).layout


def rank_cache(setup: EngineSetup, placement: Placement) -> RankCache:
    """Describe the pool of a worker, by its rank among the workers."""
    shard, cache, spec = placement.shard, setup.caches[placement.pipeline], setup.spec
    assert shard is not None
    heads = spec.num_kv_heads // shard.tp_size
    layers = shard.last_layer - shard.first_layer
    itemsize = dtype_of(setup).itemsize
    first_head = shard.tp_rank * heads
    layout = PoolLayout(
        cache.num_blocks, shard.first_layer, layers, cache.block_size, first_head, heads, spec.head_dim, itemsize
    )
    return RankCache(placement.rank - 1, layout)


def make_rows(site: Site) -> RowMap:
    """Make the table of slots that KV moves out of, or into."""
    cache = site.cache
    return RowMap(1, cache.num_blocks, cache.blocks_per_row, cache.block_size)


def dtype_of(setup: EngineSetup) -> torch.dtype:
    """Give the number format of the run."""
    dtype: torch.dtype = getattr(torch, setup.dtype)
    return dtype


def make_empty_pool(site: Site) -> Tensor:
    """Give a pool of no layers: a synthetic stage's, or what stands for one that is made anew with each change."""
    spec, cache, heads = site.setup.spec, site.cache, site.setup.spec.num_kv_heads // site.shard.tp_size
    return torch.zeros((cache.num_blocks, 0, 2, cache.block_size, heads, spec.head_dim), dtype=dtype_of(site.setup))
