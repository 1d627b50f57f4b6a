"""What the kernel and the drivers say about this machine and its processes, as Prometheus metrics, read at each scrape.

What cannot be read here is absent, not 0. Knows nothing of models or requests.
"""

import os
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType

from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric

from appliance import device
from appliance.gpu import Gpu, gpus

PROC, SYS = Path("/proc"), Path("/sys")
MEMORY_KINDS = {"RssAnon": "anonymous", "RssFile": "file", "RssShmem": "shared"}
STAT_MAJOR_FAULTS, STAT_USER_TIME, STAT_SYSTEM_TIME, STAT_THREADS = 9, 11, 12, 17  # behind the name in /proc/PID/stat


class MachineCollector:
    """A collector of prometheus_client. `pids` tells the processes to look at, by name: "api" and one for each engine.

    `folders` are those whose file systems are watched.
    """

    def __init__(
        self,
        pids: Callable[[], Mapping[str, int]],
        *,
        folders: Mapping[str, Path] = MappingProxyType({}),
        read_gpus: Callable[[], Sequence[Gpu]] = gpus,
        proc: Path = PROC,
        sys: Path = SYS,
    ) -> None:
        self._pids, self._folders, self._read_gpus, self._proc, self._sys = pids, folders, read_gpus, proc, sys

    def describe(self) -> Iterable[Metric]:
        return ()  # or registering would read everything

    def collect(self) -> Iterator[Metric]:
        families = (
            *self._processes(),
            *self._memory(),
            *self._disks(),
            *self._pressure(),
            *self._cgroup(),
            *self._cpu(),
            *self._temperatures(),
            *self._gpus(),
        )
        yield from (family for family in families if family.samples)

    def _processes(self) -> Iterable[Metric]:
        memory = _gauge("process_memory_bytes", "Resident memory of a process.", "process", "kind")
        swap = _gauge("process_swap_bytes", "Memory of a process that was swapped out.", "process")
        threads = _gauge("process_threads", "Threads of a process.", "process")
        files = _gauge("process_open_files", "File descriptors that a process holds.", "process")
        faults = _counter("process_major_faults", "Pages that a process had to wait for from disk.", "process")
        seconds = _counter("process_cpu_seconds", "CPU time of a process.", "process")
        for name, pid in self._pids().items():
            status = _table(self._proc / str(pid) / "status")
            for key, kind in MEMORY_KINDS.items():
                _add(memory, _bytes(status.get(key)), name, kind)
            _add(swap, _bytes(status.get("VmSwap")), name)
            stat = _words((device.read_text(self._proc / str(pid) / "stat") or "").rpartition(")")[2])
            if len(stat) > STAT_THREADS:
                _add(threads, stat[STAT_THREADS], name)
                _add(faults, stat[STAT_MAJOR_FAULTS], name)
                ticks = stat[STAT_USER_TIME] + stat[STAT_SYSTEM_TIME]
                _add(seconds, ticks / os.sysconf("SC_CLK_TCK"), name)
            _add(files, _entries(self._proc / str(pid) / "fd"), name)
        return memory, swap, threads, files, faults, seconds

    def _memory(self) -> Iterable[Metric]:
        cgroup = self._sys / "fs/cgroup"
        total = _gauge("memory_total_bytes", "Memory of the machine, or the cgroup's limit where that is less.")
        available = _gauge("memory_available_bytes", "Memory to be had without swapping.")
        swap_total = _gauge("swap_total_bytes", "Swap space.")
        swap_used = _gauge("swap_used_bytes", "Swap space in use.")
        _add(total, device.memory_total_bytes(cgroup, self._proc))
        table = _table(self._proc / "meminfo")
        if "MemAvailable" in table:
            _add(available, device.memory_available_bytes(cgroup, self._proc))
        swap, free = _bytes(table.get("SwapTotal")), _bytes(table.get("SwapFree"))
        if swap is not None and free is not None:
            _add(swap_total, swap)
            _add(swap_used, swap - free)
        return total, available, swap_total, swap_used

    def _disks(self) -> Iterable[Metric]:
        total = _gauge("disk_total_bytes", "Size of the file system that a folder lies on.", "folder")
        free = _gauge("disk_free_bytes", "What is free there for this user.", "folder")
        for name, folder in self._folders.items():
            try:
                usage = shutil.disk_usage(folder)
            except OSError:  # it does not exist yet
                continue
            _add(total, usage.total, name)
            _add(free, usage.free, name)
        return total, free

    def _pressure(self) -> Iterable[Metric]:
        """https://docs.kernel.org/accounting/psi.html: `some`: at least one task waited; `full`: all did."""
        waited = _counter("pressure_seconds", "Time in which tasks waited for a resource.", "resource", "share")
        for resource in ("cpu", "memory", "io"):
            for line in (device.read_text(self._proc / "pressure" / resource) or "").splitlines():
                share, *fields = line.split()
                total = next((field.removeprefix("total=") for field in fields if field.startswith("total=")), "")
                if total.isdigit():
                    _add(waited, int(total) / 1e6, resource, share)
        return (waited,)

    def _cgroup(self) -> Iterable[Metric]:
        """Of the cgroup that this process is in: microseconds in version 2, nanoseconds in version 1."""
        periods = _counter("cgroup_cpu_periods", "Periods for which the cgroup has a CPU quota.")
        throttled = _counter("cgroup_cpu_throttled_periods", "Periods in which the quota was used up.")
        seconds = _counter("cgroup_cpu_throttled_seconds", "Time for which the quota stopped the cgroup.")
        for folder in device.cgroup_folders("cpu", self._sys / "fs/cgroup", self._proc):
            lines = (line.split() for line in (device.read_text(folder / "cpu.stat") or "").splitlines())
            stat = {fields[0]: int(fields[1]) for fields in lines if len(fields) == 2 and fields[1].isdigit()}
            if "nr_throttled" not in stat:
                continue
            _add(periods, stat.get("nr_periods"))
            _add(throttled, stat["nr_throttled"])
            micro, nano = stat.get("throttled_usec"), stat.get("throttled_time")
            _add(seconds, micro / 1e6 if micro is not None else nano / 1e9 if nano is not None else None)
            break
        return periods, throttled, seconds

    def _cpu(self) -> Iterable[Metric]:
        frequency = _gauge("cpu_frequency_hertz", "Clock of a CPU now.", "cpu")
        throttles = _counter("cpu_thermal_throttles", "Times that heat slowed a CPU's package down.", "cpu")
        for folder in sorted((self._sys / "devices/system/cpu").glob("cpu[0-9]*")):
            cpu = folder.name.removeprefix("cpu")
            kilohertz = device.read_number(folder / "cpufreq/scaling_cur_freq")
            _add(frequency, None if kilohertz is None else kilohertz * 1000, cpu)
            _add(throttles, device.read_number(folder / "thermal_throttle/package_throttle_count"), cpu)
        if not frequency.samples:
            self._add_frequencies_of_cpuinfo(frequency)
        return frequency, throttles

    def _add_frequencies_of_cpuinfo(self, frequency: GaugeMetricFamily) -> None:
        cpu = ""
        for line in (device.read_text(self._proc / "cpuinfo") or "").splitlines():
            name, _, value = (part.strip() for part in line.partition(":"))
            if name == "processor":
                cpu = value
            elif name == "cpu MHz":
                _add(frequency, float(value) * 1e6, cpu)

    def _temperatures(self) -> Iterable[Metric]:
        temperature = _gauge("temperature_celsius", "Temperature of a thermal zone.", "zone", "type")
        for folder in sorted((self._sys / "class/thermal").glob("thermal_zone*")):
            millidegrees, kind = device.read_number(folder / "temp"), device.read_text(folder / "type") or "unknown"
            zone = folder.name.removeprefix("thermal_zone")
            _add(temperature, None if millidegrees is None else millidegrees / 1000, zone, kind)
        return (temperature,)

    def _gpus(self) -> Iterable[Metric]:
        labels = ("vendor", "gpu", "name")
        total = _gauge("gpu_memory_total_bytes", "Memory of a GPU.", *labels)
        used = _gauge("gpu_memory_used_bytes", "Memory of a GPU in use, by anybody.", *labels)
        utilisation = _gauge("gpu_utilisation_ratio", "Share of time in which a GPU computed.", *labels)
        temperature = _gauge("gpu_temperature_celsius", "Temperature of a GPU.", *labels)
        for gpu in self._read_gpus():
            named = (gpu.vendor, str(gpu.index), gpu.name)
            _add(total, gpu.memory_total_bytes, *named)
            _add(used, gpu.memory_used_bytes, *named)
            _add(utilisation, gpu.utilisation_ratio, *named)
            _add(temperature, gpu.temperature_celsius, *named)
        return total, used, utilisation, temperature


def _gauge(name: str, about: str, *labels: str) -> GaugeMetricFamily:
    return GaugeMetricFamily(f"appliance_{name}", about, labels=labels)


def _counter(name: str, about: str, *labels: str) -> CounterMetricFamily:
    return CounterMetricFamily(f"appliance_{name}", about, labels=labels)


def _add(family: GaugeMetricFamily | CounterMetricFamily, value: float | None, *labels: str) -> None:
    """Adds a sample unless there is nothing to say."""
    if value is not None:
        family.add_metric(labels, value)


def _table(path: Path) -> Mapping[str, str]:
    """Lines of `name: value`."""
    return {
        name: value.strip()
        for name, _, value in (line.partition(":") for line in (device.read_text(path) or "").splitlines())
    }


def _bytes(value: str | None) -> int | None:
    """`123 kB` in bytes."""
    return None if value is None or not value.endswith(" kB") else int(value.removesuffix(" kB")) * 1024


def _words(text: str) -> list[int]:
    """The numbers of a line; the one letter among them, the state, counts as 0."""
    return [int(word) if word.lstrip("-").isdigit() else 0 for word in text.split()]


def _entries(folder: Path) -> int | None:
    try:
        return sum(1 for _ in folder.iterdir())
    except OSError:  # the process has ended, or belongs to somebody else
        return None
