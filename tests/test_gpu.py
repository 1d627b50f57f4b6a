"""GPUs from drivers that are played by files and objects, and the lease that two processes cannot both have."""

import os
import stat
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from appliance import config, gpu
from appliance.errors import EnvironmentIncomplete
from appliance.gpu import Gpu, gpus, lease
from appliance.gpu_access import ARCHITECTURES, Host, Vendor
from tests.fake_files import write

MIB = 1 << 20


class NVMLError(Exception):
    pass


class FakeNvml:
    """The part of `pynvml` that is used; `silent` are functions that the card does not support."""

    NVMLError = NVMLError
    NVML_TEMPERATURE_GPU = 0

    def __init__(self, cards: int = 1, *, has_driver: bool = True, silent: tuple[str, ...] = ()) -> None:
        self._cards, self._has_driver, self._silent = cards, has_driver, silent

    def nvmlInit(self) -> None:  # noqa: N802
        if not self._has_driver:
            raise NVMLError("Driver Not Loaded")

    def nvmlDeviceGetCount(self) -> int:  # noqa: N802
        return self._cards

    def __getattr__(self, name: str) -> Any:
        answers = {
            "nvmlDeviceGetHandleByIndex": lambda index: index,
            "nvmlDeviceGetName": lambda handle: f"Card {handle}",
            "nvmlDeviceGetMemoryInfo": lambda _: SimpleNamespace(total=4096 * MIB, used=1024 * MIB),
            "nvmlDeviceGetUtilizationRates": lambda _: SimpleNamespace(gpu=37, memory=5),
            "nvmlDeviceGetCudaComputeCapability": lambda _: (8, 6),
            "nvmlDeviceGetUUID": lambda handle: f"GPU-{handle}7-aa",
            "nvmlDeviceGetTemperature": lambda _, sensor: 61 + sensor,
        }
        if name in self._silent:
            return self._refuse
        return answers[name]

    def _refuse(self, *_: Any) -> None:
        raise NVMLError("Not Supported")


def test_nvidia(tmp_path: Path) -> None:
    first, second = gpus(tmp_path, FakeNvml(cards=2))
    assert (first.index, second.index) == (0, 1)
    assert second == Gpu(
        index=1,
        vendor="nvidia",
        name="Card 1",
        memory_total_bytes=4096 * MIB,
        memory_used_bytes=1024 * MIB,
        utilisation_ratio=0.37,
        temperature_celsius=61.0,
        architecture="86",
        uuid="GPU-17-aa",
    )
    assert str(second) == "GPU 1 (Card 1, 3072 of 4096 MiB free)"


def test_nvidia_that_tells_little(tmp_path: Path) -> None:
    silent = ("nvmlDeviceGetUtilizationRates", "nvmlDeviceGetTemperature", "nvmlDeviceGetMemoryInfo")
    (card,) = gpus(tmp_path, FakeNvml(silent=(*silent, "nvmlDeviceGetCudaComputeCapability")))
    assert card.architecture is None
    assert (card.utilisation_ratio, card.temperature_celsius, card.memory_free_bytes) == (None, None, 0)
    assert gpus(tmp_path, FakeNvml(silent=("nvmlDeviceGetHandleByIndex",))) == []


def test_no_driver_is_no_error(tmp_path: Path) -> None:
    assert gpus(tmp_path, FakeNvml(has_driver=False)) == []
    assert gpus(tmp_path / "none", FakeNvml(cards=0)) == []


def test_amd(tmp_path: Path) -> None:
    """Two cards beside one of another vendor, a connector, and a card without memory of its own."""
    write(
        tmp_path,
        {
            "card0/device/vendor": "0x8086\n",
            "card1/device/vendor": "0x1002\n",
            "card1/device/mem_info_vram_total": f"{8192 * MIB}\n",
            "card1/device/mem_info_vram_used": f"{192 * MIB}\n",
            "card1/device/gpu_busy_percent": "50\n",
            "card1/device/hwmon/hwmon4/temp1_input": "48000\n",
            "card1/device/uevent": "DRIVER=amdgpu\nPCI_ID=1002:73BF\n",
            "card1/device/drm/renderD129/dev": "226:129\n",
            "sys/class/kfd/kfd/topology/nodes/1/properties": "gfx_target_version 110001\ndrm_render_minor 129\n",
            "card1-HDMI-A-1/device/vendor": "0x1002\n",
            "card10/device/vendor": "0x1002\n",
            "card10/device/mem_info_vram_total": f"{512 * MIB}\n",
            "card10/device/product_name": "Radeon\n",
            "card2/device/vendor": "0x1002\n",
        },
    )
    large, small = gpus(tmp_path, FakeNvml(has_driver=False), Host(sys=tmp_path / "sys"))
    assert large == Gpu(
        index=0,
        vendor="amd",
        name="AMD 1002:73BF",
        memory_total_bytes=8192 * MIB,
        memory_used_bytes=192 * MIB,
        utilisation_ratio=0.5,
        temperature_celsius=48.0,
        architecture="gfx1101",
    )
    assert (large.is_integrated, small.is_integrated, small.architecture) == (False, True, None)
    assert (small.index, small.name, small.memory_free_bytes) == (1, "Radeon", 512 * MIB)
    assert (small.utilisation_ratio, small.temperature_celsius) == (None, None)


HOLD = "import sys; from pathlib import Path; from appliance import gpu\n"
HOLD += "with gpu.lease('nvidia', 0, 'training', Path(sys.argv[1])):"


def holder(folder: Path, body: str) -> "subprocess.Popen[str]":
    command = [sys.executable, "-c", f"{HOLD}\n print('held', flush=True)\n {body}", str(folder)]
    process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    assert process.stdout.readline() == "held\n"
    return process


def test_a_lease_names_its_holder(tmp_path: Path) -> None:
    process = holder(tmp_path, "input()")
    try:
        with (
            pytest.raises(EnvironmentIncomplete, match=rf"GPU 0 is held by 'training', process {process.pid},"),
            lease("nvidia", 0, "serving", tmp_path),
        ):
            pass
        with lease("nvidia", 1, "serving", tmp_path):
            pass
    finally:
        process.communicate("\n")
    with lease("nvidia", 0, "serving", tmp_path):
        pass


def test_a_killed_holder_has_let_go(tmp_path: Path) -> None:
    process = holder(tmp_path, "input()")
    process.kill()
    process.communicate()
    assert "training" in (tmp_path / "nvidia-0.lease").read_text(), "what it wrote is still there"
    with lease("nvidia", 0, "serving", tmp_path):
        assert "serving" in (tmp_path / "nvidia-0.lease").read_text()


def test_a_lease_ends_with_its_block(tmp_path: Path) -> None:
    with pytest.raises(ZeroDivisionError), lease("nvidia", 0, "serving", tmp_path):
        raise ZeroDivisionError
    with lease("nvidia", 0, "training", tmp_path):
        pass
    assert (tmp_path / "nvidia-0.lease").read_text() == ""


def test_the_lease_lies_in_the_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("APPLIANCE_CACHE", str(tmp_path))
    with lease("nvidia", 0, "serving"):
        assert (tmp_path / "gpu/nvidia-0.lease").exists()
    monkeypatch.setenv("APPLIANCE_LEASES", str(tmp_path / "shared"))
    with lease("nvidia", 0, "serving"):
        assert (tmp_path / "shared/nvidia-0.lease").exists()


@pytest.mark.parametrize(
    ("vendor", "environ", "number"),
    [
        ("nvidia", {}, 1),
        ("nvidia", {"CUDA_VISIBLE_DEVICES": "2,3", "HIP_VISIBLE_DEVICES": "7,8"}, 3),
        ("amd", {"HIP_VISIBLE_DEVICES": "5, 4", "CUDA_VISIBLE_DEVICES": "0"}, 4),
        ("amd", {"ROCR_VISIBLE_DEVICES": "6,7,8", "HIP_VISIBLE_DEVICES": "0,2"}, 8),
        ("amd", {"CUDA_VISIBLE_DEVICES": "2,3", "HIP_VISIBLE_DEVICES": ""}, 3),
        ("nvidia", {"CUDA_VISIBLE_DEVICES": "GPU-8932f937,MIG-5"}, 1),
        ("nvidia", {"CUDA_VISIBLE_DEVICES": "3"}, 1),
    ],
)
def test_card_is_counted_among_all_that_there_are(vendor: Vendor, environ: dict[str, str], number: int) -> None:
    """Two trainings, each on the card that its variable names, do not hold the same one."""
    assert gpu.number_of(1, vendor, environ) == number


def mixed() -> list[Gpu]:
    """Two NVIDIA cards, one of AMD, and the graphics inside a processor."""
    made: list[tuple[Vendor, int, int, str]] = [("nvidia", 0, 8, "GPU-a1"), ("nvidia", 1, 8, "GPU-b2")]
    made += [("amd", 0, 16, ""), ("amd", 1, 1, "")]
    return [
        Gpu(index=index, vendor=vendor, name="", memory_total_bytes=gib << 30, memory_used_bytes=0, uuid=uuid)
        for vendor, index, gib, uuid in made
    ]


@pytest.mark.parametrize(
    ("built", "environ", "names"),
    [
        (None, {}, ["nvidia-0", "nvidia-1", "amd-0"]),
        ("nvidia", {}, ["nvidia-0", "nvidia-1"]),
        ("amd", {}, ["amd-0"]),
        ("amd", {"HIP_VISIBLE_DEVICES": "1"}, ["amd-1"]),
        ("nvidia", {"CUDA_VISIBLE_DEVICES": "1"}, ["nvidia-1"]),
        ("nvidia", {"CUDA_VISIBLE_DEVICES": "GPU-b"}, ["nvidia-1"]),
        ("nvidia", {"CUDA_VISIBLE_DEVICES": "MIG-5"}, ["nvidia-0", "nvidia-1"]),
        ("nvidia", {"CUDA_VISIBLE_DEVICES": "0,-1,1"}, ["nvidia-0"]),
        ("nvidia", {"CUDA_VISIBLE_DEVICES": ""}, []),
        ("nvidia", {"ROCR_VISIBLE_DEVICES": "", "HIP_VISIBLE_DEVICES": "7"}, ["nvidia-0", "nvidia-1"]),
        ("amd", {"ROCR_VISIBLE_DEVICES": "", "CUDA_VISIBLE_DEVICES": ""}, ["amd-0"]),
        ("amd", {"ROCR_VISIBLE_DEVICES": "1,0", "HIP_VISIBLE_DEVICES": "1"}, ["amd-0"]),
    ],
)
def test_cards_that_a_build_computes_on(built: Vendor | None, environ: dict[str, str], names: list[str]) -> None:
    """Others are neither planned for nor held nor looked at for what they were compiled for."""
    assert [f"{card.vendor}-{card.index}" for card in gpu.computed_on(mixed(), environ, built)] == names


def test_cuda_counts_as_the_driver_does(monkeypatch: pytest.MonkeyPatch) -> None:
    """Else `CUDA_VISIBLE_DEVICES=0` is the fastest card, and the plan looks at another one."""
    monkeypatch.delenv("CUDA_DEVICE_ORDER", raising=False)
    assert config.quiet_environment()["CUDA_DEVICE_ORDER"] == "PCI_BUS_ID"
    monkeypatch.setenv("CUDA_DEVICE_ORDER", "FASTEST_FIRST")
    assert config.quiet_environment()["CUDA_DEVICE_ORDER"] == "FASTEST_FIRST", "it was set by hand"


def test_cards_of_another_vendor_alone_are_still_spoken_of() -> None:
    assert gpu.computed_on(mixed()[2:], {}, "nvidia") == mixed()[2:3]
    assert gpu.computed_on(mixed()[3:], {}, "amd") == mixed()[3:]


def test_vendor_that_llama_cpp_was_compiled_for(tmp_path: Path) -> None:
    """By what an image says, else by the libraries that lie there."""
    assert gpu.built_for({ARCHITECTURES: "75-real;86-real"}, tmp_path) == "nvidia"
    assert gpu.built_for({ARCHITECTURES: "gfx1101"}, tmp_path) == "amd"
    assert gpu.built_for({}, tmp_path) is None
    write(tmp_path, {"lib/libggml-hip.so.0": ""})
    assert gpu.built_for({}, tmp_path) == "amd"
    write(tmp_path, {"lib/libggml-cuda.so": ""})
    assert gpu.built_for({}, tmp_path) is None


def test_cards_of_two_vendors_have_leases_of_their_own(tmp_path: Path) -> None:
    with lease("nvidia", 0, "serving", tmp_path), lease("amd", 0, "training", tmp_path):
        assert {path.name for path in tmp_path.iterdir()} == {"nvidia-0.lease", "amd-0.lease"}


@pytest.mark.parametrize(("folder_mode", "mode"), [(0o700, 0o600), (0o755, 0o600), (0o775, 0o660), (0o1777, 0o666)])
def test_whoever_may_write_the_folder_may_take_the_lease(folder_mode: int, mode: int, tmp_path: Path) -> None:
    """A server of the system's and a person who trains share one; the leases of a person are nobody else's."""
    folder = tmp_path / "leases"
    folder.mkdir()
    folder.chmod(folder_mode)
    before = os.umask(0o077)
    try:
        with lease("nvidia", 0, "serving", folder):
            pass
    finally:
        os.umask(before)
    assert stat.S_IMODE((folder / "nvidia-0.lease").stat().st_mode) == mode


def test_lease_that_cannot_be_written_is_said_with_its_remedy(tmp_path: Path) -> None:
    (tmp_path / "no folder").touch()
    said = r"lease of GPU nvidia-3, .* cannot be written .* APPLIANCE_LEASES"
    with pytest.raises(EnvironmentIncomplete, match=said) as caught:
        lease("nvidia", 3, "training", tmp_path / "no folder" / "gpu").__enter__()
    assert "Not a directory" in str(caught.value)


def test_image_that_has_no_code_for_one_of_the_cards(monkeypatch: pytest.MonkeyPatch) -> None:
    """A processor's own graphics do not count: nothing is put there as long as there is a card."""

    def card(architecture: str, memory_bytes: int = 8 << 30) -> Gpu:
        vendor: Any = "amd" if "gfx" in architecture else "nvidia"
        return Gpu(
            index=0, vendor=vendor, name="", memory_total_bytes=memory_bytes, memory_used_bytes=0, architecture=architecture
        )

    monkeypatch.setenv(ARCHITECTURES, "75-real;86-real;gfx1101")
    assert gpu.is_compiled_for([card("75"), card("86")])
    assert not gpu.is_compiled_for([card("61"), card("86")])
    assert gpu.is_compiled_for([card("gfx1101"), card("gfx1036", 512 * MIB)])
    monkeypatch.delenv(ARCHITECTURES)
    assert gpu.is_compiled_for([card("61")])


def test_this_machine() -> None:
    """Whatever it has: nothing raises."""
    assert all(card.memory_total_bytes >= card.memory_free_bytes for card in gpu.gpus())
