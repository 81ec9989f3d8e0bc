"""Which rank does what: a table from (configuration, model, world size), the same on every rank."""

from dataclasses import dataclass
from enum import StrEnum
from itertools import accumulate

from dejavu.config import ServeConfig
from dejavu.errors import TopologyError
from dejavu.model.spec import ModelSpec, Shard

CONTROLLER = 0


class Role(StrEnum):
    """Say what a rank is for."""

    CONTROLLER = "controller"
    BOTH = "both"  # a stage of a colocated pipeline: prompts and tokens


@dataclass(frozen=True, slots=True)
class Placement:
    """Give one rank its role and, if it is a worker, its stage and its shard of the model."""

    rank: int
    role: Role
    stage: int = -1
    shard: Shard | None = None


@dataclass(frozen=True, slots=True)
class Topology:
    """Hold the placement of every rank of the world, by rank."""

    placements: tuple[Placement, ...]
    pp: int
    tp: int

    @property
    def workers(self) -> tuple[Placement, ...]:
        """Give the ranks that hold a shard, stage-major, then by tensor rank."""
        return tuple(p for p in self.placements if p.shard is not None)

    def rank_of(self, stage: int, tp_rank: int = 0) -> int:
        """Give the rank at a place of the pipeline; tensor rank 0 leads its stage."""
        return 1 + stage * self.tp + tp_rank

    def stage_ranks(self, stage: int) -> list[int]:
        """Give the ranks that share a stage, leader first."""
        return [self.rank_of(stage, tp_rank) for tp_rank in range(self.tp)]


def split_layers(num_layers: int, pp: int, layers_per_stage: tuple[int, ...] | None = None) -> list[tuple[int, int]]:
    """Cut the layers into `pp` contiguous ranges [first, last), as asked or as evenly as can be (first ones larger)."""
    if pp > num_layers:
        raise TopologyError(f"pp {pp} is more than the model's {num_layers} layers: use at most {num_layers}")
    sizes = layers_per_stage or tuple(num_layers // pp + (stage < num_layers % pp) for stage in range(pp))
    if sum(sizes) != num_layers:
        text = ",".join(map(str, sizes))
        raise TopologyError(f"layers_per_stage {text} adds up to {sum(sizes)}: the model has {num_layers} layers")
    ends = list(accumulate(sizes))
    return list(zip([0, *ends[:-1]], ends, strict=True))


def build_topology(config: ServeConfig, spec: ModelSpec, world_size: int) -> Topology:
    """Place every rank; raise TopologyError where the world or the model does not divide as asked."""
    needed = required_ranks(config)
    if world_size != needed:
        raise TopologyError(
            f"{world_size} ranks were started and pp {config.pp} x tp {config.tp} needs {needed} "
            f"(a controller and {config.num_workers} workers): use `mpirun -n {needed}`, or no mpirun at all"
        )
    spec.check_tensor_parallel(config.tp)
    ranges = split_layers(spec.num_layers, config.pp, config.layers_per_stage)
    workers = [
        Placement(
            1 + stage * config.tp + tp_rank, Role.BOTH, stage, Shard(*layers, spec.num_layers, tp_rank, config.tp)
        )
        for stage, layers in enumerate(ranges)
        for tp_rank in range(config.tp)
    ]
    return Topology((Placement(CONTROLLER, Role.CONTROLLER), *workers), config.pp, config.tp)


def required_ranks(config: ServeConfig) -> int:
    """Count the ranks that a configuration needs: a controller and its workers."""
    return 1 + config.num_workers
