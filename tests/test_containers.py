"""`make serve` and `make train`: where they run, with which folders and cards, and that they say so."""

import os
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from appliance import containers
from appliance.containers import Place
from appliance.errors import EnvironmentIncomplete, RecipeError
from appliance.gpu_access import Host
from tests.fake_files import write

REPOSITORY = Path(containers.__file__).parents[1]


@pytest.fixture
def engines(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder that is the whole PATH; `engine` puts programs into it."""
    folder = tmp_path / "bin"
    folder.mkdir()
    monkeypatch.setenv("PATH", str(folder))
    return folder


def engine(folder: Path, name: str, *, answers: bool = True, images: tuple[str, ...] = ()) -> None:
    """A program that knows `version` and `image inspect`, and prints what else it is told."""
    known = "|".join(images) or "none"
    script = f"""#!/bin/sh
case "$1 $2 $3" in
  "version  ") exit {0 if answers else 1};;
  "image inspect "*) case "$3" in {known}) exit 0;; esac; exit 1;;
esac
for each in "$@"; do echo "$each"; done
"""
    path = folder / name
    path.write_text(script)
    path.chmod(0o755)


CPU = "edge-appliance:cpu"


def test_image_that_is_there_is_used(engines: Path) -> None:
    engine(engines, "docker", answers=False)
    engine(engines, "podman", images=(CPU, f"{CPU}-train"))
    assert containers.place({"BACKEND": "cpu"}, "serve") == Place(engine="podman", image=CPU)
    assert containers.place({"BACKEND": "cpu"}, "train") == Place(engine="podman", image=f"{CPU}-train")


def test_without_an_image_it_says_why_it_is_not_a_container(engines: Path) -> None:
    assert containers.place({"BACKEND": "cpu"}, "serve").why == "there is no docker or podman"
    engine(engines, "docker", answers=False)
    engine(engines, "podman")
    why = containers.place({"BACKEND": "cpu"}, "train").why
    assert "docker does not answer (is its daemon running" in why
    assert f"podman has no image {CPU}-train; `make image-cpu TARGET=train` makes it" in why
    assert containers.place({"ENGINE": "none"}, "serve").why == "ENGINE=none"


def test_engine_that_was_asked_for_is_used_or_an_error(engines: Path) -> None:
    engine(engines, "podman")
    for environ, message in (
        ({"ENGINE": "docker"}, "docker is not installed; or choose ENGINE=none"),
        ({"ENGINE": "podman"}, f"podman has no image {CPU}"),
    ):
        with pytest.raises(EnvironmentIncomplete, match=message):
            containers.place({**environ, "BACKEND": "cpu"}, "serve")
    for environ in ({"ENGINE": "lxc"}, {"BACKEND": "tpu"}):
        with pytest.raises(RecipeError, match="is none; choose"):
            containers.place(environ, "serve")


def test_training_sees_the_recipes_folder_and_no_network(root: Path, tmp_path: Path) -> None:
    recipe = tmp_path / "my recipe" / "recipe.toml"
    where = Place(engine="podman", image="edge-appliance:rocm-train")
    host = Host(dev=write(tmp_path / "dev", {"kfd": "", "dri/renderD128": ""}))
    command = containers.command("train", where, [str(recipe), "--set", "sft.epochs=3"], host)
    assert command[-4:] == ["run", "/recipe/recipe.toml", "--set", "sft.epochs=3"]
    assert f"{recipe.parent}:/recipe:ro" in command
    assert f"{root}:/data/artifacts" in command
    assert command[command.index("--network") + 1] == "none"
    assert command[command.index("--user") + 1] == f"{os.getuid()}:{os.getgid()}"
    assert command[command.index("--group-add") + 1] == str((tmp_path / "dev/kfd").stat().st_gid)


def test_server_is_published_on_loopback_and_confined(root: Path) -> None:
    line = containers.detached("docker", "cuda")
    before, _, run = line.partition(" && ")
    parts = shlex.split(run)
    assert before.startswith(f"mkdir -p {root} ")
    assert parts[:2] == ["docker", "run"]
    assert {"--detach", "--read-only", "--cap-drop", "127.0.0.1:8080:8080", "--gpus"} <= set(parts)
    assert "--rm" not in parts
    assert parts[parts.index("edge-appliance:cuda") :] == [
        *("edge-appliance:cuda", "serve", "--host", "0.0.0.0", "--port", "8080")
    ]


@pytest.mark.parametrize(
    "arguments", [("--port", "9000", "--slots", "3", "--host=0.0.0.0"), ("--port=9000", "--host", "0.0.0.0")]
)
def test_address_that_was_asked_for_is_what_is_published(arguments: tuple[str, ...]) -> None:
    command = containers.command("serve", Place(engine="podman", image=CPU), arguments)
    assert command[command.index("--publish") + 1] == "0.0.0.0:9000:8080"
    assert command[-4:] == ["--host", "0.0.0.0", "--port", "8080"]
    assert ("--slots" in command) == ("--slots" in arguments)
    assert "9000" not in command


def test_make_serve_shows_its_command_and_runs_it(engines: Path, root: Path) -> None:
    engine(engines, "podman", images=(CPU,))
    environ = {**os.environ, "BACKEND": "cpu"}
    call = [sys.executable, "-m", "appliance.containers", "serve", "--slots", "3"]
    result = subprocess.run(call, env=environ, cwd=REPOSITORY, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    assert result.stderr.startswith("podman run --rm ")
    assert result.stdout.split()[-8:] == [CPU, "serve", "--slots", "3", "--host", "0.0.0.0", "--port", "8080"]
    assert root.is_dir()
