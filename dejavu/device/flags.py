"""Flags of the CPU device: 32-bit words in shared memory that threads and processes wait for without burning a core."""

import ctypes
import errno
import os
import platform
import threading
import time
from collections.abc import Callable

from dejavu.device.base import DeviceError
from dejavu.errors import DeadlineError

_FUTEX_SYSCALL = {"x86_64": 202, "aarch64": 98}
_FUTEX_WAIT, _FUTEX_WAKE = 0, 1
_EVERYBODY = 2**31 - 1
_SPINS = 50
_FIRST_SLEEP_S, _LONGEST_SLEEP_S = 1e-4, 2e-3  # also how late a value is seen that was written without a wake-up

_order = threading.Lock()
_libc = ctypes.CDLL(None, use_errno=True)


class _Timespec(ctypes.Structure):
    _fields_ = (("seconds", ctypes.c_long), ("nanoseconds", ctypes.c_long))


class Flag:
    """Read, write and await one aligned word; whoever makes it keeps the memory mapped."""

    __slots__ = ("_address", "_word")

    def __init__(self, address: int) -> None:
        assert address % 4 == 0, f"a flag is aligned to 4 bytes, not at {address:#x}"
        self._address = address
        self._word = ctypes.c_uint32.from_address(address)

    def read(self) -> int:
        """Give the value now."""
        return self._word.value

    def write(self, value: int) -> None:
        """Set the value after all that this thread wrote before, and wake who waits, in any process."""
        # A lock's release and the next acquire keep earlier writes earlier, on processors that reorder them too.
        with _order:
            pass
        with _order:
            self._word.value = value & 0xFFFFFFFF
        _futex(self._address, _FUTEX_WAKE, _EVERYBODY, None)

    def passed(self, value: int) -> bool:
        """Say whether the flag is at least `value`, in cyclic order: CUDA's GEQ."""
        return (self._word.value - value) & 0xFFFFFFFF < 0x80000000

    def wait(self, value: int, deadline_s: float | None, check: Callable[[], None] | None = None) -> None:
        """Block until the flag has passed `value`; `check` is called now and then, and ends the wait by raising.

        DeadlineError after `deadline_s` seconds.
        """
        for _ in range(_SPINS):
            if self.passed(value):
                return
        end_s = None if deadline_s is None else time.monotonic() + deadline_s
        sleep_s = _FIRST_SLEEP_S
        while not self.passed(value):
            self._check(value, end_s, deadline_s, check)
            self._sleep(sleep_s, value)
            sleep_s = min(2 * sleep_s, _LONGEST_SLEEP_S)

    def _check(
        self, value: int, end_s: float | None, deadline_s: float | None, check: Callable[[], None] | None
    ) -> None:
        if check is not None:
            check()
        if end_s is not None and time.monotonic() > end_s:
            raise DeadlineError(
                f"a flag stayed at {self.read()} instead of {value} for {deadline_s} s: "
                "the peer that writes it has stopped or is slower than the deadline"
            )

    def _sleep(self, duration_s: float, value: int) -> None:
        seen = self.read()
        if not self.passed(value):
            _futex(self._address, _FUTEX_WAIT, seen, _Timespec(0, int(duration_s * 1e9)))


def _futex(address: int, operation: int, value: int, timeout: _Timespec | None) -> None:
    number = _FUTEX_SYSCALL.get(platform.machine())
    if number is None:
        raise DeviceError(f"flags are not known on {platform.machine()} processors: use x86_64 or aarch64")
    limit = None if timeout is None else ctypes.byref(timeout)
    result = _libc.syscall(
        ctypes.c_long(number), ctypes.c_void_p(address), operation, ctypes.c_uint32(value), limit, None, 0
    )
    code = ctypes.get_errno()
    if result < 0 and code not in (errno.EAGAIN, errno.ETIMEDOUT, errno.EINTR):
        raise DeviceError(f"futex failed: {os.strerror(code)}; check that this kernel or sandbox allows it")
