"""What keeps a card from being used, on hosts that are played by files: each named, with what to do."""

import os
import stat
from pathlib import Path

import pytest

from appliance import gpu, gpu_access
from appliance.gpu_access import Host, TorchBuild
from tests.fake_files import write
from tests.test_gpu import FakeNvml

CUDA_TARGETS = "60-real;61-real;70-real;75-real;80-real;86-real;89-real;90-virtual"
ROCM_TARGETS = "gfx1030;gfx1100;gfx1101;gfx1102;gfx1200;gfx1201"


def host(folder: Path, *vendors: str, files: tuple[str, ...] = ()) -> Host:
    """A machine with these cards on its bus, beside a sound card of the first's vendor, and these files under / and /dev."""
    bus = {f"sys/bus/pci/devices/{number}/vendor": vendor for number, vendor in enumerate(vendors)}
    bus |= {f"sys/bus/pci/devices/{number}/class": "0x030000" for number in range(len(vendors))}
    bus |= {"sys/bus/pci/devices/9/vendor": "0x10de", "sys/bus/pci/devices/9/class": "0x040300"}
    write(folder, {**bus, **dict.fromkeys(files, "")})
    (folder / "dev").mkdir(exist_ok=True)
    return Host(sys=folder / "sys", dev=folder / "dev", root=folder)


def said(found: Host, **facts: object) -> str:
    return "\n".join(map(str, gpu_access.problems(found, **{"seen": 0, **facts})))  # type: ignore[arg-type]


def test_no_card_is_no_problem(tmp_path: Path) -> None:
    found = host(tmp_path)
    assert gpu_access.vendors(found) == []
    assert said(found, can_offload=False) == ""


def test_image_for_cards_says_when_there_is_none_that_it_can_use(tmp_path: Path) -> None:
    nowhere = host(tmp_path / "none")
    assert "there is none here; use edge-appliance:cpu" in said(nowhere, compiled=CUDA_TARGETS)
    assert said(nowhere, seen=1, compiled=CUDA_TARGETS) == ""  # a card that is not on the bus, as under WSL
    there = host(tmp_path / "card", "0x10de", files=(DRIVER, CONTROL))
    assert "library for it finds none; update its driver" in said(there, seen=1, can_offload=False, compiled=CUDA_TARGETS)


DRIVER, CONTROL, KFD, RENDER = "proc/driver/nvidia/version", "dev/nvidiactl", "dev/kfd", "dev/dri/renderD128"


@pytest.mark.parametrize(
    ("vendor", "files", "seen", "message"),
    [
        ("0x10de", (), 0, "its driver is not loaded; install it on the host"),
        ("0x10de", (DRIVER,), 0, "nvidiactl is missing; run `nvidia-modprobe"),
        ("0x10de", (DRIVER, "run/.containerenv"), 0, "`--device nvidia.com/gpu=all`; `sudo nvidia-ctk cdi generate"),
        ("0x10de", (DRIVER, ".dockerenv"), 0, "nvidiactl is missing; start the container with `--gpus all`"),
        ("0x10de", (DRIVER, CONTROL), 0, "library cannot be used here; install the driver's library"),
        ("0x10de", (DRIVER, CONTROL, "run/.containerenv"), 0, "NVIDIA_DRIVER_CAPABILITIES=compute,utility"),
        ("0x10de", (DRIVER, CONTROL), 1, ""),
        ("0x1002", (), 0, "kfd is missing; install it on the host (Debian: firmware-amd-graphics"),
        ("0x1002", ("run/.containerenv",), 0, "kfd is missing; start the container with `--device /dev/kfd"),
        ("0x1002", (KFD,), 0, "renderD*; pass both: `--device /dev/kfd --device /dev/dri`"),
        ("0x1002", (KFD, RENDER), 0, ""),
    ],
)
def test_what_is_in_the_way(vendor: str, files: tuple[str, ...], seen: int, message: str, tmp_path: Path) -> None:
    found = said(host(tmp_path, vendor, files=files), seen=seen, can_offload=True)
    assert message in found
    assert bool(found) == bool(message)


@pytest.mark.parametrize("container", [(), (".dockerenv",), ("run/.containerenv",)])
def test_device_file_of_another_group_is_named_with_its_number(
    container: tuple[str, ...], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = host(tmp_path, "0x1002", files=(KFD, RENDER, *container))
    monkeypatch.setattr(os, "access", lambda path, mode: "kfd" not in str(path))  # noqa: ARG005
    number = (tmp_path / KFD).stat().st_gid
    text = said(found)
    assert f"kfd may not be opened by user {os.getuid()}" in text
    assert (f"--group-add {number}" in text) == bool(container)
    assert (f"usermod -aG {number}" in text) == (not container)
    assert ("--group-add keep-groups" in text) == ("run/.containerenv" in container)


def test_computing_on_the_cpu_beside_a_card_is_no_silent_surprise(tmp_path: Path) -> None:
    nvidia = host(tmp_path / "nvidia", "0x10de", files=(DRIVER, CONTROL))
    assert "computes on the CPU only; use the image edge-appliance:cuda" in said(nvidia, seen=1, can_offload=False)
    amd = host(tmp_path / "amd", "0x1002", files=(KFD, RENDER))
    assert "edge-appliance:rocm" in said(amd, can_offload=False)
    assert said(amd, can_offload=None) == ""


@pytest.mark.parametrize(
    ("card", "targets", "fits"),
    [
        ("86", CUDA_TARGETS, True),  # RTX 3050
        ("60", CUDA_TARGETS, True),  # P100
        ("87", CUDA_TARGETS, True),  # machine code for 8.0 runs on all of 8.x
        ("52", CUDA_TARGETS, False),
        ("120", CUDA_TARGETS, True),  # compiled by the driver from 9.0's intermediate form
        ("120", "90-real", False),
        ("75", "80", False),
        ("89", "80", True),
        ("120", "120a-real", True),
        ("gfx1101", ROCM_TARGETS, True),  # RX 7800 XT
        ("gfx906", ROCM_TARGETS, False),
        ("gfx90a", "gfx906;gfx90a:xnack-", True),
        ("gfx906", "gfx90a:xnack-", False),
        ("gfx1103", "gfx11-generic", True),
        ("86", "all-major", True),
        ("61", "native", True),
        ("86", "gfx1101;gfx1030", False),
    ],
)
def test_card_and_targets(card: str, targets: str, fits: bool, tmp_path: Path) -> None:
    assert gpu_access.is_compiled_for(card, targets) == fits
    found = host(tmp_path, "0x1002", files=(KFD, RENDER))
    text = said(found, capabilities=[card], compiled=targets)
    assert ("was compiled for" in text) == (not fits)
    assert said(found, capabilities=[card], compiled=None) == ""


def test_architectures_as_drivers_tell_them(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    nodes = "sys/class/kfd/kfd/topology/nodes"
    write(tmp_path, {f"{nodes}/0/properties": "cpu_cores_count 16\ngfx_target_version 0\n"})
    write(tmp_path, {f"{nodes}/1/properties": "simd_count 120\ngfx_target_version 110001\ndrm_render_minor 128\n"})
    write(tmp_path, {f"{nodes}/2/properties": "gfx_target_version 90010\ndrm_render_minor 129\n"})
    found = Host(sys=tmp_path / "sys")
    assert gpu_access.amd_architectures(found) == {"renderD128": "gfx1101", "renderD129": "gfx90a"}
    monkeypatch.setenv("HSA_OVERRIDE_GFX_VERSION", "10.3.0")
    assert set(gpu_access.amd_architectures(found).values()) == {"gfx1030"}
    assert gpu.architectures(gpu.gpus(tmp_path, FakeNvml(cards=2))) == ["86"]
    assert gpu.architectures(gpu.gpus(tmp_path, FakeNvml(has_driver=False))) == []


@pytest.mark.parametrize(
    ("card", "compiled", "fits"),
    [
        ("86", ["sm_70", "sm_80"], True),
        ("61", ["sm_70", "sm_80", "compute_90"], False),
        ("120", ["sm_90"], False),
        ("120", ["sm_90", "compute_90"], True),
        ("gfx1101", ["gfx90a:xnack-", "gfx1101"], True),
        ("gfx1102", ["gfx1101"], False),
    ],
)
def test_card_and_what_torch_was_compiled_for(card: str, compiled: list[str], fits: bool, tmp_path: Path) -> None:
    torch = TorchBuild(version="2.0+x", backend="cuda", finds_card=True, architectures=compiled)
    assert gpu_access.is_in_torch(card, compiled) == fits
    found = host(tmp_path, "0x10de", files=(DRIVER, CONTROL))
    text = said(found, seen=1, capabilities=[card], torch=torch)
    assert ("torch 2.0+x was compiled for" in text) == (not fits)
    assert ("TORCH_INDEX" in text) == (not fits)


def test_training_on_the_cpu_beside_a_card_is_no_silent_surprise(tmp_path: Path) -> None:
    nvidia = host(tmp_path / "nvidia", "0x10de", files=(DRIVER, CONTROL))
    on_cpu = TorchBuild(version="2.0+cpu", backend="cpu", finds_card=False)
    blind = TorchBuild(version="2.0+cu126", backend="cuda", finds_card=False)
    assert "this torch (2.0+cpu) trains on the CPU only; use the image edge-appliance:cuda-train" in said(
        nvidia, seen=1, torch=on_cpu
    )
    assert "torch 2.0+cu126 for cuda finds none; update its driver" in said(nvidia, seen=1, torch=blind)
    assert said(host(tmp_path / "none"), torch=on_cpu) == ""


def test_groups_are_numbers_of_this_host(tmp_path: Path) -> None:
    found = host(tmp_path, "0x1002", files=(KFD, RENDER, "dev/dri/card0"))
    assert gpu_access.groups(found) == [(tmp_path / KFD).stat().st_gid]
    assert stat.S_ISREG((tmp_path / KFD).stat().st_mode)


@pytest.mark.parametrize(
    ("files", "memory_bytes", "expected"),
    [
        ((), None, "cpu"),
        (("dev/nvidia0",), None, "cuda"),
        (("dev/nvidiactl",), None, "cpu"),
        ((KFD,), None, "rocm"),
        ((KFD, "dev/nvidia0"), 16 << 30, "rocm"),
        ((KFD,), 512 << 20, "cpu"),  # inside a processor
        ((KFD, "dev/nvidia0"), 512 << 20, "cuda"),
    ],
)
def test_backend_is_that_of_the_card(
    files: tuple[str, ...], memory_bytes: int | None, expected: str, tmp_path: Path
) -> None:
    found = host(tmp_path, "0x1002", files=files)
    if memory_bytes is not None:
        write(tmp_path, {"sys/bus/pci/devices/0/mem_info_vram_total": str(memory_bytes)})
    assert gpu_access.backend(found) == expected


def test_graphics_inside_a_processor_are_no_problem(tmp_path: Path) -> None:
    found = host(tmp_path, "0x1002")
    assert "kfd is missing" in said(found)
    write(tmp_path, {"sys/bus/pci/devices/0/mem_info_vram_total": str(512 << 20)})
    assert gpu_access.vendors(found) == []
    assert said(found, can_offload=False) == ""
