"""`make image-cpu` and its kin: the command that is shown and run, the model that goes in, and what is refused."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from appliance import __version__, images
from appliance.errors import EnvironmentIncomplete, RecipeError

REPOSITORY = Path(images.__file__).parents[1]
# Knows `version`; of a build it prints the words, and what lies in the folder that it is given.
ENGINE = """#!/bin/sh
[ "$1" = version ] && exit {code}
for each in "$@"; do echo "$each"; last=$each; done
[ -e "$last/Makefile" ] || ls "$last"
"""


@pytest.fixture
def engines(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    folder = tmp_path / "bin"
    folder.mkdir()
    for name in ("sh", "ls", "git"):
        (folder / name).symlink_to(Path("/bin") / name if name != "git" else Path("/usr/bin/git"))
    monkeypatch.setenv("PATH", str(folder))
    monkeypatch.setenv("APPLIANCE_CACHE", str(tmp_path / "cache"))
    return folder


def put(folder: Path, name: str, code: int = 0) -> None:
    (folder / name).write_text(ENGINE.format(code=code))
    (folder / name).chmod(0o755)


def made(backend: str, **environ: str) -> "subprocess.CompletedProcess[str]":
    return subprocess.run(
        [sys.executable, "-m", "appliance.images", backend],
        cwd=REPOSITORY,
        env={**os.environ, **environ},
        capture_output=True,
        text=True,
    )


def test_first_engine_that_answers_builds(engines: Path) -> None:
    with pytest.raises(EnvironmentIncomplete, match=r"docker is not installed; podman is not installed"):
        images.engine({})
    put(engines, "docker", code=1)
    put(engines, "podman")
    assert images.engine({}) == "podman"
    with pytest.raises(EnvironmentIncomplete, match="docker does not answer"):
        images.engine({"ENGINE": "docker"})
    with pytest.raises(RecipeError, match="ENGINE=none builds no image"):
        images.engine({"ENGINE": "none"})


def test_image_has_its_version_and_podman_keeps_the_health_check(engines: Path) -> None:
    put(engines, "podman")
    result = made("cuda", TARGET="train", BUILD_ARGS="--build-arg 'TORCH_INDEX=a b'")
    words = result.stdout.splitlines()
    assert result.returncode == 0
    assert words[:5] == ["build", "--format", "docker", "--target", "train"]
    assert words[words.index("-t") + 1] == "edge-appliance:cuda-train"
    assert f"VERSION={__version__}" in words
    assert any(len(word.removeprefix("REVISION=").removesuffix("-changed")) == 40 for word in words)
    assert words[-3:] == ["--build-arg", "TORCH_INDEX=a b", str(REPOSITORY)]
    assert result.stderr.startswith("podman build --format docker")
    (engines / "podman").rename(engines / "docker")
    assert "--format" not in made("cpu").stdout


def test_old_docker_is_told_to_understand_mounts(engines: Path) -> None:
    for name, said in (("docker", "1"), ("podman", "")):
        (engines / name).write_text('#!/bin/sh\n[ "$1" = version ] || echo "$DOCKER_BUILDKIT"\n')
        (engines / name).chmod(0o755)
        result = made("cpu", ENGINE=name)
        assert result.stdout == f"{said}\n"
        assert result.stderr.startswith("DOCKER_BUILDKIT=1 docker build" if said else "podman build")


def test_model_goes_into_an_image_of_its_own(engines: Path, tmp_path: Path) -> None:
    put(engines, "docker")
    bundle = tmp_path / "guide.appliance"
    bundle.write_bytes(b"a model")
    (tmp_path / "beside").touch()
    result = made("cpu", MODEL=str(bundle))
    first, second = result.stderr.splitlines()
    assert first.endswith(str(REPOSITORY))
    assert "-t edge-appliance:cpu-model --build-arg BASE=edge-appliance:cpu" in second
    assert result.stdout.splitlines()[-1] == images.MODEL_FILE
    assert list((tmp_path / "cache").iterdir()) == []


@pytest.mark.parametrize(
    ("environ", "code", "message"),
    [
        ({"MODEL": "/nowhere.appliance"}, 2, "MODEL=/nowhere.appliance is not a file; `.venv/bin/appliance models export"),
        ({"MODEL": "/nowhere.appliance", "TARGET": "train"}, 2, "goes with TARGET=serve"),
        ({"TARGET": "both"}, 2, "TARGET=both is none; choose serve or train"),
        ({"BUILD_ARGS": "--build-arg 'open"}, 2, "BUILD_ARGS=--build-arg 'open cannot be split into words"),
    ],
)
def test_what_cannot_be_built_is_refused(environ: dict[str, str], code: int, message: str, engines: Path) -> None:
    put(engines, "docker")
    result = made("cpu", **environ)
    assert (result.returncode, result.stdout) == (code, "")
    assert message in result.stderr


def test_failing_build_is_said(engines: Path) -> None:
    (engines / "docker").write_text('#!/bin/sh\n[ "$1" = version ]\n')
    (engines / "docker").chmod(0o755)
    result = made("cpu")
    assert result.returncode == 3
    assert "`docker build` failed with 1; its message is above" in result.stderr
