"""Replicas in files: what is left of the KV when every process that held it, the keeper too, is gone."""

import os
from contextlib import suppress
from hashlib import blake2b
from pathlib import Path

from dejavu.cluster.launcher import RESUME, RUN_DIR
from dejavu.device.base import Device
from dejavu.engine.ring import place_name
from dejavu.engine.setup import EngineSetup
from dejavu.errors import CapacityError
from dejavu.kv.layout import PoolLayout
from dejavu.kv.replica import ReplicaStore, StoreShape
from dejavu.topology import Placement

BOOT = Path("/proc/sys/kernel/random/boot_id")


def store_path(setup: EngineSetup, owner: Placement) -> Path | None:
    """Give the file of a place's replica, named by the run and this boot of the host; None where it has none.

    After another boot the file is not found: the kernel may have written its index and lost the bytes before it.
    """
    if setup.config.kv_disk is None:
        return None
    run = f"{os.environ[RUN_DIR]} {BOOT.read_text()}"
    name = blake2b(run.encode(), digest_size=12).hexdigest()
    return Path(setup.config.kv_disk, f"dejavu-{name}", f"{place_name(owner)}.kv")


def open_store(device: Device, path: Path, layout: PoolLayout, shape: StoreShape, *, is_later: bool) -> ReplicaStore:
    """Map the store in a file, with its contents if this run has made them, else empty.

    That is so where the run `is_later` than its first epoch, or was started again.
    """
    nbytes = shape.index_bytes + layout.total_bytes
    path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
    try:
        is_kept = os.fstat(fd).st_size == nbytes and (is_later or RESUME in os.environ)
        if not is_kept:
            os.ftruncate(fd, 0)
            os.posix_fallocate(fd, 0, nbytes)
        store = ReplicaStore(device.import_host_fd(fd, nbytes), layout, shape)
    except OSError as error:
        raise CapacityError(f"{path} cannot hold {nbytes} bytes ({error.strerror}): give another --kv-disk") from error
    finally:
        os.close(fd)
    if not is_kept:
        store.clear()
    return store


def remove_store(setup: EngineSetup, owner: Placement) -> None:
    """Remove the file of a place's replica, and the run's directory with the last one."""
    if path := store_path(setup, owner):
        path.unlink(missing_ok=True)
        with suppress(OSError):  # others have theirs there
            path.parent.rmdir()
