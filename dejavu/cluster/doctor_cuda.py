"""The doctor's checks of accelerators, all through the device layer."""

import importlib.util
import os
from importlib import metadata
from pathlib import Path

from dejavu.cluster.doctor import Check, NotApplicable, gib
from dejavu.device import Device, num_cuda_devices, open_device

NO_DEVICE = "no CUDA device"
TRIAL_BYTES = 2 * 2**20
BANDWIDTH_BYTES = 256 * 2**20
REPEATS = 5


def find_accelerators() -> str:
    """Name the CUDA devices and their memory."""
    if num_cuda_devices() == 0:
        from dejavu.device.cuda_driver import missing

        if Path("/dev/nvidiactl").exists():
            raise RuntimeError(missing() or NO_DEVICE)
        raise NotApplicable(NO_DEVICE)
    return "; ".join(describe(index) for index in range(num_cuda_devices()))


def describe(index: int) -> str:
    """Name one device, its architecture and its memory."""
    with open_device("cuda", index) as device:
        found = device.properties
        return f"{found.name} ({found.architecture}), {gib(device.free_bytes())} free of {gib(found.total_bytes)}"


def need_devices(count: int = 1) -> int:
    """Give the number of devices; NotApplicable where they are fewer than `count`."""
    found = num_cuda_devices()
    if found < count:
        raise NotApplicable(NO_DEVICE if found == 0 else f"needs {count} devices, and there is {found}")
    return found


def find_peer_access() -> str:
    """Say which pairs of devices reach each other's memory."""
    count = need_devices(2)
    pairs = [(a, b) for a in range(count) for b in range(count) if a != b]
    blocked = [f"{a} to {b}" for a, b in pairs if not can_access(a, b)]
    if blocked:
        raise RuntimeError(f"not from {', '.join(blocked)}")
    return f"every pair of {count} devices"


def can_access(index: int, peer: int) -> bool:
    """Tell whether one device reads and writes another's memory."""
    with open_device("cuda", index) as device:
        return device.can_access(peer)


def find_ipc() -> str:
    """Share device memory by a handle and by a file descriptor, and read the second back."""
    need_devices()
    with open_device("cuda") as device, device.create_stream() as stream, device.allocate(TRIAL_BYTES) as plain:
        plain.ipc_handle()
        with device.allocate_exportable(TRIAL_BYTES) as memory:
            device.fill(memory, 0x5A, stream=stream)
            stream.synchronize()
            if not read_back(device, memory.export_fd()):
                raise RuntimeError("memory that was shared by a file descriptor has other contents")
    return "handles and file descriptors"


def read_back(device: Device, fd: int) -> bool:
    """Map memory by its file descriptor and tell whether the fill is there."""
    try:
        with device.import_fd(fd, TRIAL_BYTES) as mapped:
            return bool((mapped.tensor() == 0x5A).all())
    finally:
        os.close(fd)


def find_pinned_bandwidth() -> str:
    """Measure copies between a device and pinned host memory, each way."""
    need_devices()
    with (
        open_device("cuda") as device,
        device.allocate(BANDWIDTH_BYTES) as memory,
        device.allocate_host(BANDWIDTH_BYTES) as host,
    ):
        out, back = measure(device, host, memory), measure(device, memory, host)
    return f"{out:.1f} GB/s to the host, {back:.1f} GB/s from it"


def measure(device: Device, target: object, source: object) -> float:
    """Give the best bandwidth of a few copies, in GB/s."""
    best_ms = float("inf")
    with device.create_stream() as stream:
        for _ in range(REPEATS):
            start, end = device.create_event(timing=True), device.create_event(timing=True)
            start.record(stream)
            device.copy(target, source, stream=stream)  # type: ignore[arg-type]
            end.record(stream)
            end.synchronize()
            best_ms = min(best_ms, end.elapsed_ms(start))
    return BANDWIDTH_BYTES / best_ms / 1e6


def find_nccl() -> str:
    """Give the versions of nccl4py and of the NCCL library that it loads."""
    need_devices()
    if importlib.util.find_spec("nccl") is None:
        raise RuntimeError("the package nccl4py is not installed")
    from nccl import core

    return f"NCCL {core.get_version().libnccl.version}, nccl4py {metadata.version('nccl4py')}"


CUDA_CHECKS: list[Check] = [
    ("accelerators", find_accelerators, "pip install 'dejavu-serve[cuda]', and an NVIDIA driver"),
    ("peer access", find_peer_access, "KV then moves through the host: look at `nvidia-smi topo -m`"),
    ("memory sharing", find_ipc, "KV then moves through the host: containers need --ipc=host"),
    ("pinned copies", find_pinned_bandwidth, "raise the limit of locked memory: `ulimit -l unlimited`"),
    ("NCCL", find_nccl, "pip install 'dejavu-serve[cuda]'"),
]
