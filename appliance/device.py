"""What this machine is: cores by cgroup and affinity, memory, disk. No torch import.

ggml and torch take their thread count from the host's cores and ignore a container's quota, which costs up to 45 times
(ollama#17916); so every part of the appliance asks here.
"""

import os
from pathlib import Path

CGROUP = Path("/sys/fs/cgroup")


def usable_cores(cgroup: Path = CGROUP) -> int:
    """Cores this process may use: its affinity mask, limited by the cgroup's quota rounded down; at least 1."""
    cores = len(os.sched_getaffinity(0))
    quota = _cgroup_quota(cgroup)
    return max(1, min(cores, int(quota)) if quota is not None else cores)


def memory_total_bytes(cgroup: Path = CGROUP) -> int:
    """Memory of the machine, or of the cgroup when that is less."""
    total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    for name in ("memory.max", "memory/memory.limit_in_bytes"):
        text = _read(cgroup / name)
        if text is not None and text.isdigit():
            return min(total, int(text))
    return total


def memory_available_bytes() -> int:
    """What the kernel says can be had without swapping (`MemAvailable`)."""
    for line in Path("/proc/meminfo").read_text().splitlines():
        if line.startswith("MemAvailable:"):
            return int(line.split()[1]) * 1024
    return memory_total_bytes()


def _cgroup_quota(cgroup: Path) -> float | None:
    """Cores allowed by cgroup v2 `cpu.max` or v1 `cpu.cfs_quota_us`; None when unlimited."""
    if (text := _read(cgroup / "cpu.max")) is not None:
        quota, period = text.split()
        return None if quota == "max" else int(quota) / int(period)
    quota_us, period_us = _read(cgroup / "cpu/cpu.cfs_quota_us"), _read(cgroup / "cpu/cpu.cfs_period_us")
    if quota_us is None or period_us is None or int(quota_us) <= 0:
        return None
    return int(quota_us) / int(period_us)


def _read(path: Path) -> str | None:
    try:
        return path.read_text().strip()
    except (FileNotFoundError, PermissionError, NotADirectoryError):
        return None
