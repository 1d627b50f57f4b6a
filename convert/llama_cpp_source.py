"""The one pin of llama.cpp: its source distribution, and the converter taken from it. `llama_cpp_wheel.py` compiles it.

`ensure_converter` fills the cache, as `make setup` does; `converter_dir` only looks. Standard library only, because it
runs under the system's Python before any environment exists.

    <cache>/downloads/llama_cpp_python-<version>.tar.gz     downloaded once, hash checked
    <cache>/llama.cpp-<version>/                            convert_hf_to_gguf.py and what it imports
"""

import contextlib
import fcntl
import hashlib
import os
import shutil
import subprocess
import sys
import tarfile
from collections.abc import Iterator
from pathlib import Path, PurePosixPath

from appliance.config import cache_root, converter_root, quiet_environment
from appliance.errors import EnvironmentIncomplete

VERSION = "0.3.36"
SOURCE_NAME = f"llama_cpp_python-{VERSION}.tar.gz"
SOURCE_SHA256 = "832db0699007f1be95a7e41ef12e88926b02ba836461e36a36372db2760c1a2e"

VENDOR = "vendor/llama.cpp/"
# models/templates: the converters of RWKV, DeepSeek, Kimi and MiniMax read their chat templates from there.
CONVERTER_FILES = ("convert_hf_to_gguf.py", "convert_lora_to_gguf.py", "LICENSE")
CONVERTER_FOLDERS = ("conversion/", "gguf-py/gguf/", "models/templates/")
CONVERTER_MARK = ".whole"
CONSTRAINTS = Path(__file__).resolve().parents[1] / "constraints/common.txt"


def converter_dir() -> Path:
    """The folder that holds convert_hf_to_gguf.py; raises EnvironmentIncomplete when it is not there."""
    folder = converter_root() / f"llama.cpp-{VERSION}"
    if not _is_whole(folder):
        raise EnvironmentIncomplete(f"The GGUF converter is not in {folder}; run `make setup`.")
    return folder


def pip_environment() -> dict[str, str]:
    """The environment in which pip runs: it never asks, and it does not look for newer versions of itself."""
    return {**quiet_environment(), "PIP_DISABLE_PIP_VERSION_CHECK": "1", "PIP_NO_INPUT": "1"}


def ensure_source(python: str = sys.executable) -> Path:
    """The source distribution, downloaded with pip unless the cache has it; `python` is one that has pip."""
    source = cache_root() / "downloads" / SOURCE_NAME
    if source.exists() and _sha256(source) == SOURCE_SHA256:
        return source
    partial = source.parent / "partial"
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    say(f"downloading llama-cpp-python {VERSION} (77 MB)")
    command = [python, "-m", "pip", "download", "--quiet", "--no-deps", "--no-binary", "llama-cpp-python"]
    command += ["--dest", str(partial), f"llama-cpp-python=={VERSION}"]
    try:
        if subprocess.run(command, env=build_environment(), stdin=subprocess.DEVNULL, check=False).returncode:
            raise EnvironmentIncomplete(
                f"Downloading llama-cpp-python {VERSION} failed; pip's message is above. Check the network and repeat."
            )
        check_hash(partial / SOURCE_NAME)
        (partial / SOURCE_NAME).replace(source)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return source


def check_hash(source: Path) -> None:
    """Refuses a source distribution that is not the pinned one."""
    found = _sha256(source) if source.exists() else "no file"
    if found != SOURCE_SHA256:
        raise EnvironmentIncomplete(
            f"{source.name} is not the pinned one (SHA-256 {found}, expected {SOURCE_SHA256}); it was not used. "
            "Check which package index pip is configured with, then repeat."
        )


def read_source(*names: str) -> dict[str, bytes]:
    """Files of llama.cpp out of the source distribution, by their names below `VENDOR`."""
    with locked(cache_root()):
        source = ensure_source()
    contents = {}
    with tarfile.open(source) as archive:
        for member in archive:
            _, found, name = member.name.partition(f"/{VENDOR}")
            content = archive.extractfile(member) if found and name in names else None
            if content is not None:
                contents[name] = content.read()
            if len(contents) == len(names):
                return contents
    missing = ", ".join(sorted(set(names) - set(contents)))
    raise EnvironmentIncomplete(f"{SOURCE_NAME} has no {missing} in {VENDOR}; the pin needs a new layout.")


def ensure_converter(python: str = sys.executable) -> Path:
    """The converter's folder, extracted from the source distribution when it is missing."""
    folder = cache_root() / f"llama.cpp-{VERSION}"
    with locked(cache_root()):
        if not _is_whole(folder):
            extract_converter(ensure_source(python), folder)
    return folder


def extract_converter(source: Path, folder: Path) -> None:
    """Extracts the converter beside `folder` and renames it into place, so `folder` is whole or absent."""
    partial = folder.with_name(folder.name + ".partial")
    shutil.rmtree(partial, ignore_errors=True)
    with tarfile.open(source) as archive:
        for member in archive:
            name = _converter_name(member.name)
            content = archive.extractfile(member) if name is not None and member.isfile() else None
            if name is None or content is None:
                continue
            target = partial / name
            target.parent.mkdir(parents=True, exist_ok=True)
            with target.open("wb") as stream:
                shutil.copyfileobj(content, stream)
    missing = [name for name in (*CONVERTER_FILES, *CONVERTER_FOLDERS) if not (partial / name).exists()]
    if missing:
        raise EnvironmentIncomplete(f"{source} has no {', '.join(missing)} in {VENDOR}; the pin needs a new layout.")
    (partial / CONVERTER_MARK).write_text(_converter_digest())
    shutil.rmtree(folder, ignore_errors=True)
    partial.rename(folder)


@contextlib.contextmanager
def locked(folder: Path) -> Iterator[int]:
    """Holds the one lock of `folder` (the folder itself, so that no lock file is left); yields its descriptor."""
    folder.mkdir(parents=True, exist_ok=True)
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            say(f"another setup works in {folder}; waiting for it")
            fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield descriptor
    finally:
        os.close(descriptor)


def unpack(source: Path, build: Path) -> None:
    """The source in a folder of its own: pip would unpack to a new one each time and could not continue a compile."""
    if (build / "source").exists():
        return
    partial = build / "partial"
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    with tarfile.open(source) as archive:
        if hasattr(tarfile, "data_filter"):  # Python 3.11.2 has no filters; the archive's hash was checked in any case
            archive.extraction_filter = tarfile.data_filter
        archive.extractall(partial)
    (partial / SOURCE_NAME.removesuffix(".tar.gz")).rename(build / "source")
    shutil.rmtree(partial, ignore_errors=True)


def build_environment() -> dict[str, str]:
    """pip's environment with our pins for build tools; newer pips read the second variable, older ones the first."""
    pins = {"PIP_CONSTRAINT": str(CONSTRAINTS), "PIP_BUILD_CONSTRAINT": str(CONSTRAINTS)}
    return {**pip_environment(), **(pins if CONSTRAINTS.exists() else {})}


def _converter_name(member: str) -> str | None:
    """The name inside the converter's folder of a member of the source distribution; None when it is not needed."""
    _, found, name = member.partition(f"/{VENDOR}")
    if not found or ".." in PurePosixPath(name).parts:
        return None
    return name if name in CONVERTER_FILES or name.startswith(CONVERTER_FOLDERS) else None


def _converter_digest() -> str:
    return hashlib.sha256(repr((SOURCE_SHA256, CONVERTER_FILES, CONVERTER_FOLDERS)).encode()).hexdigest()


def _is_whole(folder: Path) -> bool:
    mark = folder / CONVERTER_MARK
    return mark.exists() and mark.read_text() == _converter_digest()


def _sha256(path: Path) -> str:
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def say(message: str) -> None:
    print(f"setup: {message}", file=sys.stderr, flush=True)
