"""Leave word of who was lost with a run, for whoever goes on with it: its controller may be among them."""

import json
import os
from collections.abc import Iterable
from math import isnan
from pathlib import Path

from dejavu.engine.journal import Past
from dejavu.engine.recovery import Death
from dejavu.measure.failures import FailureRecord

LOSSES = "losses.jsonl"  # in the run directory, beside the journal


def note_losses(directory: Path, deaths: Iterable[tuple[Death, float]]) -> None:
    """Add who was lost, and when that was seen on the host's clock; every rank that knows may, if it sees the run."""
    if not directory.is_dir():
        return
    file = os.open(directory / LOSSES, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
    try:
        for death, detected_s in deaths:
            values = death.target, death.process, death.kind, death.injected_s, detected_s
            os.write(file, f"{json.dumps(values)}\n".encode())
    finally:
        os.close(file)


def take_losses(directory: Path, past: Past) -> None:
    """Add to the failures of a run's past those with which it ended; several ranks may have told of one."""
    path = directory / LOSSES
    for line in path.read_text(encoding="utf-8").splitlines() if path.exists() else ():
        target, process, kind, injected_s, detected_s = json.loads(line)
        if not any(isnan(record.resumed_s) and record.rank == process for record in past.failures):
            seen_s = detected_s - past.origin_s
            past.failures.append(FailureRecord(len(past.failures), target, process, kind, injected_s, seen_s))
