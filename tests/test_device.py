"""What the machine is said to be, from files as the kernel writes them."""

import os
from pathlib import Path

import pytest

from appliance import device
from tests.fake_files import write


def cgroup(folder: Path, **files: str) -> Path:
    for name, text in files.items():
        path = folder / name.replace("__", "/").replace("_DOT_", ".")
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return folder


@pytest.fixture
def sixteen_cores(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(16)))


@pytest.mark.usefixtures("sixteen_cores")
@pytest.mark.parametrize(
    ("quota", "cores"),
    [("max 100000", 16), ("200000 100000", 2), ("250000 100000", 2), ("50000 100000", 1), ("9900000 100000", 16)],
)
def test_cores_by_quota(tmp_path: Path, quota: str, cores: int) -> None:
    assert device.usable_cores(cgroup(tmp_path, cpu_DOT_max=f"{quota}\n")) == cores


@pytest.mark.usefixtures("sixteen_cores")
@pytest.mark.parametrize(("quota", "cores"), [("-1", 16), ("300000", 3)])
def test_cores_by_quota_of_cgroup_1(tmp_path: Path, quota: str, cores: int) -> None:
    files = {"cpu__cpu_DOT_cfs_quota_us": quota, "cpu__cpu_DOT_cfs_period_us": "100000"}
    assert device.usable_cores(cgroup(tmp_path, **files)) == cores


def test_cores_by_affinity(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {3})
    assert device.usable_cores(tmp_path) == 1


def test_memory(tmp_path: Path) -> None:
    whole = device.memory_total_bytes(tmp_path)
    assert whole > 0
    assert device.memory_total_bytes(cgroup(tmp_path, memory_DOT_max="1000000\n")) == 1_000_000
    assert device.memory_total_bytes(cgroup(tmp_path, memory_DOT_max="max\n")) == whole
    assert device.memory_total_bytes(cgroup(tmp_path, memory_DOT_max=str(2**62))) == whole
    assert 0 < device.memory_available_bytes() <= whole * 1.01


def test_hardware_threads_of_a_core_count_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {0, 1, 2, 3, 4})
    topology = {"cpu0": "0,4", "cpu4": "0,4", "cpu1": "1-2", "cpu2": "1-2"}  # cpu3 does not say
    cpus = write(tmp_path, {f"{cpu}/topology/thread_siblings_list": f"{text}\n" for cpu, text in topology.items()})
    assert device.physical_cores(tmp_path / "none", cpus) == 3
    assert device.physical_cores(write(tmp_path / "cgroup", {"cpu.max": "200000 100000"}), cpus) == 2
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {4})
    assert device.physical_cores(tmp_path / "none", cpus) == 1


@pytest.mark.usefixtures("sixteen_cores")
def test_a_quota_of_any_cgroup_above_binds(tmp_path: Path) -> None:
    """As systemd sets them: CPUQuota of a slice, and of a service in it."""
    proc = write(tmp_path / "proc", {"self/cgroup": "0::/box.slice/appliance.service\n"})
    tree = {"box.slice/cpu.max": "300000 100000", "box.slice/appliance.service/cpu.max": "max 100000"}
    assert device.usable_cores(write(tmp_path / "cgroup", tree), proc) == 3
    old = write(tmp_path / "old", {"self/cgroup": "4:memory:/a\n1:cpu,cpuacct:/a/b\n0::/\n"})
    tree = {"cpu/a/cpu.cfs_quota_us": "500000", "cpu/a/cpu.cfs_period_us": "100000", "cpu/a/b/cpu.cfs_quota_us": "-1"}
    tree |= {"cpu/a/b/cpu.cfs_period_us": "100000"}
    assert device.usable_cores(write(tmp_path / "cgroup1", tree), old) == 5


def test_memory_that_a_cgroup_leaves(tmp_path: Path) -> None:
    """File pages that the kernel can drop are not counted as used."""
    mib = 1 << 20
    proc = write(tmp_path / "proc", {"self/cgroup": "0::/box\n", "meminfo": "MemTotal: 9 kB\nMemAvailable: 8388608 kB\n"})
    files = {
        "box/memory.max": f"{1000 * mib}",
        "box/memory.current": f"{700 * mib}",
        "box/memory.stat": f"anon {300 * mib}\ninactive_file {250 * mib}\nactive_file {150 * mib}\n",
    }
    tree = write(tmp_path / "cgroup", files)
    assert device.memory_total_bytes(tree, proc) == 1000 * mib
    assert device.memory_available_bytes(tree, proc) == 700 * mib
    write(tree, {"box/memory.current": f"{2000 * mib}"})
    assert device.memory_available_bytes(tree, proc) == 0
    old = {"memory/memory.limit_in_bytes": f"{500 * mib}", "memory/memory.usage_in_bytes": f"{400 * mib}"}
    old |= {"memory/memory.stat": f"total_inactive_file {100 * mib}\n"}
    assert device.memory_available_bytes(write(tmp_path / "cgroup1", old), proc) == 200 * mib


@pytest.mark.parametrize(
    ("text", "features"),
    [
        ("processor : 0\nflags : fpu avx2\nprocessor : 1\nflags : fpu avx2 avx512f\n", {"fpu", "avx2"}),
        ("processor : 0\nFeatures : fp asimd asimddp\n", {"fp", "asimd", "asimddp"}),
        ("cpu : POWER9\n", set()),
    ],
)
def test_features_that_every_core_has(tmp_path: Path, text: str, features: set[str]) -> None:
    assert device.cpu_features(write(tmp_path, {"cpuinfo": text})) == features


def test_a_machine_in_one_look() -> None:
    machine = device.machine()
    assert 1 <= machine.physical_cores <= machine.usable_cores
    assert 0 < machine.memory_available_bytes <= machine.memory_total_bytes
