"""The files of KV that outlive every process and the host: where they are, whose, and what if there are none."""

import os
import sys
import time
from collections.abc import Mapping
from contextlib import ExitStack, closing, suppress
from dataclasses import asdict
from pathlib import Path
from typing import Any

from dejavu.cluster.keeping import RestoredPool
from dejavu.cluster.launcher import RESUME
from dejavu.engine.disk import DiskMover, restore
from dejavu.engine.replication import ReplicaSource
from dejavu.engine.ring import place_name
from dejavu.engine.setup import EngineSetup
from dejavu.errors import CapacityError
from dejavu.kv.disk import KvFile, UnusableFileError, file_bytes
from dejavu.kv.layout import PoolLayout
from dejavu.topology import Placement, Role

LOST = "what is lost with all processes is computed again"


def keep_on_disk(
    setup: EngineSetup, owner: Placement, source: ReplicaSource, layout: PoolLayout, epoch: int, stack: ExitStack
) -> DiskMover | None:
    """Give what keeps a place's KV on disk from now on, if anything does; `stack` ends it."""
    file = open_store(setup, owner, layout, is_later=epoch > 0)
    return stack.enter_context(closing(DiskMover(source, file, owner.rank))) if file else None


def restore_from_disk(mover: DiskMover) -> RestoredPool:
    """Give a new pool what its file has; say so where some of that is broken."""
    started = time.monotonic()
    loaded = restore(mover.source, mover.file)
    mover.begin_with(loaded.rows)
    if loaded.num_broken:
        tokens = f"{loaded.num_broken} tokens in {mover.file.path} fail their checksums"
        say(f"{tokens}: they, and those behind them, are computed again")
    blocks = sum(len(row.blocks) for row in loaded.rows.values())
    return RestoredPool(loaded.rows, blocks * mover.file.layout.block_bytes, time.monotonic() - started)


def store_path(setup: EngineSetup, owner: Placement) -> Path | None:
    """Give the file of a place's KV, in a directory of its run; None where it has none."""
    if setup.config.kv_disk is None or owner.role is Role.PROMPT:
        return None
    return Path(setup.config.kv_disk, f"dejavu-{setup.run_id}", f"{place_name(owner)}.kv")


def identify(setup: EngineSetup, owner: Placement, layout: PoolLayout) -> Mapping[str, Any]:
    """Say whose KV a file has: whatever differs, it is worth nothing to anybody else."""
    own = {"run": setup.run_id, "model": setup.model_mark, "number format": setup.dtype, "place": place_name(owner)}
    return {**own, "layout": asdict(layout)}


def open_store(setup: EngineSetup, owner: Placement, layout: PoolLayout, *, is_later: bool) -> KvFile | None:
    """Open the file of a place's KV, where this run has made it, else make it; None where that place has none.

    The run `is_later` than its first epoch where a rank was lost before. It then goes on without a file, as after a
    start anew, rather than not at all. CapacityError where a new run gets none.
    """
    path, goes_on = store_path(setup, owner), is_later or RESUME in os.environ
    if path is None:
        return None
    identity = identify(setup, owner, layout)
    try:
        if goes_on and (found := find_store(path, identity, layout)):
            return found
        path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        return KvFile.create(path, identity, layout)
    except OSError as error:
        if not goes_on:
            room = f"{file_bytes(layout)} bytes of KV cannot be kept in {path}"
            raise CapacityError(f"{room} ({error.strerror}): make room there, or give another --kv-disk") from error
        say(f"{path} cannot be opened ({error.strerror}): this run goes on without it, and {LOST}")
        return None


def find_store(path: Path, identity: Mapping[str, Any], layout: PoolLayout) -> KvFile | None:
    """Open the file of this identity; where there is none, say so."""
    try:
        return KvFile.open(path, identity, layout)
    except FileNotFoundError:
        say(f"{path} is not there: KV that no process has kept is computed again")
    except UnusableFileError as error:
        say(f"{path} is not used ({error}): KV that no process has kept is computed again")
    return None


def say(line: str) -> None:
    """Tell the user."""
    sys.stderr.write(f"{line}\n")
    sys.stderr.flush()


def remove_store(setup: EngineSetup, owner: Placement) -> None:
    """Remove the file of a place's KV, and the run's directory with the last one."""
    if path := store_path(setup, owner):
        with suppress(OSError):  # a disk that fails has been told of, and others have files in the directory
            path.unlink(missing_ok=True)
            path.parent.rmdir()
