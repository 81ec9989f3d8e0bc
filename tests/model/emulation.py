"""Compile the kernels for the CPU (emulation.hpp), and launch them as the device layer launches the real ones."""

import ctypes
import hashlib
import struct
import subprocess
import tempfile
from functools import cache
from pathlib import Path

KERNELS = Path(__file__).parents[2] / "kernels"
COMPILER = "g++"


class EmulatedModule:
    """Stand in for KernelModule; takes the folder for compiled code."""

    def __init__(self, folder, name, definitions):
        lines = "".join(f"#define {key} {value}\n" for key, value in definitions.items())
        here = Path(__file__).with_name("emulation.hpp").read_text()
        texts = [(KERNELS / file).read_text() for file in ("element.cuh", f"{name}.cu")]
        self.folder, self.source, self.functions = folder, lines + here + "\n".join(texts), []

    def kernel(self, function, most_shared_bytes=0):
        self.functions.append(function)
        return EmulatedKernel(self, function, most_shared_bytes)


class EmulatedKernel:
    def __init__(self, module, function, most_shared_bytes):
        self.module, self.function, self.most_shared_bytes = module, function, most_shared_bytes

    def launch(self, grid, num_threads, arguments, *, stream, shared_bytes=0, overlaps=False, cluster=1):
        assert shared_bytes <= self.most_shared_bytes
        words = (ctypes.c_uint64 * len(arguments))(*[_word(argument) for argument in arguments])
        start = ctypes.addressof(words)
        pointers = (ctypes.c_void_p * len(arguments))(*[start + 8 * i for i in range(len(arguments))])
        code = _compile(self.module.folder, self.module.source, tuple(self.module.functions))
        getattr(code, f"launch_{self.function}")(pointers, *grid, cluster, num_threads, shared_bytes)


def _word(argument):
    if argument is None:
        return 0
    if isinstance(argument, int):
        return argument & 0xFFFFFFFFFFFFFFFF
    if isinstance(argument, float):
        return int.from_bytes(struct.pack("<f", argument), "little")
    assert argument.device.type == "cpu"
    return argument.data_ptr()


@cache
def _compile(folder, source, functions):
    source += "".join(f"\nEMULATE({function})" for function in functions) + "\n"
    path = Path(folder) / hashlib.sha256(source.encode()).hexdigest()[:16]
    with tempfile.NamedTemporaryFile("w", suffix=".cpp", dir=folder) as file:
        file.write(source)
        file.flush()
        command = [COMPILER, "-std=c++17", "-O1", "-shared", "-fPIC", "-w", "-o", str(path), file.name]
        subprocess.run(command, check=True, timeout=100)
    return ctypes.CDLL(str(path))
