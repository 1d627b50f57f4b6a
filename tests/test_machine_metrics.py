"""What the machine says at a scrape: this one, and others from files as their kernels write them."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
from prometheus_client import CollectorRegistry

from appliance.gpu import Gpu
from appliance.machine_metrics import MachineCollector
from appliance.serving import bandwidth
from tests.fake_files import write


def registry_of(collector: MachineCollector) -> CollectorRegistry:
    registry = CollectorRegistry()
    registry.register(collector)
    return registry


def names(registry: CollectorRegistry) -> set[str]:
    return {family.name.removeprefix("appliance_") for family in registry.collect()}


def test_this_machine() -> None:
    child = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE)
    try:
        registry = registry_of(MachineCollector(lambda: {"api": os.getpid(), "shelter": child.pid}))

        def value(name: str, **labels: str) -> float:
            found = registry.get_sample_value(f"appliance_{name}", labels)
            assert found is not None, name
            return found

        own = {kind: value("process_memory_bytes", process="api", kind=kind) for kind in ("anonymous", "file", "shared")}
        assert own["anonymous"] > value("process_memory_bytes", process="shelter", kind="anonymous") > 0
        assert value("process_cpu_seconds_total", process="api") > 0
        assert value("process_threads", process="shelter") == 1
        assert value("process_open_files", process="shelter") >= 3
        assert value("process_major_faults_total", process="api") >= 0
        assert 0 < value("memory_available_bytes") <= value("memory_total_bytes")
    finally:
        child.communicate()


def test_open_files_are_counted(tmp_path: Path) -> None:
    registry = registry_of(MachineCollector(lambda: {"api": os.getpid()}))
    before = registry.get_sample_value("appliance_process_open_files", {"process": "api"})
    with (tmp_path / "file").open("w"):
        after = registry.get_sample_value("appliance_process_open_files", {"process": "api"})
    assert before is not None
    assert after == before + 1


def test_a_machine_that_says_everything(tmp_path: Path) -> None:
    proc, sys_folder = tmp_path / "proc", tmp_path / "sys"
    stat = "7 (python (3) x) S 1 7 7 0 -1 4194304 900 0 12 0 250 150 0 0 20 0 5 0 100 1000 50"
    write(
        proc,
        {
            "7/status": "Name:\tpython\nRssAnon:\t 100 kB\nRssFile:\t 20 kB\nRssShmem:\t 0 kB\nVmSwap:\t 8 kB\n",
            "7/stat": stat,
            "7/fd/0": "",
            "7/fd/1": "",
            "meminfo": "MemTotal: 1000 kB\nMemAvailable: 600 kB\nSwapTotal: 500 kB\nSwapFree: 200 kB\n",
            "pressure/cpu": "some avg10=0.00 avg60=0.41 avg300=0.57 total=1921838\n",
            "pressure/memory": "some avg10=0.0 avg60=0.0 avg300=0.0 total=7000000\nfull avg10=0.0 total=2500000\n",
            "self/cgroup": "0::/appliance.service\n",
        },
    )
    write(
        sys_folder,
        {
            "fs/cgroup/cpu.stat": "usage_usec 5\n",
            "fs/cgroup/appliance.service/cpu.stat": "usage_usec 5\nnr_periods 40\nnr_throttled 8\nthrottled_usec 2500000\n",
            "devices/system/cpu/cpu0/cpufreq/scaling_cur_freq": "1800000\n",
            "devices/system/cpu/cpu0/thermal_throttle/package_throttle_count": "3\n",
            "class/thermal/thermal_zone0/temp": "61500\n",
            "class/thermal/thermal_zone0/type": "x86_pkg_temp\n",
        },
    )
    card = Gpu(index=1, vendor="nvidia", name="T4", memory_total_bytes=100, memory_used_bytes=30, temperature_celsius=55.0)
    registry = registry_of(MachineCollector(lambda: {"api": 7}, read_gpus=lambda: [card], proc=proc, sys=sys_folder))
    expected = {
        ("process_memory_bytes", ("process", "api"), ("kind", "anonymous")): 102400,
        ("process_swap_bytes", ("process", "api")): 8192,
        ("process_major_faults_total", ("process", "api")): 12,
        ("process_cpu_seconds_total", ("process", "api")): 400 / os.sysconf("SC_CLK_TCK"),
        ("process_threads", ("process", "api")): 5,
        ("process_open_files", ("process", "api")): 2,
        ("memory_available_bytes",): 600 * 1024,
        ("swap_total_bytes",): 500 * 1024,
        ("swap_used_bytes",): 300 * 1024,
        ("pressure_seconds_total", ("resource", "cpu"), ("share", "some")): 1.921838,
        ("pressure_seconds_total", ("resource", "memory"), ("share", "full")): 2.5,
        ("cgroup_cpu_periods_total",): 40,
        ("cgroup_cpu_throttled_periods_total",): 8,
        ("cgroup_cpu_throttled_seconds_total",): 2.5,
        ("cpu_frequency_hertz", ("cpu", "0")): 1.8e9,
        ("cpu_thermal_throttles_total", ("cpu", "0")): 3,
        ("temperature_celsius", ("zone", "0"), ("type", "x86_pkg_temp")): 61.5,
        ("gpu_memory_used_bytes", ("vendor", "nvidia"), ("gpu", "1"), ("name", "T4")): 30,
        ("gpu_temperature_celsius", ("vendor", "nvidia"), ("gpu", "1"), ("name", "T4")): 55,
    }
    for (name, *labels), value in expected.items():
        assert registry.get_sample_value(f"appliance_{name}", dict(labels)) == value, name
    assert "gpu_utilisation_ratio" not in names(registry), "the driver did not say"


def test_throttling_as_cgroup_1_tells_it(tmp_path: Path) -> None:
    write(tmp_path / "proc", {"self/cgroup": "1:cpu,cpuacct:/box\n0::/\n", "cpuinfo": "processor: 0\ncpu MHz : 1500.5\n"})
    write(tmp_path / "sys", {"fs/cgroup/cpu/box/cpu.stat": "nr_periods 4\nnr_throttled 2\nthrottled_time 1500000000\n"})
    collector = MachineCollector(dict, read_gpus=list, proc=tmp_path / "proc", sys=tmp_path / "sys")
    registry = registry_of(collector)
    assert registry.get_sample_value("appliance_cgroup_cpu_throttled_seconds_total") == 1.5
    assert registry.get_sample_value("appliance_cpu_frequency_hertz", {"cpu": "0"}) == 1.5005e9


def test_what_cannot_be_read_is_absent(tmp_path: Path) -> None:
    """An ended process, and a kernel that says nothing."""
    collector = MachineCollector(lambda: {"shelter": 1}, read_gpus=list, proc=tmp_path, sys=tmp_path)
    assert names(registry_of(collector)) == {"memory_total_bytes"}


def test_the_peak_bandwidth_is_measured(tmp_path: Path) -> None:
    assert 1e8 < bandwidth.measure(2, seconds=0.0, buffer_bytes=1 << 22) < 1e13
    write(tmp_path, {"index0/size": "32K\n", "index3/size": "8192K\n"})
    assert bandwidth.last_level_cache_bytes(tmp_path) == 8 << 20
    assert bandwidth.last_level_cache_bytes(tmp_path / "none") == 0


def test_the_peak_bandwidth_is_measured_once_a_boot(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    measured = [3e9, 2e9, 1e9]
    monkeypatch.setattr(bandwidth, "measure", lambda threads: measured.pop())  # noqa: ARG005
    assert [bandwidth.remembered(2, tmp_path) for _ in range(2)] == [1e9, 1e9]
    assert bandwidth.remembered(1, tmp_path) == 2e9, "with other threads"
    monkeypatch.setattr(bandwidth, "BOOT_ID", tmp_path / "boot")
    (tmp_path / "boot").write_text("another")
    assert bandwidth.remembered(1, tmp_path) == 3e9, "after a boot"


@pytest.mark.parametrize("content", ["", "[]", "{}", '{"bytes_per_second": NaN}', '{"bytes_per_second": "1"}'])
def test_a_damaged_memory_of_the_bandwidth_is_made_again(content: str, tmp_path: Path) -> None:
    (tmp_path / bandwidth.NAME).write_text(content)
    assert 1e8 < bandwidth.remembered(1, tmp_path) < 1e13
