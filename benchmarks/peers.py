"""Builds what this appliance is measured beside: `make bench-peers`, `python -m benchmarks.peers`.

llama-server, llama-bench, llama-batched-bench and llama-imatrix come from the source distribution that our own engine is
built from, with the same CMAKE_ARGS, so that a difference in speed is not one of versions or flags. `binary` only looks.
Standard library and the kernel only, as `convert/llama_cpp_source.py`, whose cache this is.

    <cache>/peers/<key>/bin/            the programs and their libraries; key = version + flags + CPU
    <cache>/peers/build-<key>/          an interrupted compile, continued by the next run
"""

import hashlib
import json
import shlex
import shutil
import subprocess
from pathlib import Path

import click

from appliance import artifacts, setup
from appliance.config import cache_root, quiet_environment
from appliance.console import Command
from appliance.errors import EnvironmentIncomplete, several
from convert import llama_cpp_source, llama_cpp_wheel

PROGRAMS = ("llama-server", "llama-bench", "llama-batched-bench", "llama-imatrix")
FLAGS = (
    *("-DCMAKE_BUILD_TYPE=Release", "-DLLAMA_BUILD_COMMON=ON", "-DLLAMA_BUILD_TOOLS=ON", "-DLLAMA_BUILD_SERVER=ON"),
    *("-DLLAMA_BUILD_TESTS=OFF", "-DLLAMA_BUILD_EXAMPLES=OFF", "-DLLAMA_BUILD_APP=OFF"),
    *("-DLLAMA_BUILD_UI=OFF", "-DLLAMA_USE_PREBUILT_UI=OFF", "-DLLAMA_OPENSSL=OFF"),
    "-DCMAKE_BUILD_RPATH_USE_ORIGIN=ON",  # the programs find their libraries wherever the folder is moved to
)
BUILD_BYTES = 1 << 30


@click.command(cls=Command)
def peers() -> None:
    """Build the servers that `make bench-serve` measures beside this one; prints their folder."""
    click.echo(ensure_programs())


def binary(name: str) -> Path:
    """The program of this name, one of PROGRAMS; raises `EnvironmentIncomplete` when it is not built."""
    path = programs_folder() / "bin" / name
    if not path.exists():
        raise EnvironmentIncomplete(f"{name} is not built for this machine (no {path}); run `make bench-peers`.")
    return path


def programs_folder() -> Path:
    """Where the programs for this version, these flags (also CMAKE_ARGS of the environment) and this CPU are or will be."""
    arguments = shlex.split(quiet_environment().get("CMAKE_ARGS", ""))
    parts = [llama_cpp_source.SOURCE_SHA256, FLAGS, PROGRAMS, arguments, llama_cpp_wheel.cpu_identity()]
    key = f"{llama_cpp_source.VERSION}-{hashlib.sha256(json.dumps(parts).encode()).hexdigest()[:12]}"
    return cache_root() / "peers" / key


def ensure_programs() -> Path:
    """The folder of all programs, compiled when the cache has none. Raises `EnvironmentIncomplete`."""
    folder = programs_folder()
    if folder.exists():
        return folder / "bin"
    _check_machine()
    with llama_cpp_source.locked(folder.parent) as lock:
        if folder.exists():
            return folder / "bin"
        build = folder.with_name(f"build-{folder.name}")
        with llama_cpp_source.locked(cache_root()):
            source = llama_cpp_source.ensure_source()
        llama_cpp_source.unpack(source, build)
        log = cache_root() / "logs" / f"peers-{folder.name}.log"
        compile_programs(build / "source" / llama_cpp_source.VENDOR, build / "objects", log, lock)
        install(build / "objects/bin", folder)
        shutil.rmtree(build)
    return folder / "bin"


def compile_programs(source: Path, objects: Path, log: Path, lock: int) -> None:
    """Leaves the programs and their libraries in `objects`/bin; goes on where an interrupted run was."""
    environment = quiet_environment()
    jobs = llama_cpp_wheel.compile_jobs()
    configure = ["cmake", "-S", str(source), "-B", str(objects), *FLAGS, *shlex.split(environment.get("CMAKE_ARGS", ""))]
    builder = "ninja" if shutil.which("ninja") else "make"
    configure += ["-G", "Ninja" if builder == "ninja" else "Unix Makefiles"]
    # Not through `cmake --build`: it does not pass on a signal, and what it started would go on.
    compile_all = [builder, "-C", str(objects), "-j", str(jobs), *PROGRAMS]
    llama_cpp_source.say(f"compiling {', '.join(PROGRAMS)}, {jobs} at a time; once, some minutes; log: {log}")
    for command, file in ((configure, log.with_suffix(".cmake.log")), (compile_all, log)):
        if code := llama_cpp_wheel.run_compiler(command, environment, file, lock):
            raise llama_cpp_wheel.compile_failed(code, file, objects)


def install(built: Path, folder: Path) -> None:
    """Moves the programs to `folder`/bin, where they are whole or absent; each must start there."""
    partial = folder.with_name(folder.name + ".partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    shutil.copytree(built, partial / "bin", symlinks=True)
    for name in PROGRAMS:
        try:
            result = subprocess.run([partial / "bin" / name, "--version"], capture_output=True, text=True, check=False)
        except OSError as error:
            raise EnvironmentIncomplete(f"{name} was built and cannot be run: {error.strerror}.") from error
        if result.returncode:
            raise EnvironmentIncomplete(f"{name} was built and does not start: {result.stderr.strip()[-500:]}")
    partial.rename(folder)


def _check_machine() -> None:
    """Raises one error that names every tool that is missing, and too little room."""
    missing = setup.missing_build_tools(quiet_environment())
    if not (shutil.which("ninja") or shutil.which("make")):
        missing.append(setup.Missing("neither ninja nor make", ("ninja-build",)))
    if missing:
        packages = sorted({package for each in missing for package in each.packages})
        problems = several([each.problem for each in missing], "The peers cannot be built")
        raise EnvironmentIncomplete(f"{problems}\nOn Debian or Ubuntu: sudo apt-get install {' '.join(packages)}")
    artifacts.require_space(cache_root(), BUILD_BYTES, "Building the peers")


if __name__ == "__main__":
    peers()
