"""`make image-test`: the images are built for real, on a minimal Debian in the place of the vendors' bases, and looked into.

A stand-in base proves stages, files, users and the server; it does not prove CUDA or ROCm, which the table says.
"""

import json
import re
import tarfile

import pytest

from tests.images.image_engine import ImageEngine
from tests.images.image_run import SECRET_BYTES, is_secret
from tests.images.image_table import Row

pytestmark = pytest.mark.image

BACKENDS = ("cpu", "cuda", "rocm")
GZIP = b"\x1f\x8b"
LARGEST_CPU_BYTES = 150_000_000  # compressed, without a model


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
    secrets: list[str] = []
    with tarfile.open(rows[backend].archive) as outer:
        for member in outer.getmembers():
            stream = outer.extractfile(member) if member.name.startswith("blobs/") else None
            if stream is None or stream.read(2) != GZIP:  # the image's description, and that of its layers
                continue
            stream.seek(0)
            with tarfile.open(fileobj=stream, mode="r:*") as layer:
                for entry in layer:
                    if not entry.isfile() or not entry.size:
                        continue
                    names.add(entry.name)
                    content = layer.extractfile(entry) if entry.size <= SECRET_BYTES else None
                    if content is not None and is_secret(content.read()):
                        secrets.append(entry.name)
    assert secrets == []
    assert any(name.endswith("appliance/cli.py") for name in names)
    assert {"opt/sbom/python.cdx.json", "opt/sbom/system.cdx.json"} <= names
    for pattern in (
        r"(^|/)(gcc|cc1|cmake|ld)$",
        r"/torch/",
        r"etc/pip\.conf$",
        r"(^|/)pip$",
        r"\.(key|pem)$(?<!cacert\.pem)",
    ):
        assert [name for name in names if re.search(pattern, name)] == [], pattern


@pytest.mark.parametrize(
    ("name", "python"), [*((each, "llama-cpp-python") for each in (*BACKENDS, "cpu-train")), ("cpu-train", "torch")]
)
def test_bills_of_material_name_what_computes(name: str, python: str, rows: dict[str, Row], engine: ImageEngine) -> None:
    """The engine, which is compiled here and comes from no index, and the library of the distribution that it runs on."""
    for file, wanted in (("python", python), ("system", "libgomp1")):
        bill = f"/opt/sbom/{file}.cdx.json"
        shown = engine.run("podman", "run", "--rm", "--network", "none", "--entrypoint", "cat", rows[name].image, bill)
        components = json.loads(shown.stdout)["components"]
        found = {re.sub(r"[-_.]+", "-", each["name"]).lower(): each.get("version") for each in components}
        assert found.get(wanted), f"{bill} names no version of {wanted}"


def test_cpu_image_is_small(rows: dict[str, Row]) -> None:
    assert rows["cpu"].size_bytes < LARGEST_CPU_BYTES
