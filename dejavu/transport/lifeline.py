"""Learn of a process's death at once: by a lock that it holds for life, which the kernel frees as it begins to die.

A killed process is gone for its parent only when its memory and its GPU's context have been taken apart: 50 ms with
torch, 400 ms with a GPU's. A robust mutex is released before that. Each process locks one, in memory that the others
map, and who wants to know of its end waits for the lock. It costs nothing while nobody dies.
"""

import ctypes
import errno
import mmap
import os
import time
from contextlib import suppress
from pathlib import Path

MUTEX_BYTES = 64  # at least sizeof(pthread_mutex_t), and sizeof(pthread_mutexattr_t)
PTHREAD_PROCESS_SHARED = PTHREAD_MUTEX_ROBUST = 1
ENDED = 128  # where a byte in the memory says that who was first to learn of the end has said so
DEAD = (errno.EOWNERDEAD, errno.ENOTRECOVERABLE)
LIBC = ctypes.CDLL(None)


class Timespec(ctypes.Structure):
    """Be a time of the realtime clock."""

    _fields_ = (("seconds", ctypes.c_long), ("nanoseconds", ctypes.c_long))


class Mutex:
    """Map a mutex in memory that is shared by a file descriptor."""

    def __init__(self, fd: int) -> None:
        self.memory = mmap.mmap(fd, mmap.PAGESIZE)
        self.lock = (ctypes.c_char * MUTEX_BYTES).from_buffer(self.memory)

    def close(self) -> None:
        """Unmap it."""
        del self.lock
        with suppress(BufferError):  # a thread waits for it still
            self.memory.close()


class Lifeline:
    """Hold a lock of this process, taken by the calling thread, which has to live as long as the process."""

    def __init__(self) -> None:
        self.fd = os.memfd_create("dejavu-lifeline")
        os.ftruncate(self.fd, mmap.PAGESIZE)
        self.own = Mutex(self.fd)
        # Never unmapped as Python ends: the kernel looks there when the process has.
        ctypes.pythonapi.Py_IncRef(ctypes.py_object(self.own.memory))
        self.others: dict[int, Mutex] = {}  # by the number of the process
        attributes = (ctypes.c_char * MUTEX_BYTES)()
        for status in (
            LIBC.pthread_mutexattr_init(attributes),
            LIBC.pthread_mutexattr_setpshared(attributes, PTHREAD_PROCESS_SHARED),
            LIBC.pthread_mutexattr_setrobust(attributes, PTHREAD_MUTEX_ROBUST),
            LIBC.pthread_mutex_init(self.own.lock, attributes),
            LIBC.pthread_mutex_lock(self.own.lock),
        ):
            assert status == 0, os.strerror(status)

    def follow(self, process: int, pid: int, fd: int) -> None:
        """Map the lock of another process of this host and user, which has it as its descriptor `fd`.

        It is `process` from now on: a pid could be another's later.
        """
        copy = os.open(f"/proc/{pid}/fd/{fd}", os.O_RDWR)
        try:
            self.others[process] = Mutex(copy)
        finally:
            os.close(copy)

    def await_end(self, process: int, seconds: float) -> bool:
        """Wait, at most so long, for the end of a process that is followed; tell whether it has come."""
        whole, part = divmod(time.time() + seconds, 1)
        other, until = self.others[process], Timespec(int(whole), int(part * 1e9))
        status = LIBC.pthread_mutex_timedlock(other.lock, ctypes.byref(until))
        if status in DEAD:
            other.memory[ENDED] = 1
        if status in (0, errno.EOWNERDEAD):  # who waits besides gets it, or is told that nobody can have it any more
            LIBC.pthread_mutex_unlock(other.lock)
        if status == 0:  # its owner has let go of it, alive
            time.sleep(seconds)
        return status in DEAD

    def has_ended(self, process: int) -> bool:
        """Tell whether anybody has learnt of the end of a process that is followed."""
        return self.others[process].memory[ENDED] == 1

    def close(self) -> None:
        """Let go of all locks, in the thread that made them; this process's is free then, as if it lived.

        No thread may wait for any of them.
        """
        LIBC.pthread_mutex_unlock(self.own.lock)
        for mutex in (self.own, *self.others.values()):
            mutex.close()
        self.others.clear()
        os.close(self.fd)


def process_state(pid: int) -> str:
    """Give the letter by which Linux calls a process's state; X where there is none of that number."""
    try:
        text = Path(f"/proc/{pid}/stat").read_text()
    except (FileNotFoundError, ProcessLookupError):
        return "X"
    return text.rpartition(")")[2].split()[0]


def is_alive(pid: int) -> bool:
    """Tell whether a process of this host runs, and is no zombie."""
    return process_state(pid) not in "XZ"
