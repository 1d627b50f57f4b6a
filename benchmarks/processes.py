"""What the kernel says of a server's processes: memory, CPU time, who belongs to it. Reads /proc, knows nothing of servers.

Source of the files: https://docs.kernel.org/filesystems/proc.html
"""

import asyncio
import contextlib
import dataclasses
import os
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from pathlib import Path

from appliance import device

PROC = Path("/proc")
KIB = 1024
SAMPLE_SECONDS = 0.05
TICKS_PER_SECOND = os.sysconf("SC_CLK_TCK")
USER_TIME, SYSTEM_TIME = 11, 12  # behind the name in /proc/PID/stat


@dataclasses.dataclass(slots=True, kw_only=True)
class PeakMemory:
    """Of all processes of a server together, in bytes.

    `anonymous`, `resident` and `file` are the largest sums that were sampled; `kernel_resident` is the sum of each process's
    own peak (VmHWM), file pages included, which no sample can miss. `exact_anonymous` is smaps_rollup's figure at the end:
    what `anonymous` (RssAnon, which is cheap and may lag by some pages per thread) is to be judged by. `by_process` is the
    same by what the processes do.
    """

    anonymous: int = 0
    resident: int = 0
    file: int = 0
    kernel_resident: int = 0
    by_process: dict[str, int] = dataclasses.field(default_factory=dict)
    samples: int = 0

    @property
    def exact_anonymous(self) -> int:
        return sum(self.by_process.values())


def tree(pid: int) -> Sequence[int]:
    """The process and all that it started, as far as they live; probes and helpers that have ended are gone."""
    found = [pid]
    for each in found:  # grows while it is read
        for task in _tasks(each):
            found += [int(child) for child in (device.read_text(task / "children") or "").split()]
    return found


def name(pid: int) -> str:
    """The command line, for telling a server's processes apart."""
    return (device.read_text(PROC / str(pid) / "cmdline") or "").replace("\0", " ").strip()


def cpu_seconds(pid: int) -> float:
    """User and system time of all threads so far; 0 for a process that is gone."""
    fields = (device.read_text(PROC / str(pid) / "stat") or "").rpartition(")")[2].split()
    return (int(fields[USER_TIME]) + int(fields[SYSTEM_TIME])) / TICKS_PER_SECOND if fields else 0.0


def anonymous_bytes(pid: int) -> int:
    """By smaps_rollup, which walks the page tables: exact, and too dear for sampling."""
    return _table(PROC / str(pid) / "smaps_rollup").get("Anonymous", 0)


def anonymous_now(pid: int) -> int:
    """By the kernel's counter, which may lag by some pages per thread and costs next to nothing."""
    return _table(PROC / str(pid) / "status").get("RssAnon", 0)


def used_now(pid: int, ending: str) -> int:
    """Bytes of the files so called that the process has mapped and touched since `forget_used`.

    Pages that were read once, as of weights that were quantized since, are in memory as long as nobody wants it.
    """
    found, counts = 0, False
    for line in (device.read_text(PROC / str(pid) / "smaps") or "").splitlines():
        name, _, value = line.partition(":")
        if name == "Referenced":
            found += int(value.split()[0]) * KIB if counts else 0
        elif "-" in line.partition(" ")[0]:  # the head of a mapping: its addresses first, its file last
            counts = line.endswith(ending)
    return found


def forget_used(pid: int) -> None:
    """Lets the kernel note anew which pages are touched; nothing happens when the process is gone."""
    with contextlib.suppress(OSError):
        (PROC / str(pid) / "clear_refs").write_text("1")


def entries(pid: int, folder: str) -> int:
    """How many open files (`fd`) or threads (`task`) it has; 0 when it is gone."""
    try:
        return sum(1 for _ in (PROC / str(pid) / folder).iterdir())
    except OSError:
        return 0


@contextlib.asynccontextmanager
async def peak_memory(pid: int, role: Callable[[int], str] = name) -> AsyncIterator[PeakMemory]:
    """Samples the tree below `pid` while the block runs; the last figures are there when it ends."""
    peak = PeakMemory()
    sampling = asyncio.create_task(_sample(pid, peak))
    try:
        yield peak
    finally:
        sampling.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await sampling
        _look(pid, peak)
        for each in tree(pid):
            peak.by_process[role(each)] = peak.by_process.get(role(each), 0) + anonymous_bytes(each)


async def _sample(pid: int, peak: PeakMemory) -> None:
    while True:
        _look(pid, peak)
        await asyncio.sleep(SAMPLE_SECONDS)


def _look(pid: int, peak: PeakMemory) -> None:
    tables = [_table(PROC / str(each) / "status") for each in tree(pid)]
    peak.samples += 1
    peak.anonymous = max(peak.anonymous, sum(table.get("RssAnon", 0) for table in tables))
    peak.resident = max(peak.resident, sum(table.get("VmRSS", 0) for table in tables))
    peak.file = max(peak.file, sum(table.get("RssFile", 0) for table in tables))
    peak.kernel_resident = max(peak.kernel_resident, sum(table.get("VmHWM", 0) for table in tables))


def _table(path: Path) -> Mapping[str, int]:
    """The lines `name: 123 kB` of a file, in bytes; empty when the process is gone."""
    lines = (line.split() for line in (device.read_text(path) or "").splitlines())
    return {line[0].removesuffix(":"): int(line[1]) * KIB for line in lines if len(line) == 3 and line[2] == "kB"}


def _tasks(pid: int) -> Sequence[Path]:
    try:
        return list((PROC / str(pid) / "task").iterdir())
    except OSError:  # it has ended
        return []
