"""The devices: streams, events and memory, with one interface and a backend for CPU and CUDA.

Each name is imported with its first use, so that the keeper, which is as small as can be, shares this package.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any, Literal

if TYPE_CHECKING:
    from dejavu.device.base import (
        DEFAULT_DEADLINE_S,
        FLAG_BYTES,
        IPC_HANDLE_BYTES,
        Buffer,
        Device,
        DeviceError,
        DeviceProperties,
        Event,
        Graph,
        Location,
        Stream,
    )
    from dejavu.device.pieces import Pieces, make_pieces, pieces_from

__all__ = [
    "DEFAULT_DEADLINE_S",
    "FLAG_BYTES",
    "IPC_HANDLE_BYTES",
    "Buffer",
    "Device",
    "DeviceError",
    "DeviceProperties",
    "Event",
    "Graph",
    "Location",
    "Pieces",
    "Stream",
    "cuda_device_bytes",
    "cuda_device_name",
    "make_pieces",
    "num_cuda_devices",
    "open_device",
    "pieces_from",
    "why_no_cuda",
]

_PIECES = ("Pieces", "make_pieces", "pieces_from")


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{'pieces' if name in _PIECES else 'base'}"), name)


def open_device(kind: Literal["cpu", "cuda", "auto"] = "auto", index: int = 0) -> "Device":
    """Open a device; "auto" takes CUDA where a device is usable, and the CPU elsewhere.

    DeviceError where "cuda" was asked for by name and cannot be had: says what is missing.
    """
    assert kind in ("cpu", "cuda", "auto"), kind
    if kind == "cuda" or (kind == "auto" and num_cuda_devices() > 0):
        return _open_cuda(index)
    from dejavu.device.cpu import CpuDevice

    return CpuDevice()


def _open_cuda(index: int) -> "Device":
    from dejavu.device.base import DeviceError
    from dejavu.device.cuda_driver import missing

    reason = missing()
    if reason is not None:
        raise DeviceError(f"device cuda:{index} cannot be used: {reason}")
    if not 0 <= index < num_cuda_devices():
        raise DeviceError(
            f"device cuda:{index} does not exist: this process sees {num_cuda_devices()}, see CUDA_VISIBLE_DEVICES"
        )
    from dejavu.device.cuda import CudaDevice

    return CudaDevice(index)


def num_cuda_devices() -> int:
    """Give the number of CUDA devices that this process sees; 0 without cuda-python or without a driver."""
    from dejavu.device.cuda_driver import missing

    if missing() is not None:
        return 0
    from dejavu.device.cuda_driver import count_devices

    return count_devices()


def why_no_cuda() -> str:
    """Say why there is no CUDA device."""
    from dejavu.device.cuda_driver import missing

    return missing() or "the driver shows no device, see CUDA_VISIBLE_DEVICES"


def cuda_device_bytes(index: int) -> int:
    """Give the memory of a CUDA device that is there; its context is not made."""
    from dejavu.device.cuda_driver import device_bytes

    return device_bytes(index)


def cuda_device_name(index: int) -> str:
    """Give the product name of a CUDA device that is there; its context is not made."""
    from dejavu.device.cuda_driver import device_name

    return device_name(index)
