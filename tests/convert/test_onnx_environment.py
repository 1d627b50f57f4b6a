"""The environment that exports to ONNX: pinned, built in the right order, named when it is missing, without a network."""

import re
import subprocess
import sys
from pathlib import Path

import pytest
from click.testing import Result

from appliance import onnx_setup, setup
from convert import onnx_environment
from tests import tiny_encoders
from tests.running import call
from tests.test_setup import canonical, pins
from tests.tiny_encoders import Exported


def convert(model: Path) -> Result:
    return call("convert", "onnx", model)


def script(path: Path, text: str) -> Path:
    path.write_text(f"#!/bin/sh\n{text}\n")
    path.chmod(0o755)
    return path


def test_one_that_is_missing_is_named(
    exported: Exported, root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("APPLIANCE_CACHE", str(tmp_path / "cache"))
    done = convert(exported.model("nli"))
    assert done.exit_code == 3
    assert "`make onnx-env`" in done.stderr
    assert not root.exists()
    half = onnx_environment.folder() / "bin"
    half.mkdir(parents=True)
    script(half / "python", "exit 0")
    assert convert(exported.model("nli")).exit_code == 3, "without its mark it is not whole"


@pytest.mark.parametrize(
    ("program", "code", "said"),
    [
        ("echo Traceback >&2; echo 'ValueError: no such thing' >&2; exit 1", 1, "ValueError: no such thing"),
        ("exit 28", 3, "No space left on the device"),
        ("kill -9 $$", 1, "exit code -9"),
        ("exit 0", 1, "exit code 0"),
    ],
)
def test_what_fails_in_it_is_said_and_leaves_nothing(
    exported: Exported,
    root: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    program: str,
    code: int,
    said: str,
) -> None:
    python = script(tmp_path / "python", program)
    monkeypatch.setattr(onnx_environment, "python", lambda: python)
    done = convert(exported.model("nli"))
    assert (done.exit_code, said in done.stderr) == (code, True), done.stderr
    assert not [*root.rglob("*.onnx"), *root.rglob("*.partial")]


def test_it_does_not_reach_the_network() -> None:
    program = (
        "import socket, sys; from convert.onnx_export import refuse_network; sys.addaudithook(refuse_network);"
        "socket.create_connection(('127.0.0.1', 9))"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert "PermissionError: the export wanted the network" in done.stderr


def test_every_package_of_it_is_pinned() -> None:
    tiny_encoders.require_environment()
    python = onnx_environment.python()
    freeze = subprocess.run([python, "-m", "pip", "freeze", "--all"], capture_output=True, text=True, check=True).stdout
    installed = dict(line.partition("+")[0].split("==") for line in freeze.splitlines())
    installed = {canonical(name): version for name, version in installed.items() if name != "pip"}
    assert installed == pins(onnx_environment.CONSTRAINTS)
    check = subprocess.run([python, "-m", "pip", "check"], capture_output=True, text=True, check=False)
    assert check.returncode == 0, check.stdout


def test_it_is_for_the_cpu_whatever_the_card() -> None:
    cuda = setup.make_plan(setup.ROOT, {"BACKEND": "cuda", "TORCH_INDEX": "https://example.org/cu126"})
    plan = onnx_setup.make_plan(cuda)
    assert (plan.backend, plan.torch_index) == ("cpu", setup.CPU_INDEX)
    assert re.fullmatch(r"torch==[\d.]+", plan.torch_pin)
    cpu = setup.make_plan(setup.ROOT, {"BACKEND": "cpu", "TORCH_INDEX": "https://example.org/cpu"})
    assert onnx_setup.make_plan(cpu).torch_index == "https://example.org/cpu"


def test_torch_comes_first_and_alone_and_the_mark_last(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("APPLIANCE_CACHE", str(tmp_path))
    plan = onnx_setup.make_plan(setup.make_plan(setup.ROOT, {"BACKEND": "cpu", "TORCH_INDEX": "https://example.org/cpu"}))
    commands: list[str] = []

    def run(command: list[str], _: str) -> None:
        assert not onnx_environment.mark().exists()
        commands.append(" ".join(command))
        plan.venv.mkdir(exist_ok=True)

    monkeypatch.setattr(setup, "run", run)
    onnx_setup.set_up(plan)
    assert [re.search(r"-m venv|--no-deps torch==|optimum-onnx|import ", each)[0] for each in commands] == [  # type: ignore[index]
        *("-m venv", "--no-deps torch==", "optimum-onnx", "import "),
    ]
    assert all(str(onnx_environment.CONSTRAINTS) in each for each in commands[1:3])
    assert onnx_environment.mark().exists()
    onnx_setup.set_up(plan)
    assert len(commands) == 4, "one that is there is left alone"


def test_its_pins_name_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = onnx_environment.folder()
    other = tmp_path / "onnx-export.txt"
    other.write_text(onnx_environment.CONSTRAINTS.read_text() + "another==1\n")
    monkeypatch.setattr(onnx_environment, "CONSTRAINTS", other)
    assert onnx_environment.folder() != before
    other.unlink()
    assert convert(tmp_path).exit_code == 1
