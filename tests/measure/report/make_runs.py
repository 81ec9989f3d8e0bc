"""Write small run directories as `dejavu serve` does, with records whose numbers are known."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from dejavu.config import make_config
from dejavu.measure.ended import Ended, ended_file, ended_line
from dejavu.measure.environment import describe_run
from dejavu.measure.recorder import FileRecorder
from dejavu.measure.records import StepKind, StepRecord, TransferRecord
from dejavu.measure.run_directory import RunDirectory
from dejavu.measure.trace import Tracks
from dejavu.request import Completion, FinishReason, Request

RANKS = [
    {"rank": 0, "role": "controller", "host": "one", "device": "a processor"},
    {"rank": 1, "role": "both", "host": "one", "device": "a processor", "stage": 0, "tp_rank": 0, "layers": [0, 6]},
    {"rank": 2, "role": "both", "host": "one", "device": "a processor", "stage": 1, "tp_rank": 0, "layers": [6, 12]},
]


def make_run(path: Path, *, speed: float = 1.0, failures: str = "", options: Mapping[str, Any] | None = None) -> Path:
    """Make a run of four requests of three tokens on two stages, everything `speed` times as fast."""
    directory = RunDirectory.create("test", path)
    config = make_config({"model": "gpt2", "load_format": "dummy", "pp": 2, **(options or {})})
    directory.write_run(describe_run(config.model_dump(mode="json"), RANKS, dtype="float32"))
    directory.write_records(
        [Ended.of(completion(index, speed)) for index in range(4)],
        [step(rank, index, speed) for index in range(6) for rank in (1, 2)],
        [TransferRecord(1, "activation", "mpi", 1, 2, 10**6, 0.1 * i, 0.1 * i + 0.001) for i in range(5)],
        tracks=Tracks({0: "controller", 1: "stage 0", 2: "stage 1"}),
        num_stages=2,
        peak_kv_bytes=2**20,
    )
    if failures:
        (path / "failures.csv").write_text(failures)
    directory.write_result("ok", 0)
    return path


def make_unfinished_run(path: Path) -> Path:
    """Make the same run as it is after its last request, before anything was put in its place."""
    directory = RunDirectory.create("test", path)
    config = make_config({"model": "gpt2", "load_format": "dummy", "pp": 2})
    directory.write_run(describe_run(config.model_dump(mode="json"), RANKS, dtype="float32"))
    for rank in (1, 2):
        recorder = FileRecorder(path)
        for index in range(6):
            recorder.add_step(step(rank, index, 1.0))
        recorder.close()
    ended_file(path).write_text("".join(ended_line(index, completion(index, 1.0)) for index in (2, 0, 1, 3)))
    return path


def completion(index: int, speed: float) -> Completion:
    """Make a request that came at 0 and ended after (index + 2) / speed seconds."""
    request = Request(f"<r{index}>", (1, 2, 3), arrival_s=0.0)
    done = Completion(request, admitted_s=0.0)
    done.token_ids.extend([5, 6, 7])
    done.first_token_s = (index + 1) / speed
    done.token_start_s = done.first_token_s
    done.finish_s = (index + 2) / speed
    done.finish_reason = FinishReason.LENGTH
    return done


def step(rank: int, index: int, speed: float) -> StepRecord:
    """Make a pass of a second's half, behind that of the stage before."""
    start_s = (index + 0.5 * (rank - 1)) / speed
    kind: StepKind = "prompt" if index == 0 else "token"
    return StepRecord(rank, rank - 1, 0, 0, index, kind, 4, 4, start_s, start_s + 0.4 / speed, start_s + 0.5 / speed)
