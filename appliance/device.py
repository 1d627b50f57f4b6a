"""What this machine is: cores by cgroup and affinity, memory, what its CPU can do. No torch import.

ggml and torch take their thread count from the host's cores and ignore a container's quota, which costs up to 45 times
(ollama#17916); so every part of the appliance asks here. GPUs are in `gpu.py`.
"""

import dataclasses
import os
from collections.abc import Iterator
from pathlib import Path

CGROUP = Path("/sys/fs/cgroup")
CPUS = Path("/sys/devices/system/cpu")
PROC = Path("/proc")


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Machine:
    """The facts that decide how a model is run; `memory_total_bytes` is the cgroup's limit where that is less."""

    usable_cores: int
    physical_cores: int
    memory_total_bytes: int
    memory_available_bytes: int
    cpu_features: frozenset[str] = frozenset()


def machine() -> Machine:
    return Machine(
        usable_cores=usable_cores(),
        physical_cores=physical_cores(),
        memory_total_bytes=memory_total_bytes(),
        memory_available_bytes=memory_available_bytes(),
        cpu_features=cpu_features(),
    )


def usable_cores(cgroup: Path = CGROUP, proc: Path = PROC) -> int:
    """Cores this process may use: its affinity mask, limited by the cgroup's quota rounded down; at least 1."""
    return _within_quota(len(os.sched_getaffinity(0)), cgroup, proc)


def physical_cores(cgroup: Path = CGROUP, cpus: Path = CPUS, proc: Path = PROC) -> int:
    """The same, where hardware threads of one core count once: they share what decoding needs."""
    siblings = {read_text(cpus / f"cpu{cpu}/topology/thread_siblings_list") or str(cpu) for cpu in os.sched_getaffinity(0)}
    return _within_quota(len(siblings), cgroup, proc)


def memory_total_bytes(cgroup: Path = CGROUP, proc: Path = PROC) -> int:
    """Memory of the machine, or of the cgroup when that is less."""
    total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return min([total, *(limit for limit, _ in _memory_limits(cgroup, proc))])


def memory_available_bytes(cgroup: Path = CGROUP, proc: Path = PROC) -> int:
    """What can be had without swapping: the kernel's `MemAvailable`, or what the cgroup's limit leaves when that is less.

    File pages that can be dropped count as available, in both.
    """
    available = memory_total_bytes(cgroup, proc)
    for line in (read_text(proc / "meminfo") or "").splitlines():
        if line.startswith("MemAvailable:"):
            available = min(available, int(line.split()[1]) * 1024)
    for limit, used in _memory_limits(cgroup, proc):
        available = min(available, limit - used)
    return max(0, available)


def cpu_features(proc: Path = PROC) -> frozenset[str]:
    """What the kernel says that every core can do: `flags` on x86, `Features` on ARM; empty elsewhere."""
    found: frozenset[str] | None = None
    for line in (read_text(proc / "cpuinfo") or "").splitlines():
        name, _, value = line.partition(":")
        if name.strip() in ("flags", "Features"):
            found = frozenset(value.split()) if found is None else found & frozenset(value.split())
    return found or frozenset()


def cgroup_folders(controller: str, cgroup: Path = CGROUP, proc: Path = PROC) -> Iterator[Path]:
    """The folders that bind this process for a controller, from its own cgroup up to the root: any may set a limit.

    Both versions: one tree for all controllers (2), or one per controller (1).
    """
    for line in (read_text(proc / "self/cgroup") or "0::/").splitlines():
        _, names, path = line.split(":", 2)
        if names and controller not in names.split(","):
            continue
        root = cgroup / controller if names else cgroup
        own = root / path.lstrip("/")
        if ".." in own.parts or not own.is_dir():  # inside a container the path may be the host's
            own = root
        yield own
        yield from (parent for parent in own.parents if parent == root or root in parent.parents)


def _within_quota(cores: int, cgroup: Path, proc: Path) -> int:
    quotas = [quota for folder in _cpu_folders(cgroup, proc) if (quota := _cgroup_quota(folder)) is not None]
    return max(1, min([cores, *(int(quota) for quota in quotas)]))


def _cpu_folders(cgroup: Path, proc: Path) -> Iterator[Path]:
    yield cgroup / "cpu"
    yield cgroup
    yield from cgroup_folders("cpu", cgroup, proc)


def _cgroup_quota(folder: Path) -> float | None:
    """Cores allowed by cgroup v2 `cpu.max` or v1 `cpu.cfs_quota_us`; None when unlimited."""
    if (text := read_text(folder / "cpu.max")) is not None:
        quota, period = text.split()
        return None if quota == "max" else int(quota) / int(period)
    quota_us, period_us = read_text(folder / "cpu.cfs_quota_us"), read_text(folder / "cpu.cfs_period_us")
    if quota_us is None or period_us is None or int(quota_us) <= 0:
        return None
    return int(quota_us) / int(period_us)


def _memory_limits(cgroup: Path, proc: Path) -> Iterator[tuple[int, int]]:
    """Each limit that binds, and what is used of it without file pages that can be dropped."""
    for folder in (cgroup, cgroup / "memory", *cgroup_folders("memory", cgroup, proc)):
        for limit_name, usage_name, prefix in (
            ("memory.max", "memory.current", ""),
            ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_"),
        ):
            limit = read_text(folder / limit_name)
            if limit is not None and limit.isdigit():
                used = int(read_text(folder / usage_name) or 0) - _droppable_bytes(folder, prefix)
                yield int(limit), max(0, used)


def _droppable_bytes(folder: Path, prefix: str) -> int:
    names = (f"{prefix}inactive_file", f"{prefix}active_file")
    lines = (line.split() for line in (read_text(folder / "memory.stat") or "").splitlines())
    return sum(int(fields[1]) for fields in lines if len(fields) == 2 and fields[0] in names)


def read_text(path: Path) -> str | None:
    """A small file of /proc or /sys; None when the kernel does not say.

    They fail in many ways: sensors that sleep, cards that vanish, processes that have ended, features that are missing.
    """
    try:
        return path.read_text(errors="replace").strip()
    except OSError:
        return None


def read_number(path: Path) -> int | None:
    text = read_text(path)
    return int(text) if text is not None and text.lstrip("-").isdigit() else None
