"""What the machine is said to be, from files as the kernel writes them."""

import os
from pathlib import Path

import pytest

from appliance import device


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
