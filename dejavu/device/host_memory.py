"""How much memory the host still has for this process: what the kernel calls available, within the control group."""

from pathlib import Path

from dejavu.device.base import DeviceError

UNLIMITED = 1 << 62  # version 1 of control groups writes a number about this large for no limit


def meminfo(key: str) -> int:
    """Give an entry of /proc/meminfo, in bytes."""
    with open("/proc/meminfo") as lines:
        for line in lines:
            if line.startswith(key + ":"):
                return int(line.split()[1]) * 1024
    raise DeviceError(f"/proc/meminfo has no {key}: this program needs Linux with /proc mounted")


def available_bytes(root: Path = Path("/sys/fs/cgroup"), own: Path = Path("/proc/self/cgroup")) -> int:
    """Give the bytes that can still be taken: the host's, or what the tightest control group leaves."""
    return min([meminfo("MemAvailable"), *(headroom(group) for group in control_groups(root, own))])


def control_groups(root: Path, own: Path) -> list[Path]:
    """Give the directories of this process's memory control group and of those above it, as far as they are seen."""
    groups = []
    for line in own.read_text().splitlines() if own.exists() else ():
        _, controllers, path = line.split(":", 2)
        if controllers in ("", "memory"):
            top = root / controllers
            inner = top / path.lstrip("/")
            groups += [group for group in (inner, *inner.parents) if group.is_relative_to(top)]
    return groups


def headroom(group: Path) -> int:
    """Give what a control group leaves, counting files that were read lately as free; no limit where it has none."""
    for limit, usage in (("memory.max", "memory.current"), ("memory.limit_in_bytes", "memory.usage_in_bytes")):
        if (group / limit).exists() and (most := (group / limit).read_text().strip()) != "max":
            taken = int((group / usage).read_text()) - inactive_files(group / "memory.stat")
            return max(0, int(most) - taken)
    return UNLIMITED


def inactive_files(stat: Path) -> int:
    """Give the bytes of files that the kernel may drop."""
    for line in stat.read_text().splitlines() if stat.exists() else ():
        if line.split()[0] in ("inactive_file", "total_inactive_file"):
            return int(line.split()[1])
    return 0
