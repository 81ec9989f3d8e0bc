"""Let MPI hear of a death while it makes a communicator: Open MPI 5.0 falls over one that is not whole yet.

A death makes Open MPI go through all communicators, and call what the collectives of each do then. One that is being
made, such as by Shrink after an earlier death, is among them before it has any: every survivor then calls through a
null pointer (https://github.com/sandialabs/Fenix/issues/136; seen with 5.0.11). So the function that does it is led
through one that lends such a communicator collectives that do nothing. A library that is built otherwise is left as it
is.
"""

import ctypes
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path
from typing import Any

from mpi4py import MPI

REVOKE = b"ompi_comm_revoke_local"
COLLECTIVES_OFFSET = 0x158  # in a communicator: where its collectives are
REVOKE_OFFSET = 0x450  # in these: the function that is called through null
STAND_IN_WORDS = 1024
DT_PLT_BYTES, DT_STRINGS, DT_SYMBOLS, DT_PLT = 2, 5, 6, 23  # in a library's table of what it is made of
ENTRY_BYTES = 24  # of a symbol, and of a relocation

KEPT: list[Any] = []  # what MPI calls from then on, which has to live as long as the process
Revoke = ctypes.CFUNCTYPE(ctypes.c_bool, ctypes.c_void_p, ctypes.c_bool)


@cache
def guard_half_made() -> bool:
    """Guard communicators that are being made, from now to the end of this process; False where it cannot be done."""
    path = next((name for name in mapped("r") if Path(name).name.startswith("libmpi.so")), None)
    if path is None or not is_known():
        return False
    library = ctypes.CDLL(path)
    slot = next(find_slots(library), None)
    if slot is None or not any(start <= slot < end for start, end in mapped("w").get(path, [])):
        return False
    guard = lending(Revoke((REVOKE.decode(), library)))
    KEPT.append(guard)
    word_at(slot).value = ctypes.cast(guard, ctypes.c_void_p).value or 0
    return True


def lending(original: Callable[[int, bool], bool]) -> Any:
    """Make the function that MPI calls in place of `original`."""
    nothing = ctypes.cast(ctypes.CDLL(None).getpid, ctypes.c_void_p).value or 0
    stand_in = (ctypes.c_size_t * STAND_IN_WORDS)(*[nothing] * STAND_IN_WORDS)

    def revoke_local(communicator: int, only_collectives: bool) -> bool:
        collectives = word_at(communicator + COLLECTIVES_OFFSET)
        if collectives.value:
            return original(communicator, only_collectives)
        collectives.value = ctypes.addressof(stand_in)
        try:
            return original(communicator, only_collectives)
        finally:
            collectives.value = 0

    return Revoke(revoke_local)


def is_known() -> bool:
    """Tell whether this is a library in which communicators look as they are expected to."""
    if not MPI.Get_library_version().startswith("Open MPI v5.0."):
        return False
    collectives = word_at(MPI._handleof(MPI.COMM_WORLD) + COLLECTIVES_OFFSET).value
    if not any(start <= collectives < end for ranges in mapped("r").values() for start, end in ranges):
        return False
    function = word_at(collectives + REVOKE_OFFSET).value
    return any(start <= function < end for ranges in mapped("x").values() for start, end in ranges)


def mapped(kind: str) -> dict[str, list[tuple[int, int]]]:
    """Give the addresses that this process may read (r), write (w) or execute (x), by file; "" has none."""
    found: dict[str, list[tuple[int, int]]] = {}
    for line in Path("/proc/self/maps").read_text().splitlines():
        fields = line.split(maxsplit=5)
        if kind in fields[1]:
            start, end = (int(address, 16) for address in fields[0].split("-"))
            found.setdefault(fields[5] if len(fields) > 5 else "", []).append((start, end))
    return found


def find_slots(library: ctypes.CDLL) -> Iterator[int]:
    """Find where a library keeps the address of the function that is to be led astray, as ELF and glibc have it."""
    base, dynamic = word_at(library._handle).value, word_at(library._handle + 16).value
    parts: dict[int, int] = {}
    while tag := word_at(dynamic).value:
        parts[tag] = word_at(dynamic + 8).value
        dynamic += 16
    for entry in range(parts[DT_PLT], parts[DT_PLT] + parts[DT_PLT_BYTES], ENTRY_BYTES):
        symbol = parts[DT_SYMBOLS] + ENTRY_BYTES * (word_at(entry + 8).value >> 32)
        name = parts[DT_STRINGS] + ctypes.c_uint32.from_address(symbol).value
        if ctypes.string_at(name) == REVOKE:
            yield base + word_at(entry).value


def word_at(address: int) -> ctypes.c_size_t:
    """Give the word at an address."""
    return ctypes.c_size_t.from_address(address)
