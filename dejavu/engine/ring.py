"""Who holds whose replica, and what memory is called at the keeper: pure, and the same on every rank."""

from collections.abc import Sequence

from dejavu.topology import Pipeline, Placement, Topology

SWAPPED = "swapped"


def replica_holder(topology: Topology, hosts: Sequence[str], rank: int) -> int:
    """Give the rank in whose host's memory `rank` keeps its replica.

    It is of the same pipeline and tensor rank, and stands a fixed number of stages behind: one, or the fewest for
    which most ranks have their replica on another host than their own. `hosts` names each rank's. A pipeline of one
    stage keeps its own: it then survives the loss of the device, not of the host.
    """
    placement = topology.placements[rank]
    assert placement.shard is not None, f"rank {rank} has no KV"
    pipeline = topology.pipelines[placement.pipeline]
    stage = (placement.stage + ring_distance(pipeline, hosts)) % pipeline.pp
    return pipeline.rank_of(stage, placement.shard.tp_rank)


def replica_owner(topology: Topology, hosts: Sequence[str], holder: int) -> int:
    """Give the rank whose replica `holder` holds."""
    placement = topology.placements[holder]
    assert placement.shard is not None, f"rank {holder} has no KV"
    pipeline = topology.pipelines[placement.pipeline]
    stage = (placement.stage - ring_distance(pipeline, hosts)) % pipeline.pp
    return pipeline.rank_of(stage, placement.shard.tp_rank)


def ring_distance(pipeline: Pipeline, hosts: Sequence[str]) -> int:
    """Count the stages between a rank and the holder of its replica."""

    def num_apart(distance: int) -> int:
        ranks = range(len(pipeline.ranks))
        shift = distance * pipeline.tp
        first = pipeline.first_rank
        return sum(hosts[first + i] != hosts[first + (i + shift) % len(ranks)] for i in ranks)

    return max(range(1, pipeline.pp), key=num_apart, default=0)


def place_name(placement: Placement) -> str:
    """Name a place in a pipeline, whoever takes it: `PIPELINE.STAGE.TENSOR`, the owner of memory at the keeper."""
    assert placement.shard is not None, f"rank {placement.rank} has no place"
    return f"{placement.pipeline}.{placement.stage}.{placement.shard.tp_rank}"


def memory_prefixes(owner: Placement) -> tuple[str, str]:
    """Give what the names of a place's memory begin with: of what is lost with its device or rank, and of the rest."""
    return f"{place_name(owner)}/", f"{SWAPPED}/{place_name(owner)}/"


def pool_name(owner: Placement, *, swapped: bool = False) -> str:
    """Name a place's KV pool at the keeper; one that is swapped lies in host memory, which outlives the device."""
    return memory_prefixes(owner)[swapped] + "pool"


def flushed_name(owner: Placement) -> str:
    """Name what says how much of each request a place's swapped pool has."""
    return memory_prefixes(owner)[True] + "flushed"


def weights_name(owner: Placement) -> str:
    """Name a place's weights at the keeper."""
    return f"{place_name(owner)}/weights"


def replica_name(holder: Placement, owner: Placement) -> str:
    """Name the replica that `holder` has of `owner`: lost with the holder's memory."""
    return f"{place_name(holder)}/replica/{place_name(owner)}"
