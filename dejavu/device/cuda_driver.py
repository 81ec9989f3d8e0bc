"""The door to the CUDA driver: calls whose error codes become exceptions."""

import ctypes
import importlib.util
import os
from collections.abc import Callable
from functools import cache
from typing import Any

from dejavu.device.base import DeviceError
from dejavu.errors import CapacityError


@cache
def missing() -> str | None:
    """Say what keeps this process from using CUDA, or None."""
    if importlib.util.find_spec("cuda") is None or importlib.util.find_spec("cuda.bindings") is None:
        return "the package cuda-python is not installed: pip install 'dejavu-serve[cuda]'"
    try:
        ctypes.CDLL("libcuda.so.1")
    except OSError as error:
        return f"the NVIDIA driver is not installed ({error})"
    from cuda.bindings import driver

    # Streams that share a hardware queue with one that waits for a flag would wait too. The default is 8 queues; the
    # driver reads the number once, when it starts.
    os.environ.setdefault("CUDA_DEVICE_MAX_CONNECTIONS", "32")
    code = driver.cuInit(0)[0]
    return None if code == driver.CUresult.CUDA_SUCCESS else f"cuInit says {describe(code)}"


def count_devices() -> int:
    """Give the number of devices that this process sees."""
    from cuda.bindings import driver

    return int(call(driver.cuDeviceGetCount))


def device_bytes(index: int) -> int:
    """Give the memory of a device."""
    from cuda.bindings import driver

    return int(call(driver.cuDeviceTotalMem, call(driver.cuDeviceGet, index)))


def device_name(index: int) -> str:
    """Give the product name of a device."""
    from cuda.bindings import driver

    name: bytes = call(driver.cuDeviceGetName, 256, call(driver.cuDeviceGet, index))
    return name.split(b"\0", 1)[0].decode()


def call(function: Callable[..., tuple[Any, ...]], *arguments: object) -> Any:
    """Call a driver function and give what it returns beside the code: nothing, one value, or a tuple.

    DeviceError where the code is not success, CapacityError where memory was the reason; both name the call.
    """
    code, *values = function(*arguments)
    check(function.__name__, code)
    if not values:
        return None
    return values[0] if len(values) == 1 else tuple(values)


def check(name: str, code: Any) -> None:
    """Raise what `call` would, for a code that the function `name` returned."""
    if code != 0:
        raise _error(name, code)


def describe(code: Any) -> str:
    """Give a code's name and the driver's words for it."""
    from cuda.bindings import driver

    _, words = driver.cuGetErrorString(code)
    meaning = words.decode() if words else "unknown"
    return f"{getattr(code, 'name', code)} ({meaning})"


def _error(name: str, code: Any) -> Exception:
    from cuda.bindings import driver

    message = f"{name} failed with {describe(code)}"
    if code == driver.CUresult.CUDA_ERROR_OUT_OF_MEMORY:
        return CapacityError(f"{message}: ask for less memory, or free what other processes hold on this device")
    return DeviceError(message)
