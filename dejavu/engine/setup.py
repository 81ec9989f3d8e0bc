"""What every rank has to know to take its place in a pipeline."""

from dataclasses import dataclass
from pathlib import Path

from dejavu.config import ServeConfig
from dejavu.engine.sizing import CacheSize
from dejavu.model.spec import ModelSpec
from dejavu.topology import Placement, Role, Topology


@dataclass(frozen=True, slots=True)
class EngineSetup:
    """Hold a checked run, the same on every rank: nothing in it can fail any more but the machine."""

    config: ServeConfig
    spec: ModelSpec
    directory: Path | None  # of the checkpoint; None makes random weights
    topology: Topology
    caches: tuple[CacheSize, ...]  # by pipeline
    dtype: str
    job: str  # an unguessable name, of the keeper among others
    device: str = "cpu"  # what the workers compute on, or "cuda"
    num_devices: int = 0  # GPUs of the controller's host, for a GPU run
    cut_at: int = 0  # most prompt tokens of a pass, where GPUs have no memory for whole prompts
    run_id: str = ""  # the same however often the run is started again; where KV is kept on disk
    model_mark: str = ""  # which weights, and of what shape; the same only for the same files

    @property
    def on_cuda(self) -> bool:
        """Tell whether the workers compute on GPUs."""
        return self.device == "cuda"

    @property
    def is_recoverable(self) -> bool:
        """Tell whether serving can go on when a rank dies."""
        return self.config.spares > 0 or self.is_refilled

    @property
    def is_refilled(self) -> bool:
        """Tell whether processes are started in the place of spares that are used up."""
        return self.config.on_failure == "wait"

    @property
    def moves_kv(self) -> bool:
        """Tell whether KV moves between pipelines; synthetic stages have none."""
        return self.config.is_disaggregated and not self.config.synthetic

    @property
    def replicated(self) -> tuple[Placement, ...]:
        """Give the places whose KV is replicated: all that generate tokens."""
        if self.config.replicate == "off":
            return ()
        return tuple(place for place in self.topology.workers if place.role is not Role.PROMPT)
