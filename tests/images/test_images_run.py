"""`make image-test`: the images are run as they are meant to be, and as they are not.

Read-only, without capabilities, privileges, a network or a shell, with limits; without the driver of a card; on an old CPU.
"""

import json
import os
import shutil
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests import tiny_gguf
from tests.images.image_engine import ImageEngine
from tests.images.image_run import COMPUTE, CONFINED, LIBRARIES, SERVE_PARTS, ask, wait_until_ready
from tests.images.image_table import Row

pytestmark = pytest.mark.image

FIRST_MODEL = "/stick/tiny.appliance"
LOOK = """
import os, pathlib
status = dict(line.split(":\\t", 1) for line in pathlib.Path("/proc/1/status").read_text().splitlines() if ":\\t" in line)
try:
    pathlib.Path("/opt/new").touch()
    written = "written"
except OSError as error:
    written = error.strerror
print(os.getuid(), status["CapEff"], status["NoNewPrivs"], status["Seccomp"], written)
"""


# Nehalem of 2008 was the first with SSE4.2; Haswell of 2013 has AVX2 and FMA.
OLD_CPUS = {"Nehalem": "libggml-cpu-sse42.so", "Haswell": "libggml-cpu-haswell.so"}


@pytest.fixture
def volume(engine: ImageEngine) -> Iterator[str]:
    name = f"appliance-test-{os.getpid()}-{time.monotonic_ns()}"
    engine.run("podman", "volume", "create", name)
    yield name
    engine.run("podman", "volume", "rm", "--force", name)


@pytest.mark.parametrize("backend", ["cpu", "cuda", "rocm"])
def test_image_answers_confined_offline_and_without_a_shell(
    backend: str, rows: dict[str, Row], engine: ImageEngine, stick: Path, volume: str
) -> None:
    """Those for cards too, which compute on the CPU where there is none."""
    row = rows[backend]
    data = ("--volume", f"{volume}:/data")
    brought = ("--volume", f"{stick}:/stick:ro")
    engine.run(
        *("podman", "run", "--rm", *CONFINED, *data, *brought, row.image),
        *("models", "import", FIRST_MODEL, "--promote"),
    )
    name = f"{volume}-server"
    started = time.monotonic()
    engine.run("podman", "run", "--detach", "--name", name, *CONFINED, *data, row.image)
    try:
        row.started_in = wait_until_ready(engine, name, started)
        assert ask(engine, name, "none") == (401, 0)
        status, tokens = ask(engine, name, "key")
        assert (status, tokens) == (200, 4)
        row.answered = f"{tokens} tokens"
        engine.run("podman", "healthcheck", "run", name)
        looked = engine.run("podman", "exec", name, "python3", "-c", LOOK).stdout.split(maxsplit=4)
        assert looked == ["10001", "0000000000000000", "1", "2", "Read-only file system\n"]
        shell = engine.run("podman", "exec", name, "/bin/sh", "-c", "true", is_checked=False)
        assert shell.returncode, "there is a shell after all"
        stopping = time.monotonic()
        engine.run("podman", "stop", "--time", "45", name)
        row.stopped_in = time.monotonic() - stopping
        state = json.loads(engine.run("podman", "container", "inspect", name).stdout)[0]["State"]
        assert (state["ExitCode"], state["OOMKilled"]) == (0, False)
        log = engine.run("podman", "logs", name).stderr
        assert "made a first API key: it is in /data/keys/chat.key" in log
        assert ("This image is made for cards (" in log) == (backend != "cpu")
        events = [json.loads(line)["event"] for line in log.splitlines() if line.startswith("{")]
        assert {"request", "answered"} <= set(events)
    finally:
        engine.run("podman", "rm", "--force", name)


def test_library_for_a_card_that_cannot_load_leaves_the_cpu(
    rows: dict[str, Row], engine: ImageEngine, stick: Path, volume: str, tmp_path: Path
) -> None:
    """A PC without NVIDIA's driver: libggml-cuda.so is there, and libcuda.so.1, which it needs, is not."""
    empty = tmp_path / "empty.c"
    empty.touch()
    driver, library = tmp_path / "libcuda.so.1", tmp_path / "libggml-cuda.so"
    compiler = ("cc", "-shared", "-fPIC")
    subprocess.run([*compiler, "-o", driver, "-Wl,-soname,libcuda.so.1", empty], check=True)
    subprocess.run([*compiler, "-o", library, empty, "-Wl,--no-as-needed", driver], check=True)
    needed = subprocess.run(["readelf", "--dynamic", library], capture_output=True, text=True, check=True).stdout
    assert "[libcuda.so.1]" in needed
    image = rows["cuda"].image
    mounts = ("--volume", f"{volume}:/data", "--volume", f"{stick}:/stick:ro")
    mounts += ("--volume", f"{library}:{LIBRARIES}/libggml-cuda.so:ro")
    loading = f"import ctypes; ctypes.CDLL('{LIBRARIES}/libggml-cuda.so')"
    loaded = engine.run(
        *("podman", "run", "--rm", *CONFINED, *mounts, "--entrypoint", "python3", image, "-c", loading), is_checked=False
    )
    assert "libcuda.so.1: cannot open shared object file" in loaded.stderr
    name = f"{volume}-server"
    engine.run("podman", "run", "--detach", "--name", name, *CONFINED, *mounts, image, "serve", "--first-model", FIRST_MODEL)
    try:
        wait_until_ready(engine, name, time.monotonic())
        assert ask(engine, name, "key") == (200, 4)
        said = engine.run("podman", "logs", name).stderr
        assert "This image is made for cards (60-real" in said
        assert "and there is none here; use edge-appliance:cpu" in said
        assert "Until then the CPU computes." in said
    finally:
        engine.run("podman", "rm", "--force", name)


@pytest.mark.parametrize("cpu", OLD_CPUS)
def test_cpu_image_computes_on_an_old_cpu(cpu: str, rows: dict[str, Row], engine: ImageEngine, tmp_path: Path) -> None:
    """No illegal instruction, and the variant of llama.cpp that fits; greedy tokens are those of this machine's CPU."""
    emulator = shutil.which("qemu-x86_64-static")
    if emulator is None:
        pytest.skip("qemu-x86_64-static is not installed (Debian: qemu-user-static)")
    model = tiny_gguf.write(tmp_path / "tiny.gguf")
    mounts = ("--volume", f"{model}:/model.gguf:ro", "--volume", f"{emulator}:/qemu:ro")
    run = ("podman", "run", "--rm", *CONFINED, *mounts, "--entrypoint")
    python = "/opt/venv/bin/python3"
    here = engine.run(*run, python, rows["cpu"].image, "-c", COMPUTE).stdout.split()
    there = engine.run(*run, "/qemu", rows["cpu"].image, "-cpu", cpu, python, "-c", COMPUTE).stdout.split()
    assert there[-1] == OLD_CPUS[cpu]
    assert len(there) == 9
    assert there[:-1] == here[:-1]
    parts = engine.run(*run, "/qemu", rows["cpu"].image, "-cpu", cpu, python, "-c", SERVE_PARTS).stdout
    assert int(parts) > 50  # modules of the server, with every compiled package that they import
