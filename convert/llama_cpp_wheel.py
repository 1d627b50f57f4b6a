"""llama-cpp-python, compiled from its pinned source with the flags that are asked for, and pruned.

`ensure_wheel` fills the cache, as `make setup` does; `wheel_path` only looks. Standard library only, because it runs under
the system's Python before any environment exists. It does not know what is installed where: that is `appliance/setup.py`.

    <cache>/wheels/<key>/llama_cpp_python-….whl     key = version + flags + CPU + Python
    <cache>/build-<key>/                            an interrupted compile, continued by the next run
"""

import contextlib
import csv
import hashlib
import io
import json
import platform
import re
import shlex
import shutil
import subprocess
import sys
import time
import zipfile
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path, PurePosixPath

from appliance import device
from appliance.config import cache_root, quiet_environment
from appliance.errors import EnvironmentIncomplete
from convert import llama_cpp_source

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
COMPILER_MEMORY_BYTES = 1 << 30
REPORT_INTERVAL_SECONDS = 15.0
LOG_LINES_SHOWN = 30


def wheel_path() -> Path:
    """The wheel for this version, CPU, Python and CMAKE_ARGS; raises EnvironmentIncomplete when it is not built."""
    folder = cache_root() / "wheels" / wheel_key()
    wheels = sorted(folder.glob("*.whl"))
    if not wheels:
        raise EnvironmentIncomplete(
            f"llama-cpp-python {llama_cpp_source.VERSION} is not built for this machine; run `make setup`."
        )
    return wheels[0]


def wheel_key(cmake_args: str | None = None, cpu: str | None = None) -> str:
    """Names a build: the version, the flags (also CMAKE_ARGS of the environment), the CPU and the Python.

    A portable build is the same on every CPU of its architecture.
    """
    flags = (quiet_environment().get("CMAKE_ARGS", "") if cmake_args is None else cmake_args).split()
    cpu = cpu or (platform.machine() if PORTABLE in flags else cpu_identity())
    python = f"cp{sys.version_info.major}{sys.version_info.minor}"
    parts = [llama_cpp_source.VERSION, llama_cpp_source.SOURCE_SHA256, BASE_FLAGS, _included(flags, cpu), flags, cpu, python]
    return f"{llama_cpp_source.VERSION}-{python}-{hashlib.sha256(json.dumps(parts).encode()).hexdigest()[:12]}"


def ensure_wheel(python: str = sys.executable) -> Path:
    """The pruned wheel for this CPU, compiled when the cache has none; `python` is one that has pip."""
    key = wheel_key()
    with llama_cpp_source.locked(cache_root()) as lock:
        with contextlib.suppress(EnvironmentIncomplete):
            return wheel_path()
        build = cache_root() / f"build-{key}"
        llama_cpp_source.unpack(llama_cpp_source.ensure_source(python), build)
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


def _compile(python: str, build: Path, log: Path, lock: int) -> Path:
    flags = llama_cpp_source.build_environment().get("CMAKE_ARGS", "").split()
    (build / "no-common.cmake").write_text(_included(flags, platform.machine()))
    output = build / "wheel"
    shutil.rmtree(output, ignore_errors=True)
    command = [python, "-m", "pip", "wheel", "--verbose", "--no-deps", "--wheel-dir", str(output)]
    command += [f"--config-settings=build-dir={build / 'objects'}", str(build / "source")]
    environment = llama_cpp_source.build_environment()
    flags = [*BASE_FLAGS, f"-DCMAKE_PROJECT_llama_cpp_INCLUDE={shlex.quote(str(build / 'no-common.cmake'))}"]
    environment["CMAKE_ARGS"] = " ".join([*flags, environment.get("CMAKE_ARGS", "")])
    environment["CMAKE_BUILD_PARALLEL_LEVEL"] = str(compile_jobs())
    llama_cpp_source.say(f"compiling llama.cpp for this CPU, {compile_jobs()} at a time; once, some minutes; log: {log}")
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
                llama_cpp_source.say(f"compiling llama.cpp: {_done(log)}{minutes}:{seconds:02} gone")
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


def main() -> None:
    """Fills the cache and prints where the wheel is; what the Dockerfiles run."""
    llama_cpp_source.ensure_converter()
    print(ensure_wheel())


if __name__ == "__main__":
    main()
