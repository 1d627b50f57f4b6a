"""The images that all tests of this folder look at, built once, and what is brought to them on a stick."""

import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from appliance.config import cache_root
from appliance.errors import ApplianceError
from tests import tiny_artifact
from tests.images.image_engine import BASE, ImageEngine
from tests.images.image_table import Row, table

REPOSITORY = Path(__file__).resolve().parents[2]
IMAGES = ("cpu", "cuda", "rocm", "cpu-train")


@pytest.fixture(scope="session")
def engine() -> ImageEngine:
    """Skips, and says why, where this machine runs no containers at all: inside some of them, for one."""
    engine = ImageEngine()
    try:
        engine.ensure_base()
    except ApplianceError as error:
        pytest.skip(f"no base image can be made here: {error}")
    tried = engine.run("podman", "run", "--rm", "--network", "none", BASE, "true", is_checked=False)
    if tried.returncode:
        pytest.skip(f"podman runs no container here: {tried.stderr.strip()}")
    return engine


def cmake_flags(backend: str = "cpu") -> str:
    """Of this image; with those of the CPU's the other two are built here as well."""
    found = re.search(r'^ARG CMAKE_ARGS="(.*)"$', (REPOSITORY / f"Dockerfile.{backend}").read_text(), re.MULTILINE)
    assert found is not None
    return found[1]


@pytest.fixture(scope="session")
def wheels() -> Path:
    """The folder of wheels, with the portable one that all three builds install: compiled once, and kept."""
    environ = {**os.environ, "CMAKE_ARGS": cmake_flags()}
    environ.pop("APPLIANCE_ARTIFACTS", None)
    subprocess.run([sys.executable, "-m", "convert.llama_cpp_wheel"], cwd=REPOSITORY, env=environ, check=True)
    return cache_root() / "wheels"


@pytest.fixture(scope="session")
def options(engine: ImageEngine, wheels: Path) -> list[str]:
    """Of a build here: on a base that was made here, with llama.cpp compiled before."""
    mounts = {wheels: "/opt/cache/wheels", cache_root() / "downloads": "/opt/cache/downloads"}
    return engine.build_options({"CMAKE_ARGS": cmake_flags()}, mounts)


@pytest.fixture(scope="session")
def rows(engine: ImageEngine, options: list[str]) -> Iterator[dict[str, Row]]:
    found: dict[str, Row] = {}
    for name in IMAGES:
        backend, _, target = name.partition("-")
        seconds = engine.build(backend, target or "serve", options)
        tag = f"localhost/edge-appliance:{name}"
        layers, archive = engine.layers(tag)
        found[name] = Row(tag, archive, seconds, sum(layer.size_bytes for layer in layers), list(layers))
    yield found
    print("\n" + table(found))


@pytest.fixture(scope="session")
def stick(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with an exported model, tiny.appliance; the artifacts that it came from lie beside it, in `there`."""
    folder = tmp_path_factory.mktemp("brought")
    (folder / "stick").mkdir()
    tiny_artifact.exported(folder / "there", folder / "stick" / "tiny.appliance")
    return folder / "stick"
