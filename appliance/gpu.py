"""GPUs as their drivers describe them, and the lease that keeps training and serving off the same card. No torch import.

NVIDIA through NVML, AMD through sysfs. A machine without a GPU or driver has none, which is no error. Which of several cards
llama.cpp computes on is known here (`computed_on`), and not whether it can.
"""

import contextlib
import dataclasses
import fcntl
import importlib.util
import json
import os
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from appliance import device, gpu_access
from appliance.config import lease_folder
from appliance.errors import EnvironmentIncomplete
from appliance.gpu_access import Vendor

DRM = Path("/sys/class/drm")
AMD_VENDOR = "0x1002"
MIB = 1 << 20
LIBRARIES: Mapping[Vendor, str] = {"nvidia": "libggml-cuda.so*", "amd": "libggml-hip.so*"}


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Gpu:
    """One card, now; `index` counts within its vendor, as CUDA and ROCm do. None: the driver does not say."""

    index: int
    vendor: Vendor
    name: str
    memory_total_bytes: int
    memory_used_bytes: int
    utilisation_ratio: float | None = None
    temperature_celsius: float | None = None
    architecture: str | None = None  # "86" is an RTX 3050, "60" a P100, "gfx1101" an RX 7800 XT
    uuid: str = ""  # "GPU-8932f937-…", where the driver says it

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


def number_of(index: int, vendor: Vendor, environ: Mapping[str, str], cards: Sequence[Gpu] = ()) -> int:
    """The number of a process's card among all of its vendor's; the same where variables name cards that nobody knows."""
    visible = _visible(vendor, environ, cards) or ()
    return visible[index] if index < len(visible) else index


def computing() -> Sequence[Gpu]:
    """This machine's cards that this llama.cpp would compute on, if it can."""
    return computed_on(gpus(), os.environ, built_for(os.environ))


def computed_on(cards: Sequence[Gpu], environ: Mapping[str, str], vendor: Vendor | None) -> Sequence[Gpu]:
    """Those of a build's vendor that no variable hides; a processor's own graphics only where there is no other.

    A build whose vendor has no card here leaves those of others, so that somebody says why they are not used.
    """
    left = [card for card in cards if vendor in (None, card.vendor)] or cards
    visible = {each: _visible(each, environ, cards) for each in LIBRARIES}
    left = [card for card in left if (named := visible[card.vendor]) is None or card.index in named]
    return [card for card in left if not card.is_integrated] or left


def built_for(environ: Mapping[str, str], package: Path | None = None) -> Vendor | None:
    """Whose cards this llama.cpp was compiled for; None for the CPU alone, or for several. Loads nothing."""
    if compiled := environ.get(gpu_access.ARCHITECTURES):
        return "amd" if "gfx" in compiled else "nvidia"
    if package is None:
        found = importlib.util.find_spec("llama_cpp")
        if found is None or found.origin is None:
            return None
        package = Path(found.origin).parent
    built = [vendor for vendor, name in LIBRARIES.items() if any((package / "lib").glob(name))]
    return built[0] if len(built) == 1 else None


def _visible(vendor: Vendor, environ: Mapping[str, str], cards: Sequence[Gpu]) -> Sequence[int] | None:
    """The numbers of the cards that variables leave, in their order; None where there are none, or for unknown names.

    ROCm hides cards twice: the second variable counts among those that the first one left. One that is empty hides all from
    CUDA; HIP passes over it.
    """
    own = [card for card in cards if card.vendor == vendor]
    if vendor == "nvidia":
        text = environ.get("CUDA_VISIBLE_DEVICES")
        return None if text is None else _named(text, None, own)
    first = environ.get("ROCR_VISIBLE_DEVICES")
    second = environ.get("HIP_VISIBLE_DEVICES") or environ.get("CUDA_VISIBLE_DEVICES")
    among = _named(first, None, own) if first else None
    if not second or (first and among is None):
        return among
    return _named(second, among, own)


def _named(text: str, among: Sequence[int] | None, cards: Sequence[Gpu]) -> Sequence[int] | None:
    """As CUDA reads it: the first word that is no card ends the list."""
    found: list[int] = []
    for word in map(str.strip, text.split(",")):
        if word.startswith(("GPU-", "MIG-")):  # the beginning of a UUID is enough
            fitting = [card.index for card in cards if card.uuid.startswith(word)]
            if len(fitting) != 1:
                return None
            found += fitting
        elif word.isdigit() and (among is None or int(word) < len(among)):
            found.append(int(word) if among is None else among[int(word)])
        else:
            break
    return found


@contextlib.contextmanager
def lease(vendor: Vendor, index: int, purpose: str, folder: Path | None = None) -> Iterator[None]:
    """Holds a card for this process until the block or the process ends, however it ends.

    Raises `EnvironmentIncomplete` naming the holder when another process has it, and where no lease can be written. The lock
    is the kernel's, so a holder that died has let go; the text inside is only for people.
    """
    path = (lease_folder() if folder is None else folder) / f"{vendor}-{index}.lease"
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
        capabilities=architectures(computed_on(cards, os.environ, built_for(os.environ))),
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
    uuid = told(nvml.nvmlDeviceGetUUID) or ""
    return Gpu(
        index=index,
        vendor="nvidia",
        name=name.decode(errors="replace") if isinstance(name, bytes) else name,
        memory_total_bytes=0 if memory is None else int(memory.total),
        memory_used_bytes=0 if memory is None else int(memory.used),
        utilisation_ratio=None if rates is None else rates.gpu / 100,
        temperature_celsius=None if temperature is None else float(temperature),
        architecture=None if capability is None else "{}{}".format(*capability),
        uuid=uuid.decode(errors="replace") if isinstance(uuid, bytes) else uuid,
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
