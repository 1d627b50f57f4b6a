"""The one pin of llama.cpp: its source distribution, the converter taken from it, and the wheel built from it.

`ensure_converter` and `ensure_wheel` fill the cache, as `make setup` does; `converter_dir` and `wheel_path` only look.
Standard library only, because it runs under the system's Python before any environment exists. It does not know what is
installed where: that is `appliance/setup.py`.

    <cache>/downloads/llama_cpp_python-<version>.tar.gz     downloaded once, hash checked
    <cache>/llama.cpp-<version>/                            convert_hf_to_gguf.py and what it imports
    <cache>/wheels/<key>/llama_cpp_python-….whl             key = version + flags + CPU + Python
    <cache>/build-<key>/                                    an interrupted compile, continued by the next run
"""

import contextlib
import csv
import fcntl
import hashlib
import io
import json
import os
import platform
import re
import shlex
import shutil
import subprocess
import sys
import tarfile
import time
import zipfile
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path, PurePosixPath

from appliance import device
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

# Together these two leave out 59 % of the compile: multimodal input and the helpers of llama.cpp's own programs.
NO_COMMON = "set(LLAMA_BUILD_COMMON OFF)\n"
# BINDIR: a build with GGML_BACKEND_DL puts its libggml-cpu-*.so there, and they are only found beside libggml.so.
BASE_FLAGS = ("-DLLAVA_BUILD=OFF", "-DCMAKE_INSTALL_BINDIR=llama_cpp/lib")
# llama.cpp compiles a variant for ARM with SME, which GCC knows from 14 on and Debian 12 does not have. No kernel of ggml
# uses SME by itself: where the compiler lacks it, these two are made of the instructions of the variant before.
OLD_ARM_COMPILER = """
include(CheckCCompilerFlag)
check_c_compiler_flag("-march=armv9.2-a+sme" HAS_SME)
function(without_sme)
  foreach(target ggml-cpu-armv9.2_1 ggml-cpu-armv9.2_2)
    if(TARGET ${target} AND NOT HAS_SME)
      get_target_property(options ${target} COMPILE_OPTIONS)
      string(REGEX REPLACE "-march=armv9.2-a([^;]*)[+]sme" "-march=armv8.6-a\\\\1" options "${options}")
      set_target_properties(${target} PROPERTIES COMPILE_OPTIONS "${options}")
    endif()
  endforeach()
endfunction()
cmake_language(DEFER CALL without_sme)
"""
PORTABLE = "-DGGML_NATIVE=OFF"
# Libraries that llama_cpp opens as lib<name>.so; all others are found by their soname, lib<name>.so.<major>.
OPENED_BY_NAME = ("libllama", "libggml", "libmtmd")

CONSTRAINTS = Path(__file__).resolve().parents[1] / "constraints/common.txt"
COMPILER_MEMORY_BYTES = 1 << 30
REPORT_INTERVAL_SECONDS = 15.0
LOG_LINES_SHOWN = 30


def converter_dir() -> Path:
    """The folder that holds convert_hf_to_gguf.py; raises EnvironmentIncomplete when it is not there."""
    folder = converter_root() / f"llama.cpp-{VERSION}"
    if not _is_whole(folder):
        raise EnvironmentIncomplete(f"The GGUF converter is not in {folder}; run `make setup`.")
    return folder


def wheel_path() -> Path:
    """The wheel for this version, CPU, Python and CMAKE_ARGS; raises EnvironmentIncomplete when it is not built."""
    folder = cache_root() / "wheels" / wheel_key()
    wheels = sorted(folder.glob("*.whl"))
    if not wheels:
        raise EnvironmentIncomplete(f"llama-cpp-python {VERSION} is not built for this machine; run `make setup`.")
    return wheels[0]


def wheel_key(cmake_args: str | None = None, cpu: str | None = None) -> str:
    """Names a build: the version, the flags (also CMAKE_ARGS of the environment), the CPU and the Python.

    A portable build is the same on every CPU of its architecture.
    """
    flags = (quiet_environment().get("CMAKE_ARGS", "") if cmake_args is None else cmake_args).split()
    cpu = cpu or (platform.machine() if PORTABLE in flags else cpu_identity())
    python = f"cp{sys.version_info.major}{sys.version_info.minor}"
    parts = [VERSION, SOURCE_SHA256, BASE_FLAGS, _included(flags, cpu), flags, cpu, python]
    return f"{VERSION}-{python}-{hashlib.sha256(json.dumps(parts).encode()).hexdigest()[:12]}"


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
        if subprocess.run(command, env=_build_environment(), stdin=subprocess.DEVNULL, check=False).returncode:
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


def ensure_wheel(python: str = sys.executable) -> Path:
    """The pruned wheel for this CPU, compiled when the cache has none; `python` is one that has pip."""
    key = wheel_key()
    with locked(cache_root()) as lock:
        with contextlib.suppress(EnvironmentIncomplete):
            return wheel_path()
        build = cache_root() / f"build-{key}"
        unpack(ensure_source(python), build)
        wheel = _compile(python, build, cache_root() / "logs" / f"{key}.log", lock)
        folder = cache_root() / "wheels" / key
        folder.mkdir(parents=True, exist_ok=True)
        prune_wheel(wheel, folder / wheel.name)
        shutil.rmtree(build, ignore_errors=True)
    return wheel_path()


def prune_wheel(wheel: Path, pruned: Path) -> None:
    """Writes `wheel` without the copies that nothing loads: a zip has no links, so each library is in it six times."""
    partial = pruned.with_name(pruned.name + ".partial")
    with zipfile.ZipFile(wheel) as old, zipfile.ZipFile(partial, "w") as new:
        names = set(old.namelist())
        for info in old.infolist():
            if not _is_loaded(info.filename, names):
                continue
            content = old.read(info)
            if info.filename.endswith(".dist-info/RECORD"):
                content = _pruned_record(content, names)
            new.writestr(info, content)
    partial.replace(pruned)


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


def _compile(python: str, build: Path, log: Path, lock: int) -> Path:
    flags = _build_environment().get("CMAKE_ARGS", "").split()
    (build / "no-common.cmake").write_text(_included(flags, platform.machine()))
    output = build / "wheel"
    shutil.rmtree(output, ignore_errors=True)
    command = [python, "-m", "pip", "wheel", "--verbose", "--no-deps", "--wheel-dir", str(output)]
    command += [f"--config-settings=build-dir={build / 'objects'}", str(build / "source")]
    environment = _build_environment()
    flags = [*BASE_FLAGS, f"-DCMAKE_PROJECT_llama_cpp_INCLUDE={shlex.quote(str(build / 'no-common.cmake'))}"]
    environment["CMAKE_ARGS"] = " ".join([*flags, environment.get("CMAKE_ARGS", "")])
    environment["CMAKE_BUILD_PARALLEL_LEVEL"] = str(compile_jobs())
    say(f"compiling llama.cpp for this CPU, {compile_jobs()} at a time; once, some minutes; log: {log}")
    code = run_compiler(command, environment, log, lock)
    wheels = sorted(output.glob("*.whl"))
    if code or not wheels:
        raise compile_failed(code, log, build / "objects")
    return wheels[0]


def _included(flags: Sequence[str], machine: str) -> str:
    """What llama.cpp's build files are given to include; a compiler for another machine is named in the flags."""
    is_arm = machine == "aarch64" or "-DCMAKE_SYSTEM_PROCESSOR=aarch64" in flags
    return NO_COMMON + OLD_ARM_COMPILER if is_arm else NO_COMMON


def run_compiler(command: Sequence[str], environment: Mapping[str, str], log: Path, lock: int) -> int:
    """Runs a compile at low priority, says how far it is, and returns its exit code.

    It inherits the lock, so a run that follows a killed one waits instead of writing the same files.
    """
    log.parent.mkdir(parents=True, exist_ok=True)
    slowly = ["nice", "-n", "10"] if shutil.which("nice") else []
    with log.open("wb") as stream:
        process = subprocess.Popen(
            [*slowly, *command], stdin=subprocess.DEVNULL, stdout=stream, stderr=stream, env=environment, pass_fds=[lock]
        )
        return _watch(process, log)


def compile_failed(code: int, log: Path, objects: Path) -> EnvironmentIncomplete:
    """The error with the end of the log; what was compiled is removed.

    An object file cut short by a power failure would make every later run fail in the same place.
    """
    shutil.rmtree(objects, ignore_errors=True)
    tail = "\n".join(log.read_text(errors="replace").splitlines()[-LOG_LINES_SHOWN:])
    return EnvironmentIncomplete(f"Compiling llama.cpp failed (exit {code}); the end of {log}:\n{tail}")


def _watch(process: subprocess.Popen[bytes], log: Path) -> int:
    """Waits for the compiler and says how far it is; ends it when interrupted."""
    started = time.monotonic()
    try:
        while True:
            try:
                return process.wait(REPORT_INTERVAL_SECONDS)
            except subprocess.TimeoutExpired:
                minutes, seconds = divmod(round(time.monotonic() - started), 60)
                say(f"compiling llama.cpp: {_done(log)}{minutes}:{seconds:02} gone")
    except BaseException:
        process.terminate()
        process.wait()
        raise


def _done(log: Path) -> str:
    """How far ninja (`[52/83]`) or make (`[ 62%]`) is, as the last of its lines in the log says."""
    with log.open("rb") as stream:
        stream.seek(max(0, log.stat().st_size - 65536))
        found = re.findall(r"^ *\[ *(\d+(?:/\d+|%))\]", stream.read().decode(errors="replace"), re.MULTILINE)
    return f"{found[-1]}, " if found else ""


def _build_environment() -> dict[str, str]:
    """pip's environment with our pins for build tools; newer pips read the second variable, older ones the first."""
    pins = {"PIP_CONSTRAINT": str(CONSTRAINTS), "PIP_BUILD_CONSTRAINT": str(CONSTRAINTS)}
    return {**pip_environment(), **(pins if CONSTRAINTS.exists() else {})}


def compile_jobs() -> int:
    return max(1, min(device.usable_cores(), device.memory_available_bytes() // COMPILER_MEMORY_BYTES))


def cpu_identity() -> str:
    """What a native build depends on: the machine, the CPU's vendor and model, and its instruction sets."""
    names = {"vendor_id", "cpu family", "model", "flags", "CPU implementer", "CPU part", "Features"}
    found: dict[str, list[str]] = {}
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        name, _, value = line.partition(":")
        if name.strip() in names:
            found.setdefault(name.strip(), sorted(value.split()))
    return json.dumps([platform.machine(), found], sort_keys=True)


def _is_loaded(name: str, names: Iterable[str]) -> bool:
    path = PurePosixPath(name)
    if path.parts[0] in ("lib", "include", "bin"):
        return False
    library = re.fullmatch(r"(llama_cpp/lib/(lib[^/]+?)\.so)(\.\d+)?(\..+)?", name)
    if library is None:
        return True
    plain, stem, major, rest = library.groups()
    if rest is not None:
        return False
    has_soname = any(re.fullmatch(re.escape(plain) + r"\.\d+", other) for other in names)
    return major is not None or stem in OPENED_BY_NAME or not has_soname


def _pruned_record(record: bytes, names: Iterable[str]) -> bytes:
    rows = [row for row in csv.reader(io.StringIO(record.decode())) if row and _is_loaded(row[0], names)]
    text = io.StringIO()
    csv.writer(text, lineterminator="\n").writerows(rows)
    return text.getvalue().encode()


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


def main() -> None:
    """Fills the cache and prints where the wheel is; what the Dockerfiles run."""
    ensure_converter()
    print(ensure_wheel())


if __name__ == "__main__":
    main()
