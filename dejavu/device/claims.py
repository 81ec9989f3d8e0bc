"""Claim a directory together with other processes, for life: where none is left, whoever comes by may remove it.

A claim is a shared lock on the directory, which the kernel frees with the process, however that ends. Standard library
only, as the keeper needs.
"""

import fcntl
import os
import shutil
import time
from contextlib import suppress
from pathlib import Path

from dejavu.device.handles import check_directory

LOOK_EVERY_S = 0.02


def claim(directory: Path) -> int:
    """Make a directory of this user's alone, if it is not there, and claim it; give the descriptor that holds it.

    DeviceError where it is open to other users.
    """
    while True:
        directory.mkdir(mode=0o700, exist_ok=True)
        try:
            fd = os.open(directory, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC)
        except FileNotFoundError:  # removed again meanwhile
            continue
        fcntl.flock(fd, fcntl.LOCK_SH)
        if is_there(fd, directory):
            check_directory(directory)
            return fd
        os.close(fd)


def is_there(fd: int, directory: Path) -> bool:
    """Tell whether an open directory still has its name."""
    try:
        return os.path.samestat(os.fstat(fd), directory.stat())
    except FileNotFoundError:
        return False


def clear_unclaimed(directory: Path, timeout_s: float = 0.0) -> bool:
    """Remove a directory when nobody claims it, within `timeout_s`; tell whether it is gone."""
    deadline = time.monotonic() + timeout_s
    while directory.exists():
        with suppress(FileNotFoundError, BlockingIOError):
            fd = os.open(directory, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC)
            try:
                fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
                shutil.rmtree(directory)  # who waits to claim it sees that it is gone
            finally:
                os.close(fd)
        if time.monotonic() >= deadline:
            break
        time.sleep(LOOK_EVERY_S)
    return not directory.exists()
