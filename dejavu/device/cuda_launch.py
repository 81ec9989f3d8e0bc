"""Launch kernels of `kernels/` on a stream: compiled for given definitions, with arguments checked by nobody."""

from __future__ import annotations

import ctypes
import struct
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from cuda.bindings import driver

from dejavu.assets import data_path
from dejavu.device.cuda_driver import call
from dejavu.device.cuda_kernels import load_module

if TYPE_CHECKING:
    from torch import Tensor

_WORD = ctypes.sizeof(ctypes.c_uint64)
_PLAIN_SHARED_BYTES = 48 * 1024  # more has to be asked for


class KernelModule:
    """Hold the kernels of `kernels/element.cuh` and `kernels/<name>.cu`, compiled together, in the current context."""

    def __init__(self, name: str, architecture: str, definitions: Mapping[str, object]) -> None:
        """Compile for `architecture` (such as sm_90) unless the cache has it; `definitions` become `#define` lines."""
        lines = "".join(f"#define {key} {value}\n" for key, value in definitions.items())
        texts = [data_path("kernels", file).read_text() for file in ("element.cuh", f"{name}.cu")]
        self._module = load_module(name, lines + "\n".join(texts), architecture)

    def kernel(self, function: str, most_shared_bytes: int = 0) -> Kernel:
        """Give a kernel, which may take up to `most_shared_bytes` of dynamic shared memory."""
        return Kernel(call(driver.cuModuleGetFunction, self._module, function.encode()), most_shared_bytes)


class Kernel:
    """Launch one function. Every kernel of `kernels/` that this launches waits for those before it by itself."""

    __slots__ = ("_function",)

    def __init__(self, function: Any, most_shared_bytes: int) -> None:
        self._function = function
        if most_shared_bytes > _PLAIN_SHARED_BYTES:
            attribute = driver.CUfunction_attribute.CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES
            call(driver.cuFuncSetAttribute, function, attribute, most_shared_bytes)

    def launch(
        self,
        grid: tuple[int, int],
        num_threads: int,
        arguments: Sequence[Tensor | float | None],
        *,
        stream: int,
        shared_bytes: int = 0,
        overlaps: bool = False,
        cluster: int = 1,
    ) -> None:
        """Queue a launch: tensors go as addresses, None as a null pointer, int and float as 4 bytes.

        With `overlaps` the kernel may begin before the one in front of it has ended (programmatic dependent launch);
        `cluster` blocks, neighbours in the grid's second dimension, share a cluster.
        """
        words = (ctypes.c_uint64 * len(arguments))(*[_word(argument) for argument in arguments])
        start = ctypes.addressof(words)
        pointers = (ctypes.c_void_p * len(arguments))(*[start + i * _WORD for i in range(len(arguments))])
        address = ctypes.addressof(pointers)
        size = (*grid, 1, num_threads, 1, 1, shared_bytes)
        if overlaps or cluster > 1:
            attributes = ([_overlap()] if overlaps else []) + ([_cluster(cluster)] if cluster > 1 else [])
            call(driver.cuLaunchKernelEx, _config(size, stream, attributes), self._function, address, 0)
        else:
            call(driver.cuLaunchKernel, self._function, *size, stream, address, 0)


def _word(argument: Tensor | float | None) -> int:
    if argument is None:
        return 0
    if isinstance(argument, int):
        return argument & 0xFFFFFFFFFFFFFFFF
    if isinstance(argument, float):
        return int.from_bytes(struct.pack("<f", argument), "little")
    return int(argument.data_ptr())


def _config(size: tuple[int, ...], stream: int, attributes: list[Any]) -> Any:
    config = driver.CUlaunchConfig()
    config.gridDimX, config.gridDimY, config.gridDimZ = size[:3]
    config.blockDimX, config.blockDimY, config.blockDimZ, config.sharedMemBytes = size[3:]
    config.hStream = driver.CUstream(stream)
    config.attrs = attributes
    config.numAttrs = len(attributes)
    return config


def _overlap() -> Any:
    attribute, value = driver.CUlaunchAttribute(), driver.CUlaunchAttributeValue()
    value.programmaticStreamSerializationAllowed = 1
    attribute.id = driver.CUlaunchAttributeID.CU_LAUNCH_ATTRIBUTE_PROGRAMMATIC_STREAM_SERIALIZATION
    attribute.value = value
    return attribute


def _cluster(num_blocks: int) -> Any:
    attribute, value = driver.CUlaunchAttribute(), driver.CUlaunchAttributeValue()
    value.clusterDim.x, value.clusterDim.y, value.clusterDim.z = 1, num_blocks, 1
    attribute.id = driver.CUlaunchAttributeID.CU_LAUNCH_ATTRIBUTE_CLUSTER_DIMENSION
    attribute.value = value
    return attribute
