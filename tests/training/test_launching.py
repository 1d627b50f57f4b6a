"""`appliance train --launch` becomes accelerate's launcher, and is ended with it."""

import contextlib
import json
import signal
from pathlib import Path

import pytest

from appliance import artifacts
from appliance.commands import launching
from appliance.errors import EnvironmentIncomplete, RecipeError
from appliance.training import loop
from tests import tiny_recipe
from tests.running import Trained, call, kill_when, run, start
from tests.training.test_processes import CONFIGURATIONS, worker
from tests.training.test_training_metrics import free_port


def configuration(folder: Path) -> Path:
    """Two processes on one CPU, at a port of their own."""
    text = (CONFIGURATIONS / "two-processes-cpu.yaml").read_text()
    (folder / "two.yaml").write_text(f"{text}main_process_port: {free_port()}\n")
    return folder / "two.yaml"


def test_launch_is_the_same_command_in_several_processes(trained: Trained, tmp_path: Path) -> None:
    """And its exit code and stdout are the command's own."""
    root = tmp_path / "artifacts"
    trained.copy(root, "base")
    file = configuration(tmp_path)
    sets = ("--set", "sft.epochs=2", "--phase", "sft")
    result = run(root, "train", trained.recipe, "--launch", file, *sets, "--json")
    assert result.returncode == 0, result.stderr
    assert json.loads(result.stdout)["results"]["processes"] == 2
    refused = run(root, "train", trained.recipe, f"--launch={file}", "--set", "sft.batch_rows=1", *sets)
    assert refused.returncode != 0
    (line,) = [line for line in refused.stderr.splitlines() if line.startswith("error: ")]
    assert "2 processes cannot share a step" in line


def test_launcher_that_is_ended_ends_its_processes(trained: Trained, tmp_path: Path) -> None:
    root = tmp_path / "artifacts"
    trained.copy(root, "data", "base")
    file = configuration(tmp_path)
    process = start(root, "train", trained.recipe, "--phase", "sft", "--launch", file)
    workers: list[int] = []

    def has_workers() -> bool:
        with contextlib.suppress(AssertionError):
            workers[:] = [worker(process.pid, rank) for rank in (0, 1)]
        return bool(workers) and any(root.glob(f"adapter/*{artifacts.PARTIAL}/{loop.LOSS}"))

    assert kill_when(process, has_workers, signal.SIGTERM) != 0
    assert not any(Path(f"/proc/{each}").exists() for each in workers)


def test_launch_refuses(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tiny_recipe.write(tmp_path / "recipe")
    result = call("train", path, "--launch", tmp_path / "no.yaml")
    assert result.exit_code == 2
    assert "there is no such file; copy one of deploy/accelerate" in result.stderr
    (tmp_path / "two.yaml").touch()
    monkeypatch.setattr("importlib.util.find_spec", lambda _: None)
    with pytest.raises(EnvironmentIncomplete, match="needs the package accelerate"):
        launching.launch(tmp_path / "two.yaml", [])
    for name, value in {"RANK": "1", "LOCAL_RANK": "1", "WORLD_SIZE": "2"}.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(RecipeError, match="one of 2 launched processes already"):
        launching.launch(tmp_path / "two.yaml", [])


def test_command_is_launched_without_its_flag() -> None:
    launcher = ["-m", "accelerate.commands.launch", "--config_file", "a b.yaml", "-m", "appliance"]
    for flag in (["--launch", "a b.yaml"], ["--launch=a b.yaml"]):
        asked = ["train", "r.toml", *flag, "--set", "name=--launch", "--resume"]
        expected = [*launcher, "train", "r.toml", "--set", "name=--launch", "--resume"]
        assert launching.command(Path("a b.yaml"), asked) == expected
