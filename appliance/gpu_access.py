"""Whether this process can use the machine's cards, and what is in the way: `problems`. No torch, no llama.cpp.

A card that nobody can use is found on the PCI bus all the same, so that computing on the CPU is never a silent surprise.
"""

import dataclasses
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Literal

from appliance import device

Vendor = Literal["nvidia", "amd"]
PCI_VENDORS: Mapping[str, Vendor] = {"0x10de": "nvidia", "0x1002": "amd"}
DISPLAY_CLASS = "0x03"
LEAST_CARD_BYTES = 2 << 30  # graphics inside a processor carve less out of its memory, and compute nothing faster
Backend = Literal["cpu", "cuda", "rocm"]
NVIDIA_IN_DOCKER = ("--gpus", "all")
NVIDIA_IN_PODMAN = ("--device", "nvidia.com/gpu=all")  # by CDI: podman takes `--gpus` and does nothing
CDI_FOLDERS = ("etc/cdi", "var/run/cdi")  # https://github.com/cncf-tags/container-device-interface: where engines look
CDI_REMEDY = "`sudo nvidia-ctk cdi generate --output=/etc/cdi/nvidia.yaml` on the host makes it (NVIDIA Container Toolkit)"
UNMAPPED_GROUP = 65534  # of all that are not in a rootless container's table
OVERRIDE = "HSA_OVERRIDE_GFX_VERSION"  # AMD's driver then takes every card for this one: 11.0.0 is gfx1100
PLAIN_TARGET = re.compile(r"gfx[0-9a-f]+|[0-9]+[a-z]?(-real|-virtual)?")  # others are words for several cards
ARCHITECTURES = "APPLIANCE_GPU_ARCHITECTURES"  # what the image's llama.cpp was compiled for, as CMake was told


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Problem:
    what: str
    remedy: str

    def __str__(self) -> str:
        return f"{self.what}; {self.remedy}."


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class TorchBuild:
    """What torch says of itself. `architectures` are those that it has code for, as it names them: sm_86, gfx1101."""

    version: str
    backend: Backend
    finds_card: bool
    architectures: Sequence[str] = ()


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Host:
    """Where to look. Another one stands in for it in tests."""

    sys: Path = Path("/sys")
    dev: Path = Path("/dev")
    root: Path = Path("/")

    @property
    def is_container(self) -> bool:
        return self.is_podman or (self.root / ".dockerenv").exists()

    @property
    def is_podman(self) -> bool:
        return (self.root / "run/.containerenv").exists()


THIS_HOST = Host()


def vendors(host: Host = THIS_HOST) -> Sequence[Vendor]:
    """Of the graphics cards on the bus, but for those inside a processor, as far as their driver tells."""
    return list(dict.fromkeys(vendor for vendor, is_integrated in _graphics(host) if not is_integrated))


def backend(host: Host = THIS_HOST) -> Backend:
    """What is installed and built for here: by the drivers' device files, without which no card can be used."""
    amd = [is_integrated for vendor, is_integrated in _graphics(host) if vendor == "amd"]
    if (host.dev / "kfd").exists() and not (amd and all(amd)):
        return "rocm"
    return "cuda" if any(host.dev.glob("nvidia[0-9]*")) else "cpu"


def problems(
    host: Host = THIS_HOST,
    *,
    seen: int,
    capabilities: Sequence[str] = (),
    can_offload: bool | None = None,
    compiled: str | None = None,
    torch: TorchBuild | None = None,
) -> Sequence[Problem]:
    """What keeps the cards on the bus from being used; nothing where there is none.

    `seen` is the number of cards that drivers describe, `capabilities` their architectures ("86", "gfx1101"), `compiled`
    those of this llama.cpp as CMake was told. `can_offload` and `torch` are None where llama.cpp or torch were not asked.
    """
    found: list[Problem] = []
    present = vendors(host)
    if "nvidia" in present:
        found += _nvidia(host, seen)
    if "amd" in present:
        found += _amd(host)
    is_reachable = bool(present) and not found
    if is_reachable and can_offload is False:
        found.append(_on_the_cpu(present, compiled))
    if is_reachable and torch is not None and not torch.finds_card:
        found.append(_trains_on_the_cpu(present, torch))
    if compiled and not present and not seen and not capabilities:
        what = f"This image is made for cards ({compiled}), and there is none here"
        found.append(Problem(what=what, remedy="use edge-appliance:cpu, which is smaller, or put the card in"))
    found += [_not_compiled_for(each, compiled) for each in capabilities if compiled and not is_compiled_for(each, compiled)]
    if torch is not None and torch.architectures:
        found += [_not_in_torch(each, torch) for each in capabilities if not is_in_torch(each, torch.architectures)]
    return found


def groups(host: Host = THIS_HOST) -> Sequence[int]:
    """The groups that own AMD's device files: a container needs their numbers, which differ from host to host."""
    files = [host.dev / "kfd", *sorted((host.dev / "dri").glob("renderD*")), *sorted((host.dev / "dri").glob("card*"))]
    return list(dict.fromkeys(path.stat().st_gid for path in files if path.exists()))


def amd_architectures(host: Host = THIS_HOST) -> Mapping[str, str]:
    """`gfx1101` by `renderD128`, from https://docs.kernel.org/gpu/amdgpu; the kernel writes it as 110001."""
    found = {}
    override = os.environ.get(OVERRIDE)
    for path in sorted((host.sys / "class/kfd/kfd/topology/nodes").glob("*/properties")):
        lines = dict(line.split(maxsplit=1) for line in (device.read_text(path) or "").splitlines() if " " in line)
        version = int(lines.get("gfx_target_version", "0"))
        if version:
            major, minor, step = version // 10000, version // 100 % 100, version % 100
            if override:  # the owner's word, for a card that nothing was compiled for
                major, minor, step = (int(part) if part.isdigit() else 0 for part in f"{override}..".split(".")[:3])
            found[f"renderD{lines.get('drm_render_minor', '')}"] = f"gfx{major}{minor:x}{step:x}"
    return found


def is_compiled_for(capability: str, compiled: str) -> bool:
    """Whether one of CMake's targets runs on a card: "gfx1101" by name, "86" also through an older "80-virtual".

    Also where that cannot be told: `native` or `all-major` may name it, and no build is refused by a guess.
    """
    targets = [each.partition(":")[0] for each in re.split(r"[;,\s]+", compiled.strip())]  # gfx90a:xnack-
    if any(not PLAIN_TARGET.fullmatch(each) for each in targets if each):
        return True
    if capability.startswith("gfx"):
        return capability in targets
    card = int(capability)
    for target in targets:
        if target.startswith("gfx"):
            continue
        number, _, kind = target.partition("-")
        digits = re.sub(r"\D", "", number)
        if not digits:
            continue
        # Machine code runs on its own generation from its own version on, an intermediate form on all later cards.
        if kind != "virtual" and int(digits) // 10 == card // 10 and int(digits) <= card:
            return True
        if kind != "real" and int(digits) <= card:
            return True
    return False


def is_in_torch(capability: str, architectures: Sequence[str]) -> bool:
    """The same for torch, which calls machine code `sm_86` and its intermediate form `compute_90`."""
    kinds = {"sm": "real", "compute": "virtual"}
    named = (each.partition("_") for each in architectures)
    targets = [f"{tail}-{kinds[head]}" if head in kinds else head for head, _, tail in named]
    return is_compiled_for(capability, ";".join(targets))


def _graphics(host: Host) -> Iterator[tuple[Vendor, bool]]:
    """The vendor of each on the bus, and whether it is inside a processor; amdgpu tells memory in the device's folder."""
    for folder in sorted((host.sys / "bus/pci/devices").glob("*")):
        vendor = PCI_VENDORS.get(device.read_text(folder / "vendor") or "")
        if vendor is not None and (device.read_text(folder / "class") or "").startswith(DISPLAY_CLASS):
            memory = device.read_number(folder / "mem_info_vram_total")
            yield vendor, memory is not None and memory < LEAST_CARD_BYTES


def _nvidia(host: Host, seen: int) -> list[Problem]:
    if not (host.root / "proc/driver/nvidia/version").exists():
        return [Problem(what="There is an NVIDIA card, and its driver is not loaded", remedy=_driver("nvidia-driver"))]
    control = host.dev / "nvidiactl"
    if not control.exists():
        remedy = _nvidia_in_container(host) if host.is_container else "run `nvidia-modprobe -u -c=0`, which makes it"
        return [Problem(what=f"{control} is missing", remedy=remedy)]
    if not os.access(control, os.R_OK | os.W_OK):
        return [
            Problem(
                what=f"{control} may not be opened by user {os.getuid()}", remedy="run `ls -l` on it, and join its group"
            )
        ]
    if not seen:
        remedy = (
            "start the container with `-e NVIDIA_DRIVER_CAPABILITIES=compute,utility`"
            if host.is_container
            else ("install the driver's library (Debian: libnvidia-ml1)")
        )
        return [Problem(what="The NVIDIA driver's library cannot be used here", remedy=remedy)]
    return []


def _nvidia_in_container(host: Host) -> str:
    if host.is_podman:
        return f"start the container with `{' '.join(NVIDIA_IN_PODMAN)}`; {CDI_REMEDY}"
    return f"start the container with `{' '.join(NVIDIA_IN_DOCKER)}` (the host needs the NVIDIA Container Toolkit)"


def podman_problem(host: Host = THIS_HOST) -> Problem | None:
    """Why podman could not give a container NVIDIA's cards: it knows them by a file that the driver does not bring."""
    files = [path for name in CDI_FOLDERS for path in (host.root / name).glob("*") if path.suffix in (".yaml", ".json")]
    if any("nvidia.com/gpu" in (device.read_text(path) or "") for path in files):
        return None
    looked = " or ".join(f"/{name}" for name in CDI_FOLDERS)
    return Problem(what=f"podman knows no NVIDIA card: nothing in {looked} describes one", remedy=CDI_REMEDY)


def _amd(host: Host) -> list[Problem]:
    kfd = host.dev / "kfd"
    devices = "--device /dev/kfd --device /dev/dri"
    if not kfd.exists():
        remedy = f"start the container with `{devices}`" if host.is_container else _driver("firmware-amd-graphics")
        return [Problem(what=f"There is an AMD card, and {kfd} is missing", remedy=remedy)]
    nodes = [kfd, *sorted((host.dev / "dri").glob("renderD*"))]
    found = []
    for node in nodes:
        if not os.access(node, os.R_OK | os.W_OK):
            group = node.stat().st_gid
            if host.is_container:
                remedy = f"start the container with `--group-add {group}`, the number of its group on the host"
                if host.is_podman:
                    remedy += ", or as an ordinary user with `--group-add keep-groups`"
            else:
                remedy = f"join its group: `sudo usermod -aG {group} USER`, and log in again"
            found.append(Problem(what=f"{node} may not be opened by user {os.getuid()}", remedy=remedy))
    if len(nodes) == 1:
        found.append(Problem(what=f"There is no {host.dev / 'dri'}/renderD*", remedy=f"pass both: `{devices}`"))
    return found


def _on_the_cpu(present: Sequence[Vendor], compiled: str | None) -> Problem:
    """For a llama.cpp that finds no card, though nothing else is in its way."""
    if compiled:
        # https://docs.nvidia.com/deploy/cuda-compatibility: any CUDA 12 runs on that driver and later ones.
        remedy = "update its driver on the host (CUDA 12 needs 525.60.13 or later)"
        return Problem(what="There is a GPU, and llama.cpp's library for it finds none", remedy=remedy)
    backend = "cuda" if "nvidia" in present else "rocm"
    remedy = f"use the image edge-appliance:{backend}, or repeat `make setup BACKEND={backend}` with its CMAKE_ARGS"
    return Problem(what="There is a GPU, and this llama.cpp computes on the CPU only", remedy=remedy)


def _trains_on_the_cpu(present: Sequence[Vendor], torch: TorchBuild) -> Problem:
    if torch.backend != "cpu":
        remedy = "update its driver on the host, and see CUDA_VISIBLE_DEVICES or HIP_VISIBLE_DEVICES"
        return Problem(what=f"There is a GPU, and torch {torch.version} for {torch.backend} finds none", remedy=remedy)
    backend = "cuda" if "nvidia" in present else "rocm"
    remedy = f"use the image edge-appliance:{backend}-train, or repeat `make setup BACKEND={backend}` with its TORCH_INDEX"
    return Problem(what=f"There is a GPU, and this torch ({torch.version}) trains on the CPU only", remedy=remedy)


def _not_in_torch(capability: str, torch: TorchBuild) -> Problem:
    name = capability if capability.startswith("gfx") else f"sm_{capability}"
    return Problem(
        what=f"torch {torch.version} was compiled for {', '.join(torch.architectures)}, and the card is {name}",
        remedy="take a build that has it: `make setup` with TORCH_INDEX=…, or an image with `--build-arg TORCH_INDEX=…`",
    )


def _driver(package: str) -> str:
    return f"install it on the host (Debian: {package}, from non-free-firmware or non-free) and restart"


def _not_compiled_for(capability: str, compiled: str) -> Problem:
    name, argument = (
        (capability, "AMDGPU_TARGETS") if capability.startswith("gfx") else (f"sm_{capability}", "CUDA_ARCHITECTURES")
    )
    return Problem(
        what=f"This llama.cpp was compiled for {compiled}, and the card is {name}",
        remedy=f"build the image with `--build-arg {argument}=…` that has it",
    )
