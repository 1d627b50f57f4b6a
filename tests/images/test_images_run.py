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
from typing import Any

import pytest

from tests import tiny_gguf
from tests.images.image_engine import ImageEngine
from tests.images.image_table import Row

pytestmark = pytest.mark.image

CONFINED = (
    *("--read-only", "--tmpfs", "/tmp:rw,noexec,nosuid,nodev,size=64m,mode=1777", "--cap-drop", "ALL"),
    *("--security-opt", "no-new-privileges", "--pids-limit", "256", "--memory", "1g", "--network", "none"),
    *("--volume", "/dev/null:/usr/bin/dash:ro", "--volume", "/dev/null:/usr/bin/bash:ro"),
)
READY_SECONDS = 90.0
FIRST_MODEL = "/stick/tiny.appliance"
ASK = """
import json, pathlib, sys, urllib.error, urllib.request
key = pathlib.Path("/data/keys/chat.key").read_text().strip() if sys.argv[1] == "key" else ""
body = json.dumps({"messages": [{"role": "user", "content": "hello"}], "max_tokens": 4}).encode()
headers = {"Content-Type": "application/json", **({"Authorization": f"Bearer {key}"} if key else {})}
try:
    request = urllib.request.Request("http://127.0.0.1:8080/v1/chat/completions", body, headers)
    with urllib.request.urlopen(request) as answer:
        print(answer.status, json.load(answer)["usage"]["completion_tokens"])
except urllib.error.HTTPError as error:
    print(error.code, 0)
"""
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


# In one process, since an emulator of user programs does not follow into others. Its last word: the library that was chosen.
COMPUTE = """
import pathlib
from appliance.serving.decoder import Feed
from appliance.serving.engine_settings import EngineSettings
from appliance.serving.llama import Context, Model
from appliance.serving.requests import SamplingSettings

path = pathlib.Path("/model.gguf")
settings = EngineSettings(
    name="tiny", model_path=str(path), sha256="", made_at=0, kind="chat", slots=1, context_tokens=64, threads_decode=1,
    threads_prefill=1, kv_type="f16", is_mapped=True, is_repacked=True, queue_requests=1, queue_tokens=1,
)
context = Context(Model(path, is_mapped=True, is_repacked=True), settings)
context.start(0, SamplingSettings(), None, None)
feed, position = list(b"What do dogs eat?"), 0
for _ in range(8):
    found = context.decode([Feed(0, feed, position, is_sampled=True)], None)[0]
    position += len(feed)
    feed = [found[-1].token]
    print(*feed, end=" ")
maps = pathlib.Path("/proc/self/maps").read_text().split()
print(next(pathlib.Path(part).name for part in maps if "libggml-cpu-" in part))
"""
# Nehalem of 2008 was the first with SSE4.2; Haswell of 2013 has AVX2 and FMA.
OLD_CPUS = {"Nehalem": "libggml-cpu-sse42.so", "Haswell": "libggml-cpu-haswell.so"}
LIBRARIES = "/opt/venv/lib/python3.11/site-packages/llama_cpp/lib"


@pytest.fixture
def volume(engine: ImageEngine) -> Iterator[str]:
    name = f"appliance-test-{os.getpid()}-{time.monotonic_ns()}"
    engine.run("podman", "volume", "create", name)
    yield name
    engine.run("podman", "volume", "rm", "--force", name)


def test_cpu_image_answers_confined_offline_and_without_a_shell(
    rows: dict[str, Row], engine: ImageEngine, stick: Path, volume: str
) -> None:
    row = rows["cpu"]
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
        events = [json.loads(line)["event"] for line in log.splitlines() if line.startswith("{")]
        assert {"request", "answered"} <= set(events)
    finally:
        engine.run("podman", "rm", "--force", name)


def wait_until_ready(engine: ImageEngine, name: str, started: float) -> float:
    """The seconds since `started`."""
    question = "import urllib.request as u; u.urlopen('http://127.0.0.1:8080/readyz', timeout=2)"
    while engine.run("podman", "exec", name, "python3", "-c", question, is_checked=False).returncode:
        log: Any = engine.run("podman", "logs", name, is_checked=False)
        assert time.monotonic() - started < READY_SECONDS, log.stderr
        time.sleep(0.2)
    return time.monotonic() - started


def ask(engine: ImageEngine, name: str, key: str) -> tuple[int, int]:
    """HTTP status and tokens of the answer, asked from inside: there is no network."""
    status, tokens = engine.run("podman", "exec", name, "python3", "-c", ASK, key).stdout.split()
    return int(status), int(tokens)


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
