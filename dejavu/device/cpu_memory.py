"""Memory of the CPU device, and host memory of any device: memfd mappings that other processes can map too."""

import mmap
import os
import struct
from typing import TYPE_CHECKING

import numpy as np

from dejavu.device.base import IPC_HANDLE_BYTES, DeviceError, Location, Memory
from dejavu.errors import CapacityError

if TYPE_CHECKING:
    import torch

_HANDLE = struct.Struct("<8sIIQQQ")  # magic, process, descriptor, bytes, device and inode of the memfd
_MAGIC = b"dvmemfd1"


class SharedMemory(Memory):
    """Map a memfd, and hold its descriptor.

    Tensors over the mapping hold it too: it goes when `close` was called and the last of them is gone.
    """

    __slots__ = ("_bytes", "_fd", "_mapping")

    def __init__(self, fd: int, nbytes: int, location: Location) -> None:
        """Take over `fd`."""
        self._fd = fd
        try:
            self._mapping: mmap.mmap | None = mmap.mmap(fd, nbytes)
        except (OSError, ValueError) as error:
            os.close(fd)
            raise CapacityError(f"cannot map {nbytes} bytes of shared memory ({error}): ask for less") from error
        self._bytes: np.ndarray | None = np.frombuffer(self._mapping, dtype=np.uint8)
        super().__init__(self._bytes.ctypes.data, nbytes, location)

    def tensor(self, address: int, nbytes: int) -> "torch.Tensor":
        """Give a tensor that holds the mapping."""
        import torch

        assert self._bytes is not None, "the memory was closed"
        offset = address - self.address
        return torch.from_numpy(self._bytes[offset : offset + nbytes])

    @property
    def held(self) -> object:
        """Give what keeps the mapping alive, for work that is queued when this memory is closed."""
        return self._bytes

    def export_fd(self) -> int:
        """Give a duplicate of the descriptor."""
        assert self._bytes is not None, "the memory was closed"
        return os.dup(self._fd)

    def ipc_handle(self) -> bytes:
        """Name this process and its descriptor, with what recognises the memfd again."""
        status = os.fstat(self._fd)
        packed = _HANDLE.pack(_MAGIC, os.getpid(), self._fd, self.nbytes, status.st_dev, status.st_ino)
        return packed.ljust(IPC_HANDLE_BYTES, b"\0")

    def close(self) -> None:
        """Close the descriptor and let the mapping go."""
        if self._bytes is not None:
            self._bytes = self._mapping = None
            os.close(self._fd)


def create_memory(nbytes: int, location: Location = Location.DEVICE) -> SharedMemory:
    """Make zeroed shared memory without a name; CapacityError where it does not fit."""
    assert nbytes > 0, "memory has at least one byte"
    fd = os.memfd_create("dejavu", os.MFD_CLOEXEC)
    try:
        os.ftruncate(fd, nbytes)
    except OSError as error:
        os.close(fd)
        raise CapacityError(f"cannot make {nbytes} bytes of shared memory ({error}): ask for less") from error
    return SharedMemory(fd, nbytes, location)


def map_fd(fd: int, nbytes: int, location: Location = Location.DEVICE) -> SharedMemory:
    """Map `nbytes` of another process's memfd; `fd` stays the caller's."""
    held = os.fstat(fd).st_size
    if held < nbytes:
        raise DeviceError(f"a descriptor of {held} bytes cannot be mapped as {nbytes} bytes: give the exporter's size")
    return SharedMemory(os.dup(fd), nbytes, location)


def open_handle(handle: bytes, nbytes: int | None = None) -> SharedMemory:
    """Map the memory that a handle names, through /proc; the size is the exporter's where none is given."""
    magic, process, number, whole, device, inode = _HANDLE.unpack(handle[: _HANDLE.size])
    if magic != _MAGIC:
        raise DeviceError("these 64 bytes are no handle of a CPU device: both sides must use the same device kind")
    fd = _open_of(process, number)
    status = os.fstat(fd)
    if (status.st_dev, status.st_ino) != (device, inode):
        os.close(fd)
        raise DeviceError(f"process {process} has closed the memory that this handle names: ask it for a new handle")
    return SharedMemory(fd, whole if nbytes is None else nbytes, Location.DEVICE)


def _open_of(process: int, number: int) -> int:
    try:
        return os.open(f"/proc/{process}/fd/{number}", os.O_RDWR | os.O_CLOEXEC)
    except OSError as error:
        raise DeviceError(
            f"cannot open memory of process {process} ({error.strerror}): it must live, on this host, as this user"
        ) from error


class BorrowedMemory(Memory):
    """Refer to the memory of a CPU tensor, which is kept alive."""

    __slots__ = ("_tensor",)

    def __init__(self, tensor: "torch.Tensor") -> None:
        import torch

        assert tensor.device.type == "cpu"
        assert tensor.is_contiguous()
        self._tensor: torch.Tensor | None = tensor.view(-1).view(torch.uint8)
        super().__init__(tensor.data_ptr(), self._tensor.numel(), Location.HOST)

    def tensor(self, address: int, nbytes: int) -> "torch.Tensor":
        """Give a part of the tensor."""
        assert self._tensor is not None, "the memory was closed"
        return self._tensor[address - self.address :][:nbytes]

    @property
    def held(self) -> object:
        """Give the tensor."""
        return self._tensor

    def export_fd(self) -> int:
        """Refuse: the memory was made elsewhere."""
        raise DeviceError("registered memory cannot be exported: allocate it with allocate_host_exportable")

    def ipc_handle(self) -> bytes:
        """Refuse: the memory was made elsewhere."""
        raise DeviceError("registered memory has no handle: allocate it with allocate_host_exportable")

    def close(self) -> None:
        """Let the tensor go."""
        self._tensor = None
