"""Memory that ranks of one host show each other: what this rank has exported, and what it has mapped of another."""

from dejavu.device.base import Buffer, Device, DeviceError, Location, Memory
from dejavu.errors import DejavuError
from dejavu.transport.carrier import UnavailableError
from dejavu.transport.ipc_messages import Register


class Exports:
    """Number this rank's memories, by the object that owns each."""

    def __init__(self) -> None:
        self._known: dict[int, tuple[int, Memory]] = {}  # by id(), which the held object keeps from being used again
        self._next_id = 0

    def identify(self, memory: Memory) -> int:
        """Give a memory's number, a new one at first sight."""
        if id(memory) not in self._known:
            self._known[id(memory)] = self._next_id, memory
            self._next_id += 1
        return self._known[id(memory)][0]

    def introduce(self, memory: Memory) -> tuple[Register, int | None]:
        """Give the message with which a peer maps a memory, and the descriptor that goes with it.

        UnavailableError where this kind of memory cannot be shared.
        """
        memory_id, is_host = self.identify(memory), memory.location is Location.HOST
        try:
            fd, handle = _export(memory)
        except DeviceError as error:
            raise UnavailableError(
                f"ipc cannot receive into {memory.nbytes} bytes of {memory.location} memory ({error}): "
                "allocate it with allocate_exportable or allocate_host_exportable"
            ) from error
        return Register(memory_id, memory.nbytes, is_host, handle), fd

    def forget(self, memory: Memory) -> int | None:
        """Forget a memory, and give its number if it had one."""
        known = self._known.pop(id(memory), None)
        return None if known is None else known[0]


class Imports:
    """Hold another rank's memories, mapped into this one, by that rank's numbers."""

    def __init__(self, device: Device, rank: int) -> None:
        self._device = device
        self._rank = rank
        self._mapped: dict[int, Buffer | UnavailableError] = {}

    def add(self, register: Register, fds: list[int]) -> None:
        """Map a memory; where that fails, `find` says why. The descriptors stay the caller's."""
        try:
            self._mapped[register.memory_id] = self._map(register, fds)
        except DejavuError as error:
            self._mapped[register.memory_id] = UnavailableError(
                f"ipc cannot map {register.nbytes} bytes of rank {self._rank} at {self._device} ({error}): "
                "check that the two devices reach each other, or use nccl, mpi or tcp"
            )

    def find(self, memory_id: int) -> Buffer:
        """Give a mapped memory, whole; UnavailableError where it could not be mapped."""
        found = self._mapped.get(memory_id)
        if isinstance(found, Buffer):
            return found
        raise found or UnavailableError(f"rank {self._rank} posted memory {memory_id}, which it had not introduced")

    def remove(self, memory_id: int) -> None:
        """Unmap a memory."""
        found = self._mapped.pop(memory_id, None)
        if isinstance(found, Buffer):
            found.close()

    def close(self) -> None:
        """Unmap all."""
        for memory_id in list(self._mapped):
            self.remove(memory_id)

    def _map(self, register: Register, fds: list[int]) -> Buffer:
        if register.handle is not None:
            return self._device.open_ipc(register.handle, register.nbytes)
        if len(fds) != 1:
            raise DeviceError("no descriptor came with it: raise the limit `ulimit -n`")
        if register.is_host:
            return self._device.import_host_fd(fds[0], register.nbytes)
        return self._device.import_fd(fds[0], register.nbytes)


def _export(memory: Memory) -> tuple[int | None, bytes | None]:
    """Give a descriptor, which outlives this process, or else a handle, which does not."""
    try:
        return memory.export_fd(), None
    except DeviceError:
        return None, memory.ipc_handle()
