"""`make serve` and `make train`: where they run, with which folders and cards, and that they say so."""

import os
import shlex
import stat
import subprocess
import sys
from pathlib import Path

import pytest

from appliance import config, containers
from appliance.containers import Place
from appliance.errors import EnvironmentIncomplete, RecipeError
from appliance.gpu_access import Host
from tests.container_command import CPU, alone, values
from tests.fake_files import write

REPOSITORY = Path(containers.__file__).parents[1]


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    return alone(tmp_path, monkeypatch)


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
  "--version  ") echo "{name} version 5"; exit 0;;
  "version  ") exit {0 if answers else 1};;
  "image inspect "*) case "$3" in {known}) exit 0;; esac; exit 1;;
esac
for each in "$@"; do echo "$each"; done
"""
    path = folder / name
    path.write_text(script)
    path.chmod(0o755)


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
    recipe = write(tmp_path / "my recipe", {"recipe.toml": ""}) / "recipe.toml"
    where = Place(engine="podman", image="edge-appliance:rocm-train")
    host = Host(dev=write(tmp_path / "dev", {"kfd": "", "dri/renderD128": ""}))
    command = containers.command("train", where, [str(recipe), "--set", "sft.epochs=3"], host)
    assert command[-4:] == ["run", "/recipe/recipe.toml", "--set", "sft.epochs=3"]
    assert f"{recipe.parent}:/recipe:ro" in command
    assert f"{root}:/data/artifacts" in command
    assert command[command.index("--network") + 1] == "none"
    assert command[command.index("--user") + 1] == f"{os.getuid()}:{os.getgid()}"
    assert "/data/keys" not in " ".join(command), "what trains needs no key"
    assert "APPLIANCE_MAKE_KEYS=" in values(command, "--env")


def test_card_is_held_against_other_containers_and_the_host(cache: Path) -> None:
    """By one folder that the caller may write, whoever the image's user is; and so for what is compiled for a card."""
    for verb, image in (("train", "edge-appliance:cuda-train"), ("serve", "edge-appliance:cuda")):
        command = containers.command(verb, Place(engine="docker", image=image), [])
        assert f"{config.lease_folder()}:/data/leases" in values(command, "--volume")
        assert f"{cache}/container-home:/data/home" in values(command, "--volume")
        assert {"APPLIANCE_LEASES=/data/leases", "HOME=/data/home"} <= set(values(command, "--env"))
    assert config.lease_folder() == cache / "gpu"


@pytest.mark.parametrize(
    ("engine", "backend", "uid", "cards"),
    [
        ("docker", "cuda", 1000, ["--gpus", "all"]),
        ("podman", "cuda", 1000, ["--device", "nvidia.com/gpu=all"]),
        ("docker", "rocm", 1000, ["--group-add", "GROUP"]),
        ("podman", "rocm", 0, ["--group-add", "GROUP"]),
        ("podman", "rocm", 1000, ["--group-add", "keep-groups"]),
    ],
)
def test_each_engine_is_told_in_its_own_way(
    engine: str, backend: str, uid: int, cards: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Rootless podman would make the caller another user inside, and knows no group by its number."""
    host = Host(dev=write(tmp_path / "dev", {"kfd": "", "dri/renderD128": ""}))
    monkeypatch.setattr(os, "getuid", lambda: uid)
    command = containers.command("serve", Place(engine=engine, image=f"edge-appliance:{backend}"), [], host)
    group = str((tmp_path / "dev/kfd").stat().st_gid)
    option, value = (group if each == "GROUP" else each for each in cards)
    assert value in values(command, option)
    assert values(command, "--userns") == (["keep-id"] if engine == "podman" and uid else [])
    assert ("--gpus" in command) == (engine == "docker" and backend == "cuda")


def test_podman_without_a_description_of_the_cards_is_told_how_to_make_it(engines: Path, tmp_path: Path) -> None:
    engine(engines, "podman", images=("edge-appliance:cuda",))
    environ = {"BACKEND": "cuda", "ENGINE": "podman"}
    with pytest.raises(EnvironmentIncomplete, match=r"podman knows no NVIDIA card: .* `sudo nvidia-ctk cdi generate"):
        containers.place(environ, "serve", Host(root=tmp_path))
    write(tmp_path, {"etc/cdi/nvidia.yaml": "cdiVersion: 0.5.0\nkind: nvidia.com/gpu\n"})
    assert containers.place(environ, "serve", Host(root=tmp_path)).engine == "podman"


def test_keys_stay_out_of_the_repository(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(REPOSITORY)
    monkeypatch.delenv("APPLIANCE_ARTIFACTS")
    assert config.first_keys_folder() == REPOSITORY / "keys"
    assert "/keys/" in (REPOSITORY / ".gitignore").read_text().splitlines()


@pytest.mark.parametrize("umask", [0o022, 0o077])
def test_what_an_engine_would_make_as_roots_is_made_before(
    umask: int, root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("APPLIANCE_KEY_FILE", str(tmp_path / "config/edge-appliance/store.key"))
    before = os.umask(umask)
    try:
        containers.prepare("serve")
    finally:
        os.umask(before)
    folder = tmp_path / "config/edge-appliance"
    modes = [stat.S_IMODE(path.stat().st_mode) for path in (folder, folder / "store.key", root.parent / "keys")]
    assert modes == [0o700, 0o600, 0o755]
    assert stat.S_IMODE(root.stat().st_mode) == 0o777 & ~umask
    assert config.lease_folder().is_dir()


def test_folder_that_cannot_be_made_is_said_with_its_remedy(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setenv("APPLIANCE_CACHE", str(tmp_path / "file/cache"))
    assert containers.main([containers.PREPARE]) == EnvironmentIncomplete.exit_code
    said = capsys.readouterr().err
    assert f"{tmp_path}/file/cache" in said
    assert "Not a directory" in said
    assert "APPLIANCE_CACHE" in said


def test_server_is_published_on_loopback_and_confined(root: Path) -> None:
    line = containers.detached("docker", "cuda")
    there, before, run = line.split(" && ")
    parts = shlex.split(run)
    assert there == f"cd {Path.cwd()}"
    subprocess.run(shlex.split(before), env={**os.environ, "PYTHONPATH": str(REPOSITORY)}, check=True)
    assert root.is_dir()
    assert config.store_key_file().is_file()
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


@pytest.mark.parametrize(
    ("host", "variable", "published"),
    [
        ("", "", "127.0.0.1:8080:8080"),
        ("", "localhost", "127.0.0.1:8080:8080"),
        ("::1", "0.0.0.0", "[::1]:8080:8080"),
        ("[::1]", "", "[::1]:8080:8080"),
        ("", "192.0.2.1", "192.0.2.1:8080:8080"),
    ],
)
def test_address_as_an_engine_reads_it(host: str, variable: str, published: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """One that is empty would be all addresses."""
    monkeypatch.setenv("APPLIANCE_SERVE_HOST", variable)
    monkeypatch.setenv("APPLIANCE_SERVE_PORT", "")
    command = containers.command("serve", Place(engine="docker", image=CPU), ["--host", host] if host else [])
    assert values(command, "--publish") == [published]


@pytest.mark.parametrize(
    ("enforcing", "options"), [("1", ["no-new-privileges", "label=disable"]), ("0", ["no-new-privileges"])]
)
def test_selinux_does_not_keep_a_container_from_its_callers_files(
    enforcing: str, options: list[str], tmp_path: Path
) -> None:
    host = Host(sys=write(tmp_path / "sys", {"fs/selinux/enforce": enforcing}))
    for verb in ("serve", "train"):
        command = containers.command(verb, Place(engine="podman", image=CPU), [], host)
        assert values(command, "--security-opt") == options


def test_docker_that_is_podman_is_called_so(engines: Path) -> None:
    engine(engines, "podman", images=(CPU,))
    (engines / "docker").symlink_to(engines / "podman")
    assert containers.installed() == ["podman"]
    for environ in ({}, {"ENGINE": "docker"}):
        assert containers.place({"BACKEND": "cpu", **environ}, "serve").engine == "podman"


def test_recipe_may_have_a_space_in_its_path() -> None:
    command = ["make", "--no-print-directory", "--dry-run", "train", "RECIPE=my recipes/a.toml", "ARGS=--ask 1"]
    said = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, check=True).stdout
    assert shlex.split(said)[-4:] == ["train", "my recipes/a.toml", "--ask", "1"]


def test_make_serve_shows_its_command_and_runs_it(engines: Path, root: Path) -> None:
    engine(engines, "podman", images=(CPU,))
    environ = {**os.environ, "BACKEND": "cpu"}
    call = [sys.executable, "-m", "appliance.containers", "serve", "--slots", "3"]
    result = subprocess.run(call, env=environ, cwd=REPOSITORY, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    assert result.stderr.startswith("podman run --rm ")
    assert result.stdout.split()[-8:] == [CPU, "serve", "--slots", "3", "--host", "0.0.0.0", "--port", "8080"]
    assert root.is_dir()
    assert f"`make chat` finds {root.parent}/keys/chat.key" in result.stderr


def test_without_an_engine_the_environment_is_set_up_and_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Setting up is played by a program of the same name, and what is executed in the place of this process is caught."""
    setup = "from pathlib import Path; Path('was set up').touch()"
    there = write(tmp_path / "there", {"appliance/__init__.py": "", "appliance/setup.py": setup})
    executed: list[tuple[str, list[str]]] = []
    monkeypatch.setattr(containers, "ROOT", there)
    monkeypatch.setenv("ENGINE", "none")
    monkeypatch.delenv("PYTHONPATH", raising=False)

    def execute(path: str, command: list[str]) -> None:
        executed.append((path, command))
        raise SystemExit  # an exec does not return

    monkeypatch.setattr(os, "execvp", execute)
    for verb, noun in (("serve", "serve"), ("train", "run")):
        with pytest.raises(SystemExit):
            containers.main([verb, "--set", "x=1"])
        program = str(there / ".venv/bin/appliance")
        assert executed.pop() == (program, [program, noun, "--set", "x=1"])
        assert (there / "was set up").exists()
        (there / "was set up").unlink()
    (there / "appliance/setup.py").write_text("raise SystemExit(3)")
    assert containers.main(["serve"]) == 3
    assert executed == []
