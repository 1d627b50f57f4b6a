"""`make image-test`: the images are built for real, on a minimal Debian in the place of the vendors' bases, and probed.

The CPU image is run as it is meant to be: read-only, without capabilities, privileges, a network or a shell, with limits. A
stand-in base proves stages, files, users and the server; it does not prove CUDA or ROCm, which the table says.
"""

import dataclasses
import json
import os
import re
import subprocess
import sys
import tarfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from appliance import artifacts, bundles, promotion
from appliance.artifacts import Plan
from appliance.config import cache_root
from tests import tiny_gguf
from tests.images.image_engine import ImageEngine, Layer

pytestmark = pytest.mark.image

REPOSITORY = Path(__file__).resolve().parents[2]
BACKENDS = ("cpu", "cuda", "rocm")
LARGEST_CPU_BYTES = 150_000_000  # compressed, without a model
NOT_PROVEN = {
    "cpu": "arm64, CPUs other than this one",
    "cuda": "nvidia/cuda as a base, compiling for CUDA, a card",
    "rocm": "rocm/dev-ubuntu as a base, compiling for HIP, a card",
}
CONFINED = (
    *("--read-only", "--tmpfs", "/tmp:rw,noexec,nosuid,nodev,size=64m,mode=1777", "--cap-drop", "ALL"),
    *("--security-opt", "no-new-privileges", "--pids-limit", "256", "--memory", "1g", "--network", "none"),
    *("--volume", "/dev/null:/usr/bin/dash:ro", "--volume", "/dev/null:/usr/bin/bash:ro"),
)
READY_SECONDS = 90.0
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


@dataclasses.dataclass(slots=True)
class Row:
    """One image in the table; times are seconds."""

    image: str
    archive: Path
    built_in: float
    size_bytes: int
    layers: list[Layer]
    started_in: float | None = None
    answered: str = "–"
    stopped_in: float | None = None


@pytest.fixture(scope="session")
def engine() -> ImageEngine:
    return ImageEngine()


def portable_flags() -> str:
    """CMake's, of the CPU image; with them the other two are built here as well."""
    found = re.search(r'^ARG CMAKE_ARGS="(.*)"$', (REPOSITORY / "Dockerfile.cpu").read_text(), re.MULTILINE)
    assert found is not None
    return found[1]


@pytest.fixture(scope="session")
def wheels() -> Path:
    """The folder of wheels, with the portable one that all three builds install: compiled once, and kept."""
    environ = {**os.environ, "CMAKE_ARGS": portable_flags()}
    environ.pop("APPLIANCE_ARTIFACTS", None)
    subprocess.run([sys.executable, "-m", "convert.llama_cpp_source"], cwd=REPOSITORY, env=environ, check=True)
    return cache_root() / "wheels"


@pytest.fixture(scope="session")
def rows(engine: ImageEngine, wheels: Path) -> Iterator[dict[str, Row]]:
    engine.ensure_base()
    flags = {"CMAKE_ARGS": portable_flags()}
    found = {}
    mounts = {wheels: "/opt/cache/wheels", cache_root() / "downloads": "/opt/cache/downloads"}
    for backend in BACKENDS:
        tag = f"localhost/edge-appliance:{backend}"
        seconds = engine.build(REPOSITORY / f"Dockerfile.{backend}", "serve", tag, flags, mounts)
        layers, archive = engine.layers(tag)
        found[backend] = Row(tag, archive, seconds, sum(layer.size_bytes for layer in layers), list(layers))
    yield found
    print("\n" + table(found))


def table(rows: dict[str, Row]) -> str:
    """Markdown."""
    titles = ["image", "built in", "compressed", "started in", "answered", "stopped in", "not proven here"]
    lines = [titles, ["---"] * len(titles)]
    for backend, row in rows.items():
        times = ["–" if each is None else f"{each:.1f} s" for each in (row.started_in, row.stopped_in)]
        size = f"{row.size_bytes / 1e6:.0f} MB"
        lines.append([row.image, f"{row.built_in:.0f} s", size, times[0], row.answered, times[1], NOT_PROVEN[backend]])
    text = "\n".join(f"| {' | '.join(line)} |" for line in lines)
    for row in rows.values():
        largest = sorted(row.layers, key=lambda layer: -layer.size_bytes)[:3]
        said = (f"{layer.size_bytes / 1e6:.0f} MB {layer.made_by.split('#')[0].strip()[:70]!r}" for layer in largest)
        text += f"\nlargest layers of {row.image}: {'; '.join(said)}"
    return text


@pytest.fixture(scope="session")
def stick(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with an exported model."""
    folder = tmp_path_factory.mktemp("stick")
    root = folder / "there"
    plan = Plan(kind="gguf", name="tiny", inputs={"revision": 1}, config={"type": "F16"})
    with artifacts.create(plan, root) as draft:
        tiny_gguf.write(draft.path / "tiny.gguf")
    model = artifacts.load(plan.location(root))
    plan = Plan(kind="report", name="tiny-verify", inputs={"what": "verify"}, parents=[model.id])
    with artifacts.create(plan, root):
        pass
    promotion.promote(model, artifacts.load(plan.location(root)), {}, root)
    (folder / "stick").mkdir()
    bundles.export(model, root, folder / "stick" / "tiny.appliance")
    return folder / "stick"


@pytest.fixture
def volume(engine: ImageEngine) -> Iterator[str]:
    name = f"appliance-test-{os.getpid()}-{time.monotonic_ns()}"
    engine.run("podman", "volume", "create", name)
    yield name
    engine.run("podman", "volume", "rm", "--force", name)


@pytest.mark.parametrize("backend", BACKENDS)
def test_image_is_what_its_file_promises(backend: str, rows: dict[str, Row], engine: ImageEngine) -> None:
    said = engine.inspect(rows[backend].image)
    config = said["Config"]
    assert config["User"] == "10001:10001"
    assert config["Entrypoint"] == ["appliance"]
    assert said["Healthcheck" if "Healthcheck" in said else "HealthCheck"]["Test"][0] == "CMD"
    assert config["Labels"]["org.opencontainers.image.version"]
    environ = dict(each.split("=", 1) for each in config["Env"])
    assert environ["APPLIANCE_MAKE_KEYS"] == "/data/keys"
    assert ("APPLIANCE_GPU_ARCHITECTURES" in environ) == (backend != "cpu")
    result = engine.run("podman", "run", "--rm", "--network", "none", rows[backend].image, "--version")
    assert result.stdout.startswith("appliance, version ")


@pytest.mark.parametrize("backend", BACKENDS)
def test_nothing_of_the_build_stays(backend: str, rows: dict[str, Row]) -> None:
    """No compiler, no torch, no key, no word of where packages came from."""
    names: set[str] = set()
    with tarfile.open(rows[backend].archive) as outer:
        for member in outer.getmembers():
            if not member.name.startswith("blobs/") or member.size < 10_000:
                continue
            stream = outer.extractfile(member)
            assert stream is not None
            with tarfile.open(fileobj=stream, mode="r:*") as layer:
                names |= {entry.name for entry in layer.getmembers() if entry.isfile() and entry.size}
    assert any(name.endswith("appliance/cli.py") for name in names)
    assert any(name.endswith("sbom.cdx.json") for name in names)
    for pattern in (
        r"(^|/)(gcc|cc1|cmake|ld)$",
        r"/torch/",
        r"etc/pip\.conf$",
        r"(^|/)pip$",
        r"\.(key|pem)$(?<!cacert\.pem)",
    ):
        assert [name for name in names if re.search(pattern, name)] == [], pattern


def test_cpu_image_is_small(rows: dict[str, Row]) -> None:
    assert rows["cpu"].size_bytes < LARGEST_CPU_BYTES


def test_cpu_image_answers_confined_offline_and_without_a_shell(
    rows: dict[str, Row], engine: ImageEngine, stick: Path, volume: str
) -> None:
    row = rows["cpu"]
    data = ("--volume", f"{volume}:/data")
    brought = ("--volume", f"{stick}:/stick:ro")
    engine.run(
        *("podman", "run", "--rm", *CONFINED, *data, *brought, row.image),
        *("models", "import", "/stick/tiny.appliance", "--promote"),
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
