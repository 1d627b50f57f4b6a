"""GPUs as their drivers describe them, and the lease that keeps training and serving off the same card. No torch import.

NVIDIA through NVML, AMD through sysfs. A machine without a GPU or driver has none, which is no error. Whether llama.cpp or
torch can use a card is not known here.
"""

import contextlib
import dataclasses
import fcntl
import json
import os
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

from appliance import device, gpu_access
from appliance.config import lease_folder
from appliance.errors import EnvironmentIncomplete

DRM = Path("/sys/class/drm")
AMD_VENDOR = "0x1002"
MIB = 1 << 20


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Gpu:
    """One card, now; `index` counts within its vendor, as CUDA and ROCm do. None: the driver does not say."""

    index: int
    vendor: Literal["nvidia", "amd"]
    name: str
    memory_total_bytes: int
    memory_used_bytes: int
    utilisation_ratio: float | None = None
    temperature_celsius: float | None = None
    architecture: str | None = None  # "86" is an RTX 3050, "60" a P100, "gfx1101" an RX 7800 XT

    @property
    def is_integrated(self) -> bool:
        """Inside a processor: as long as there is a card, llama.cpp puts nothing there."""
        return self.vendor == "amd" and self.memory_total_bytes < gpu_access.LEAST_CARD_BYTES

    @property
    def memory_free_bytes(self) -> int:
        return max(0, self.memory_total_bytes - self.memory_used_bytes)

    def __str__(self) -> str:
        free, total = self.memory_free_bytes // MIB, self.memory_total_bytes // MIB
        return f"GPU {self.index} ({self.name}, {free} of {total} MiB free)"


def gpus(drm: Path = DRM, nvml: Any = None, host: gpu_access.Host = gpu_access.THIS_HOST) -> Sequence[Gpu]:
    """All cards of the machine; `nvml` stands in for the module `pynvml`."""
    return [*_nvidia(nvml), *_amd(drm, gpu_access.amd_architectures(host))]


def number_of(index: int, environ: Mapping[str, str]) -> int:
    """The number of a process's card among all of the machine's; the same where its variable names cards otherwise."""
    visible = environ.get("HIP_VISIBLE_DEVICES") or environ.get("CUDA_VISIBLE_DEVICES") or ""
    named = [each.strip() for each in visible.split(",")]
    return int(named[index]) if index < len(named) and named[index].isdigit() else index


@contextlib.contextmanager
def lease(index: int, purpose: str, folder: Path | None = None) -> Iterator[None]:
    """Holds a card for this process until the block or the process ends, however it ends.

    Raises `EnvironmentIncomplete` naming the holder when another process has it, and where no lease can be written. The lock
    is the kernel's, so a holder that died has let go; the text inside is only for people.
    """
    path = (lease_folder() if folder is None else folder) / f"{index}.lease"
    descriptor = _open(path)
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise EnvironmentIncomplete(
                f"GPU {index} is held by {_holder(descriptor)} (lease {path}); "
                "wait until it ends, stop it, or go without the GPU."
            ) from None
        _write_holder(descriptor, purpose)
        try:
            yield
        finally:
            os.ftruncate(descriptor, 0)
    finally:
        os.close(descriptor)


def _open(path: Path) -> int:
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with contextlib.suppress(FileExistsError):
            made = os.open(path, os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
            writers = path.parent.stat().st_mode & 0o022  # whoever may make a lease there may take this one
            os.fchmod(made, 0o600 | writers | writers << 1)
            os.close(made)
        return os.open(path, os.O_RDWR | os.O_CLOEXEC)
    except OSError as error:
        raise EnvironmentIncomplete(
            f"The lease of GPU {path.stem}, {path}, cannot be written by user {os.getuid()} ({error.strerror}), and without "
            "it training and serving could fill the card at once; name a folder that he may write with APPLIANCE_LEASES."
        ) from error


def _write_holder(descriptor: int, purpose: str) -> None:
    holder = {"pid": os.getpid(), "purpose": purpose, "since": int(time.time())}
    os.ftruncate(descriptor, 0)
    os.pwrite(descriptor, json.dumps(holder).encode(), 0)


def _holder(descriptor: int) -> str:
    text = os.pread(descriptor, 4096, 0)
    try:
        holder = json.loads(text)
        since = time.strftime("%Y-%m-%d %H:%M", time.localtime(holder["since"]))
        return f"{holder['purpose']!r}, process {holder['pid']}, since {since}"
    except (ValueError, KeyError, TypeError):  # it has the lock and has not written yet
        return "another process"


def _nvidia(nvml: Any) -> Iterator[Gpu]:
    nvml = nvml or _nvml()
    if nvml is None:
        return
    try:
        nvml.nvmlInit()  # never shut down: once started it answers in microseconds, and metrics ask often
        count = nvml.nvmlDeviceGetCount()
    except nvml.NVMLError:  # no driver or no card
        return
    for index in range(count):
        with contextlib.suppress(nvml.NVMLError):  # a card that fell off the bus
            yield _nvidia_card(nvml, index)


def problems(*, can_offload: bool | None = None, torch: gpu_access.TorchBuild | None = None) -> Sequence[gpu_access.Problem]:
    """What keeps this machine's cards from being used; `can_offload`: whether llama.cpp could, None if it was not asked."""
    cards = gpus()
    return gpu_access.problems(
        seen=sum(card.vendor == "nvidia" for card in cards),
        capabilities=architectures(cards),
        can_offload=can_offload,
        compiled=os.environ.get(gpu_access.ARCHITECTURES),
        torch=torch,
    )


def architectures(cards: Sequence[Gpu]) -> Sequence[str]:
    """Of those that llama.cpp and torch would compute on, as far as their drivers tell."""
    return list(dict.fromkeys(card.architecture for card in cards if card.architecture and not card.is_integrated))


def is_compiled_for(cards: Sequence[Gpu]) -> bool:
    """Whether this image's llama.cpp has code for all of them; outside an image it was compiled here, for what is here.

    All, since llama.cpp spreads layers over every card that it sees, and ends on the first that it has no code for.
    """
    compiled = os.environ.get(gpu_access.ARCHITECTURES)
    return not compiled or all(gpu_access.is_compiled_for(each, compiled) for each in architectures(cards))


def _nvml() -> Any:
    try:
        import pynvml
    except ImportError:  # serving installs it, training and conversion alone need not
        return None
    return pynvml


def _nvidia_card(nvml: Any, index: int) -> Gpu:
    handle = nvml.nvmlDeviceGetHandleByIndex(index)
    name = nvml.nvmlDeviceGetName(handle)

    def told(ask: Any, *arguments: Any) -> Any:
        try:
            return ask(handle, *arguments)
        except nvml.NVMLError:  # cards differ in what they can tell
            return None

    memory = told(nvml.nvmlDeviceGetMemoryInfo)  # not of a card that shares the machine's memory
    rates = told(nvml.nvmlDeviceGetUtilizationRates)
    temperature = told(nvml.nvmlDeviceGetTemperature, nvml.NVML_TEMPERATURE_GPU)
    capability = told(nvml.nvmlDeviceGetCudaComputeCapability)
    return Gpu(
        index=index,
        vendor="nvidia",
        name=name.decode(errors="replace") if isinstance(name, bytes) else name,
        memory_total_bytes=0 if memory is None else int(memory.total),
        memory_used_bytes=0 if memory is None else int(memory.used),
        utilisation_ratio=None if rates is None else rates.gpu / 100,
        temperature_celsius=None if temperature is None else float(temperature),
        architecture=None if capability is None else "{}{}".format(*capability),
    )


def _amd(drm: Path, architectures: Mapping[str, str]) -> Iterator[Gpu]:
    """Cards of AMD by the files of the kernel's amdgpu driver; one without memory of its own reports a carve-out."""
    cards = (path for path in drm.glob("card[0-9]*") if path.name.removeprefix("card").isdigit())
    folders = [path / "device" for path in sorted(cards, key=lambda path: int(path.name.removeprefix("card")))]
    described = (folder for folder in folders if device.read_text(folder / "vendor") == AMD_VENDOR)
    with_memory = (folder for folder in described if device.read_number(folder / "mem_info_vram_total") is not None)
    for index, folder in enumerate(with_memory):
        busy = device.read_number(folder / "gpu_busy_percent")
        millidegrees = next((device.read_number(path) for path in sorted(folder.glob("hwmon/hwmon*/temp*_input"))), None)
        yield Gpu(
            index=index,
            vendor="amd",
            name=device.read_text(folder / "product_name") or _pci_name(folder),
            memory_total_bytes=device.read_number(folder / "mem_info_vram_total") or 0,
            memory_used_bytes=device.read_number(folder / "mem_info_vram_used") or 0,
            utilisation_ratio=None if busy is None else busy / 100,
            temperature_celsius=None if millidegrees is None else millidegrees / 1000,
            architecture=next((architectures.get(path.name) for path in folder.glob("drm/renderD*")), None),
        )


def _pci_name(folder: Path) -> str:
    """`AMD 1002:73BF`, from the lines of uevent."""
    lines = dict(line.partition("=")[::2] for line in (device.read_text(folder / "uevent") or "").splitlines())
    return f"AMD {lines.get('PCI_ID', 'GPU')}"
