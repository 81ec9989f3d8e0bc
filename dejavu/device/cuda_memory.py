"""Memory of the CUDA device: plain, exportable, imported, opened, and pinned host memory.

Each class is made and closed with the device's context current in the calling thread.
"""

import ctypes
from abc import abstractmethod
from typing import TYPE_CHECKING, Any

from cuda.bindings import driver

from dejavu.device.base import IPC_HANDLE_BYTES, DeviceError, Location, Memory
from dejavu.device.cpu_memory import BorrowedMemory, SharedMemory
from dejavu.device.cuda_driver import call

if TYPE_CHECKING:
    import torch


class CudaMemory(Memory):
    """Hold what all CUDA memory shares: the tensor, and refusals for what only some kinds can do."""

    __slots__ = ("_device", "_open")

    def __init__(self, address: int, nbytes: int, location: Location, device: int = 0) -> None:
        """`device` is the one that device memory is mapped for."""
        super().__init__(address, nbytes, location)
        self._device = device
        self._open = True

    def tensor(self, address: int, nbytes: int) -> "torch.Tensor":
        """Give a tensor on the device that the memory is mapped for: only its kernels may touch imported memory."""
        import torch

        assert self._open, "the memory was closed"
        # torch is told the device: the driver would give the one where the memory lies, which may not even map it here.
        device = torch.device("cuda", self._device)
        storage = torch._C._construct_storage_from_data_pointer(address, device, nbytes)
        return torch.empty(0, dtype=torch.uint8, device=device).set_(storage)

    def export_fd(self) -> int:
        """Refuse: this memory was made without a descriptor."""
        raise DeviceError("this memory cannot be exported: allocate it with allocate_exportable")

    def ipc_handle(self) -> bytes:
        """Refuse: this kind of memory has none."""
        raise DeviceError("this memory has no 64-byte handle: allocate it with allocate, or pass its descriptor")

    def close(self) -> None:
        """Free or unmap, once."""
        if self._open:
            self._open = False
            self._release()

    @abstractmethod
    def _release(self) -> None:
        """Free or unmap."""


class PlainMemory(CudaMemory):
    """Own a plain allocation."""

    __slots__ = ()

    def __init__(self, nbytes: int, device: int) -> None:
        super().__init__(int(call(driver.cuMemAlloc, nbytes)), nbytes, Location.DEVICE, device)

    def ipc_handle(self) -> bytes:
        """Give the driver's handle."""
        handle = call(driver.cuIpcGetMemHandle, self.address)
        return ctypes.string_at(int(handle.getPtr()), IPC_HANDLE_BYTES)

    def _release(self) -> None:
        call(driver.cuMemFree, self.address)


class OpenedMemory(CudaMemory):
    """Map another process's plain allocation."""

    __slots__ = ()

    def __init__(self, handle: bytes, nbytes: int, device: int) -> None:
        assert len(handle) == IPC_HANDLE_BYTES
        opaque = driver.CUipcMemHandle()
        ctypes.memmove(int(opaque.getPtr()), handle, IPC_HANDLE_BYTES)
        flags = driver.CUipcMem_flags.CU_IPC_MEM_LAZY_ENABLE_PEER_ACCESS
        super().__init__(int(call(driver.cuIpcOpenMemHandle, opaque, flags.value)), nbytes, Location.DEVICE, device)

    def _release(self) -> None:
        call(driver.cuIpcCloseMemHandle, self.address)


class ExportableMemory(CudaMemory):
    """Map a physical allocation of the virtual-memory API, made here or imported from a descriptor."""

    __slots__ = ("_handle", "_mapped_bytes")

    def __init__(self, handle: Any, nbytes: int, mapped_bytes: int, device: int) -> None:
        """Take over the handle and map it for `device`."""
        self._handle = handle
        self._mapped_bytes = mapped_bytes
        super().__init__(_map(handle, mapped_bytes, device), nbytes, Location.DEVICE, device)

    def export_fd(self) -> int:
        """Export a new descriptor."""
        kind = driver.CUmemAllocationHandleType.CU_MEM_HANDLE_TYPE_POSIX_FILE_DESCRIPTOR
        return int(call(driver.cuMemExportToShareableHandle, self._handle, kind, 0))

    def _release(self) -> None:
        call(driver.cuMemUnmap, self.address, self._mapped_bytes)
        call(driver.cuMemAddressFree, self.address, self._mapped_bytes)
        call(driver.cuMemRelease, self._handle)


def create_exportable(nbytes: int, device: int) -> ExportableMemory:
    """Make physical memory on `device` that can be exported, and map it."""
    properties, mapped_bytes = _exportable(nbytes, device)
    return ExportableMemory(call(driver.cuMemCreate, mapped_bytes, properties, 0), nbytes, mapped_bytes, device)


def import_exportable(fd: int, nbytes: int, device: int) -> ExportableMemory:
    """Map what a descriptor refers to, for `device`; the memory may lie on another one."""
    _, mapped_bytes = _exportable(nbytes, device)
    kind = driver.CUmemAllocationHandleType.CU_MEM_HANDLE_TYPE_POSIX_FILE_DESCRIPTOR
    return ExportableMemory(call(driver.cuMemImportFromShareableHandle, fd, kind), nbytes, mapped_bytes, device)


def _exportable(nbytes: int, device: int) -> tuple[Any, int]:
    """Give the properties of exportable memory, and `nbytes` rounded up to what can be mapped."""
    properties = driver.CUmemAllocationProp()
    properties.type = driver.CUmemAllocationType.CU_MEM_ALLOCATION_TYPE_PINNED
    properties.location.type = driver.CUmemLocationType.CU_MEM_LOCATION_TYPE_DEVICE
    properties.location.id = device
    properties.requestedHandleTypes = driver.CUmemAllocationHandleType.CU_MEM_HANDLE_TYPE_POSIX_FILE_DESCRIPTOR
    kind = driver.CUmemAllocationGranularity_flags.CU_MEM_ALLOC_GRANULARITY_RECOMMENDED
    granularity = int(call(driver.cuMemGetAllocationGranularity, properties, kind))
    return properties, -(-nbytes // granularity) * granularity


def _map(handle: Any, mapped_bytes: int, device: int) -> int:
    """Give the address at which `device` may read and write the allocation; undoes what it did where a step fails."""
    address, mapped = 0, False
    try:
        address = int(call(driver.cuMemAddressReserve, mapped_bytes, 0, 0, 0))
        call(driver.cuMemMap, address, mapped_bytes, 0, handle, 0)
        mapped = True
        call(driver.cuMemSetAccess, address, mapped_bytes, [_access(device)], 1)
    except Exception:
        if mapped:
            call(driver.cuMemUnmap, address, mapped_bytes)
        if address:
            call(driver.cuMemAddressFree, address, mapped_bytes)
        call(driver.cuMemRelease, handle)
        raise
    return address


def _access(device: int) -> Any:
    access = driver.CUmemAccessDesc()
    access.location.type = driver.CUmemLocationType.CU_MEM_LOCATION_TYPE_DEVICE
    access.location.id = device
    access.flags = driver.CUmemAccess_flags.CU_MEM_ACCESS_FLAGS_PROT_READWRITE
    return access


class PinnedMemory(CudaMemory):
    """Own pinned host memory."""

    __slots__ = ()

    def __init__(self, nbytes: int) -> None:
        super().__init__(
            int(call(driver.cuMemHostAlloc, nbytes, driver.CU_MEMHOSTALLOC_PORTABLE)), nbytes, Location.HOST
        )

    def tensor(self, address: int, nbytes: int) -> "torch.Tensor":
        """Give a CPU tensor; it is valid until close."""
        import torch

        assert self._open, "the memory was closed"
        return torch.frombuffer((ctypes.c_uint8 * nbytes).from_address(address), dtype=torch.uint8)

    def _release(self) -> None:
        call(driver.cuMemFreeHost, self.address)


class RegisteredMemory(CudaMemory):
    """Pin host memory that was made elsewhere: a memfd, or a tensor's; closing unpins it and closes its owner."""

    __slots__ = ("_inner",)

    def __init__(self, inner: SharedMemory | BorrowedMemory) -> None:
        self._inner = inner
        try:
            call(driver.cuMemHostRegister, inner.address, inner.nbytes, driver.CU_MEMHOSTREGISTER_PORTABLE)
        except Exception:
            inner.close()
            raise
        super().__init__(inner.address, inner.nbytes, Location.HOST)
        device_address = int(call(driver.cuMemHostGetDevicePointer, inner.address, 0))
        assert device_address == inner.address, "this device needs other addresses for registered memory"

    def tensor(self, address: int, nbytes: int) -> "torch.Tensor":
        """Give a CPU tensor."""
        assert self._open, "the memory was closed"
        return self._inner.tensor(address, nbytes)

    def export_fd(self) -> int:
        """Give the memfd's descriptor, where it is one."""
        return self._inner.export_fd()

    def _release(self) -> None:
        call(driver.cuMemHostUnregister, self.address)
        self._inner.close()
