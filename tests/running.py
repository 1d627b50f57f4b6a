"""Runs the command line: in a process of its own, or in this one, where torch is loaded already."""

import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from click.testing import CliRunner, Result

from appliance import artifacts, config
from appliance.cli import main

WAIT_SECONDS = 600.0  # far more than anything here takes on a busy machine


@dataclass(frozen=True, slots=True)
class Trained:
    """What a run of the pipeline made, by the name of the step."""

    root: Path
    recipe: Path
    made: Mapping[str, Path]
    output: Mapping[str, Any]

    @property
    def full(self) -> Path:
        """The 16-bit GGUF file."""
        return next(self.made["gguf"].glob("*.gguf"))

    def manifest(self, step: str) -> Mapping[str, Any]:
        return artifacts.load(self.made[step]).manifest

    def copy(self, root: Path, *steps: str) -> None:
        """Copies the artifacts of some steps to another artifacts folder."""
        for step in steps:
            made = self.made[step]
            shutil.copytree(made, root / made.parent.name / made.name)


def environment(root: Path) -> dict[str, str]:
    kept = {key: value for key, value in config.quiet_environment().items() if not key.startswith("APPLIANCE_")}
    return {**kept, "APPLIANCE_ARTIFACTS": str(root), "APPLIANCE_KEY_FILE": str(root.parent / "store.key")}


def start(root: Path, *arguments: str | Path, **options: Any) -> "subprocess.Popen[str]":
    """Starts `appliance ARGUMENTS`."""
    command = [sys.executable, "-m", "appliance", *map(str, arguments)]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    return subprocess.Popen(command, env=environment(root), text=True, **pipes, **options)


def run(root: Path, *arguments: str | Path) -> "subprocess.CompletedProcess[str]":
    """Runs `appliance ARGUMENTS` to its end."""
    with start(root, *arguments) as process:
        stdout, stderr = process.communicate(timeout=WAIT_SECONDS)
    return subprocess.CompletedProcess(process.args, process.returncode, stdout, stderr)


def call(*arguments: str | Path) -> Result:
    """Runs `appliance ARGUMENTS` in this process; an exception that a person would see as a traceback is raised."""
    result = CliRunner().invoke(main, list(map(str, arguments)), prog_name="appliance")
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    return result


def kill_when(process: "subprocess.Popen[str]", condition: Callable[[], bool], number: int, *, group: bool = False) -> int:
    """Sends the signal as soon as the condition holds; returns the exit code."""
    deadline = time.monotonic() + WAIT_SECONDS
    with process:
        while not condition():
            assert process.poll() is None, f"ended too early: {process.communicate()}"
            assert time.monotonic() < deadline
            time.sleep(0.005)
        (os.killpg if group else os.kill)(process.pid, number)
        process.communicate(timeout=WAIT_SECONDS)
    return process.returncode
