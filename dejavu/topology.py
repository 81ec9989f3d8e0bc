"""Which rank does what: a table from (configuration, model, world size), the same on every rank."""

from collections.abc import Iterator
from dataclasses import dataclass
from enum import StrEnum
from itertools import accumulate

from dejavu.config import PipelineShape, ServeConfig
from dejavu.errors import TopologyError
from dejavu.model.spec import ModelSpec, Shard

CONTROLLER = 0


class Role(StrEnum):
    """Say what a rank is for."""

    CONTROLLER = "controller"
    BOTH = "both"  # a stage of a colocated pipeline: prompts and tokens
    PROMPT = "prompt"
    TOKEN = "token"  # noqa: S105 (a role, no secret)
    SPARE = "spare"  # waits to take the place of a rank that dies


@dataclass(frozen=True, slots=True)
class Placement:
    """Give one rank its role and, if it is a worker, its pipeline, its stage there and its shard of the model."""

    rank: int
    role: Role
    pipeline: int = -1
    stage: int = -1
    shard: Shard | None = None


@dataclass(frozen=True, slots=True)
class Pipeline:
    """Describe one pipeline: `pp` stages of `tp` ranks each, from `first_rank` on, stage-major."""

    index: int
    shape: PipelineShape
    first_rank: int
    first_stage: int  # stages are numbered through all pipelines in the records

    @property
    def role(self) -> Role:
        """Give what its ranks are for."""
        return Role(self.shape.role)

    @property
    def pp(self) -> int:
        """Give the number of stages."""
        return self.shape.pp

    @property
    def tp(self) -> int:
        """Give the number of tensor ranks of each stage."""
        return self.shape.tp

    @property
    def head(self) -> int:
        """Give the rank that decides what goes through: the first stage's leader."""
        return self.first_rank

    @property
    def ranks(self) -> range:
        """Give all ranks of the pipeline."""
        return range(self.first_rank, self.first_rank + self.pp * self.tp)

    def rank_of(self, stage: int, tp_rank: int = 0) -> int:
        """Give the rank at a place of the pipeline; tensor rank 0 leads its stage."""
        return self.first_rank + stage * self.tp + tp_rank

    def stage_ranks(self, stage: int) -> list[int]:
        """Give the ranks that share a stage, leader first."""
        return [self.rank_of(stage, tp_rank) for tp_rank in range(self.tp)]


@dataclass(frozen=True, slots=True)
class Topology:
    """Hold the placement of every rank of the world, by rank, and the pipelines that they form."""

    placements: tuple[Placement, ...]
    pipelines: tuple[Pipeline, ...]

    @property
    def workers(self) -> tuple[Placement, ...]:
        """Give the ranks that hold a shard, pipeline by pipeline, stage-major, then by tensor rank."""
        return tuple(p for p in self.placements if p.shard is not None)

    @property
    def num_stages(self) -> int:
        """Count the stages of all pipelines."""
        return sum(pipeline.pp for pipeline in self.pipelines)

    @property
    def first_spare(self) -> int:
        """Give the lowest rank that is a spare, or the number of ranks where there is none."""
        return 1 + len(self.workers)

    def name(self, rank: int) -> str:
        """Say in words what a rank is for, such as "token stage 1"."""
        placement = self.placements[rank]
        if placement.shard is None:
            return placement.role.value
        words = [] if placement.role is Role.BOTH else [placement.role.value]
        words.append(f"stage {placement.stage}")
        if placement.role is Role.BOTH and len(self.pipelines) > 1:
            words.append(f"of pipeline {placement.pipeline}")
        if placement.shard.tp_size > 1:
            words.append(f"tensor rank {placement.shard.tp_rank}")
        return " ".join(words)

    def workers_of(self, pipeline: Pipeline) -> tuple[Placement, ...]:
        """Give the workers of one pipeline."""
        return tuple(p for p in self.workers if p.pipeline == pipeline.index)


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


def plan_pipelines(config: ServeConfig) -> tuple[Pipeline, ...]:
    """Lay the pipelines of a configuration out over the ranks behind the controller."""
    pipelines: list[Pipeline] = []
    rank, stage = 1, 0
    for index, shape in enumerate(config.pipeline_shapes):
        pipelines.append(Pipeline(index, shape, rank, stage))
        rank, stage = rank + shape.pp * shape.tp, stage + shape.pp
    return tuple(pipelines)


def place_workers(pipeline: Pipeline, config: ServeConfig, spec: ModelSpec) -> Iterator[Placement]:
    """Give each rank of a pipeline its layers and its part of them."""
    spec.check_tensor_parallel(pipeline.tp)
    ranges = split_layers(spec.num_layers, pipeline.pp, config.layers_per_stage)
    for stage, (first, last) in enumerate(ranges):
        for tp_rank, rank in enumerate(pipeline.stage_ranks(stage)):
            shard = Shard(first, last, spec.num_layers, tp_rank, pipeline.tp)
            yield Placement(rank, pipeline.role, pipeline.index, stage, shard)


def build_topology(config: ServeConfig, spec: ModelSpec, world_size: int) -> Topology:
    """Place every rank; raise TopologyError where the world or the model does not divide as asked."""
    needed = required_ranks(config)
    if world_size != needed:
        shapes = " + ".join(f"pp {shape.pp} x tp {shape.tp}" for shape in config.pipeline_shapes)
        raise TopologyError(
            f"{world_size} ranks were started and {shapes} needs {needed} "
            f"({described_ranks(config)}): use `mpirun -n {needed}`, or no mpirun at all"
        )
    pipelines = plan_pipelines(config)
    workers = [placement for pipeline in pipelines for placement in place_workers(pipeline, config, spec)]
    spares = [Placement(1 + config.num_workers + index, Role.SPARE) for index in range(config.spares)]
    return Topology((Placement(CONTROLLER, Role.CONTROLLER), *workers, *spares), pipelines)


def described_ranks(config: ServeConfig) -> str:
    """Say in words which ranks a configuration needs."""
    if not config.spares:
        return f"a controller and {config.num_workers} workers"
    return f"a controller, {config.num_workers} workers and {config.spares} spares"


def required_ranks(config: ServeConfig) -> int:
    """Count the ranks that a configuration needs: a controller, its workers and spares."""
    return 1 + config.num_workers + config.spares
