"""Describe what is simulated: pipelines, how they share the work, and what befalls them."""

from dataclasses import dataclass
from typing import Literal

from dejavu.errors import UsageError
from dejavu.planning.times import StageTimes, check_times

PipelineRole = Literal["both", "prompt", "token"]


@dataclass(frozen=True, slots=True)
class Swap:
    """Keep the KV of `resident` microbatches on the device, and fetch a microbatch's before its step.

    `bytes_per_token` is the KV of one token of one row in one stage; `bandwidth` is the host link's, bytes/s each way.
    """

    bytes_per_token: float
    bandwidth: float
    resident: int = 2

    def __post_init__(self) -> None:
        if self.resident < 1:
            raise UsageError(f"{self.resident} resident microbatches cannot step: give at least 1")
        check_times(swap_bytes_per_token=self.bytes_per_token)
        if not self.bandwidth > 0:
            raise UsageError(f"a host link of {self.bandwidth:g} bytes/s moves nothing: give more than 0")

    def move_s(self, num_tokens: float) -> float:
        """Give the time to fetch, or to flush, the KV of so many tokens."""
        return num_tokens * self.bytes_per_token / self.bandwidth


@dataclass(frozen=True, slots=True)
class Replication:
    """Copy the KV of each pass's new tokens to another place, behind the next pass's compute.

    A stage keeps the copies of at most two passes under way, so a link that is slower than the passes delays them.
    """

    bytes_per_token: float
    bandwidth: float

    def __post_init__(self) -> None:
        check_times(replica_bytes_per_token=self.bytes_per_token)
        if not self.bandwidth > 0:
            raise UsageError(f"a replica's link of {self.bandwidth:g} bytes/s moves nothing: give more than 0")

    def copy_s(self, num_tokens: int) -> float:
        """Give the time to copy the KV of so many tokens."""
        return num_tokens * self.bytes_per_token / self.bandwidth


@dataclass(frozen=True, slots=True)
class PipelineSetup:
    """Describe one pipeline. At most one pass of a microbatch is under way; new prompts go before token steps.

    `microbatches` 0 is one per stage. `prompt_chunk` 0 runs whole prompts, up to `max_prompt_tokens` in a pass;
    otherwise each pass takes the token steps and up to so many prompt tokens together. `hop_s` is the time from one
    stage to the next, and from the last one back to the first.
    """

    stages: int
    times: StageTimes
    role: PipelineRole = "both"
    microbatches: int = 0
    rows: int = 1
    prompt_chunk: int = 0
    max_prompt_tokens: int = 8192
    hop_s: float = 0.0
    swap: Swap | None = None
    replication: Replication | None = None

    def __post_init__(self) -> None:
        for name in ("stages", "rows", "max_prompt_tokens"):
            if getattr(self, name) < 1:
                raise UsageError(f"{name} {getattr(self, name)} cannot serve: give at least 1")
        for name in ("microbatches", "prompt_chunk"):
            if getattr(self, name) < 0:
                raise UsageError(f"{name} {getattr(self, name)} is impossible: give 0 or more")
        check_times(hop_s=self.hop_s)

    @property
    def num_microbatches(self) -> int:
        """Give the number of microbatches."""
        return self.microbatches or self.stages

    @property
    def num_rows(self) -> int:
        """Give the number of requests that can be in the pipeline at once."""
        return self.num_microbatches * self.rows

    @property
    def return_s(self) -> float:
        """Give the time from the last stage to the first; nothing where that is the same one."""
        return self.hop_s if self.stages > 1 else 0.0


@dataclass(frozen=True, slots=True)
class Failure:
    """Lose a stage at `time_s`: its pipeline stands still for detection and restore, and then does again what the
    failure cut short. With `kv_lost` the prompts and tokens of all its rows are processed again, too.
    """

    time_s: float
    pipeline: int = 0
    detection_s: float = 0.0
    restore_s: float = 0.0
    kv_lost: bool = False

    def __post_init__(self) -> None:
        check_times(kill_s=self.time_s, detection_s=self.detection_s, restore_s=self.restore_s)

    @property
    def resume_s(self) -> float:
        """Give when the pipeline goes on."""
        return self.time_s + self.detection_s + self.restore_s


@dataclass(frozen=True, slots=True)
class Setup:
    """Describe pipelines that share one queue of requests, first come first served.

    A request takes a row of the pipeline with the fewest requests, in its emptiest microbatch, and stage 0 hears of it
    `admission_s` later: with more than 0, a microbatch whose row has just become free takes another step of its other
    rows before the next request's prompt. In a disaggregated setup it takes a row of a prompt pipeline, and `cache_s`
    after its first token one of a token pipeline. The token side has memory for its rows and for `prompt_ahead`
    requests more (None: any number), and a request of several tokens holds its part from the start of its prompt.
    """

    pipelines: tuple[PipelineSetup, ...]
    cache_s: float = 0.0
    admission_s: float = 0.0
    prompt_ahead: int | None = None
    failures: tuple[Failure, ...] = ()

    def __post_init__(self) -> None:
        check_times(cache_s=self.cache_s, admission_s=self.admission_s)
        if self.prompt_ahead is not None and self.prompt_ahead < 0:
            raise UsageError(f"memory for {self.prompt_ahead} requests more is impossible: give 0 or more")
        roles = {pipeline.role for pipeline in self.pipelines}
        if roles not in ({"both"}, {"prompt", "token"}):
            raise UsageError("pipelines have to be all for both, or some for prompts and the others for tokens")
        for failure in self.failures:
            if not 0 <= failure.pipeline < len(self.pipelines):
                raise UsageError(f"no pipeline {failure.pipeline} can fail: there are {len(self.pipelines)}")

    @property
    def is_disaggregated(self) -> bool:
        """Tell whether prompts and tokens have pipelines of their own."""
        return self.pipelines[0].role != "both"

    @property
    def num_stages(self) -> int:
        """Count the stages of all pipelines."""
        return sum(pipeline.stages for pipeline in self.pipelines)
