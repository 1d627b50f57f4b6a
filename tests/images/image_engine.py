"""podman with storage and settings of its own, and a base image that comes from Debian's packages.

What works on a machine without a container daemon, systemd or a registry: to build with chroot isolation, to run with runc.
"""

import dataclasses
import json
import os
import re
import shutil
import subprocess
import sys
import tarfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from appliance import containers, images
from appliance.config import cache_root
from appliance.errors import ApplianceError, EnvironmentIncomplete

TOOLS = ("podman", "runc", "conmon", "mmdebstrap")
PACKAGES = "podman runc conmon netavark aardvark-dns catatonit iptables uidmap mmdebstrap"
APT_SOURCES = (Path("/etc/apt/sources.list.d/debian.sources"), Path("/etc/apt/sources.list"))
BASES = {"amd64": "localhost/appliance-base:bookworm", "arm64": "localhost/appliance-base:bookworm-arm64"}
BASE = BASES["amd64"]
SUITE = "bookworm"
BUILD_SECONDS = 1800.0
COMMAND_SECONDS = 300.0
STORAGE = '[storage]\ndriver="overlay"\ngraphroot="{0}/storage"\nrunroot="{0}/run"\n'
CONTAINERS = (
    '[containers]\ndefault_ulimits=["nofile=4096:4096","nproc=4096:4096"]\n'
    '[engine]\ncgroup_manager="cgroupfs"\nruntime="runc"\nevents_logger="file"\n[network]\nnetwork_backend="netavark"\n'
)
# pip trusts what this machine trusts; the file is a secret of the build and does not stay in the image.
PIP_CONFIG = "[global]\ncert=/etc/ssl/certs/ca-certificates.crt\ntimeout=180\n"
CERTIFICATES = "/etc/ssl/certs:/etc/ssl/certs:ro"


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Layer:
    size_bytes: int  # compressed
    made_by: str


def wheel_folders() -> Sequence[Path]:
    """Those that this machine's pip is told to look into: torch without CUDA may lie there."""
    command = [sys.executable, "-m", "pip", "config", "list"]
    told = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    found = {Path(each) for value in re.findall(r"find-links='([^']*)'", told) for each in value.split()}
    return sorted(folder for folder in found if folder.is_dir())


class ImageEngine:
    def __init__(self) -> None:
        """Raises `EnvironmentIncomplete` with what has to be installed."""
        if missing := [name for name in TOOLS if shutil.which(name) is None]:
            remedy = f"on Debian: apt-get install --no-install-recommends {PACKAGES}"
            raise EnvironmentIncomplete(f"{', '.join(missing)} not installed, which building images takes; {remedy}.")
        self.folder = cache_root() / "images"
        self.folder.mkdir(parents=True, exist_ok=True)
        (self.folder / "storage.conf").write_text(STORAGE.format(self.folder))
        (self.folder / "containers.conf").write_text(CONTAINERS)
        self._wheel_folders = wheel_folders()
        links = "".join(f"\n  {folder}" for folder in self._wheel_folders)
        (self.folder / "pip.conf").write_text(PIP_CONFIG + (f"find-links ={links}\n" if links else ""))
        own = {
            "CONTAINERS_STORAGE_CONF": str(self.folder / "storage.conf"),
            "CONTAINERS_CONF": str(self.folder / "containers.conf"),
            "BUILDAH_ISOLATION": "chroot",
        }
        self.environment: Mapping[str, str] = {**os.environ, **own}

    def run(
        self, *command: str | Path, log: Path | None = None, seconds: float = COMMAND_SECONDS, is_checked: bool = True
    ) -> "subprocess.CompletedProcess[str]":
        """Runs a command to its end; raises `ApplianceError` with its last lines when it fails."""
        words = [str(part) for part in command]
        try:
            result = subprocess.run(words, env=self.environment, capture_output=True, text=True, timeout=seconds)
        except subprocess.TimeoutExpired as error:
            raise ApplianceError(f"`{' '.join(words[:4])} …` took longer than {seconds:.0f} s.") from error
        if log is not None:
            log.write_text(result.stdout + result.stderr)
        if is_checked and result.returncode:
            last = "\n".join((result.stdout + result.stderr).strip().splitlines()[-15:])
            raise ApplianceError(f"`{' '.join(words[:4])} …` failed with {result.returncode}:\n{last}")
        return result

    def ensure_base(self, architecture: str = "amd64") -> None:
        """A minimal Debian, made from packages once."""
        base = BASES[architecture]
        if not self.run("podman", "image", "exists", base, is_checked=False).returncode:
            return
        archive = self.folder / f"base-{architecture}.tar"
        sources = next(path for path in APT_SOURCES if path.exists())
        self.run(
            *("mmdebstrap", "--variant=minbase", "--mode=root", f"--architectures={architecture}"),
            *("--include=ca-certificates",),
            *('--aptopt=Acquire::Languages "none"', "--dpkgopt=path-exclude=/usr/share/man/*"),
            *("--dpkgopt=path-exclude=/usr/share/locale/*", SUITE, archive, sources),
            seconds=BUILD_SECONDS,
        )
        self.run("podman", "import", "--arch", architecture, "--change", 'CMD ["bash"]', archive, base)
        archive.unlink()

    def build_options(
        self, arguments: Mapping[str, str], mounts: Mapping[Path, str], architecture: str = "amd64"
    ) -> list[str]:
        """What a build takes beside what `make image-cpu` says: the base, pip's settings, what was compiled before."""
        base = BASES[architecture]
        arguments = {"BUILD_IMAGE": base, "RUNTIME_IMAGE": base, **arguments}
        if self._wheel_folders:
            arguments["TORCH_INDEX"] = ""
        options = [part for name, value in arguments.items() for part in ("--build-arg", f"{name}={value}")]
        places = {**mounts, **{folder: str(folder) for folder in self._wheel_folders}}
        options += [part for source, place in places.items() for part in ("--volume", f"{source}:{place}:ro")]
        secret = f"id=pip_conf,src={self.folder / 'pip.conf'}"
        options += ["--arch", architecture, "--network", "host", "--pull=never", "--layers", "--volume", CERTIFICATES]
        return [*options, "--secret", secret]

    def build(self, backend: str, target: str, options: Sequence[str], tag: str | None = None) -> float:
        """Builds on the base; returns the seconds that it took. The log lies beside the storage."""
        started = time.monotonic()
        usual = containers.image(backend, target)
        command = images.build("podman", backend, target, options, images.revision())
        log = self.folder / f"build-{(tag or usual).rpartition(':')[2]}.log"
        self.run(*(tag if tag and part == usual else part for part in command), log=log, seconds=BUILD_SECONDS)
        return time.monotonic() - started

    def inspect(self, tag: str) -> Mapping[str, Any]:
        found: Mapping[str, Any] = json.loads(self.run("podman", "image", "inspect", tag).stdout)[0]
        return found

    def layers(self, tag: str) -> tuple[Sequence[Layer], Path]:
        """The compressed layers, as a registry would have them, and the archive that holds them."""
        archive = self.folder / f"{tag.rpartition('/')[2].replace(':', '-')}.tar"
        archive.unlink(missing_ok=True)
        self.run("podman", "save", "--format", "oci-archive", "-o", archive, tag)
        with tarfile.open(archive) as tar:

            def document(name: str) -> Any:
                member = tar.extractfile(name)
                assert member is not None
                return json.load(member)

            def blob(digest: str) -> Any:
                return document(f"blobs/{digest.replace(':', '/')}")

            manifest = blob(document("index.json")["manifests"][0]["digest"])
            steps = blob(manifest["config"]["digest"])["history"]
            history = [step["created_by"] for step in steps if not step.get("empty_layer")]
        sizes = [layer["size"] for layer in manifest["layers"]]
        made_by = [*(["?"] * (len(sizes) - len(history))), *history]
        return [Layer(size_bytes=size, made_by=by) for size, by in zip(sizes, made_by, strict=True)], archive
