"""Runs one of llama.cpp's converters, the copies inside the pinned source distribution, in a process of its own.

No network, no download, and nothing of it is changed on disk. Entry: `run`.
"""

import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from appliance import artifacts, config
from appliance.errors import ModelFileError
from convert import llama_cpp_source

LINES_SHOWN = 3


def run(script: str, model: Path, arguments: Sequence[str], target: Path, pre_tokenizer: str | None = None) -> None:
    """Runs `script` and returns once `target` is there; raises `ModelFileError` about `model` with the script's last words.

    A disk that is full is no fault of the model's: `EnvironmentIncomplete`.
    `pre_tokenizer` is the name that the file gets for its tokenizer, whatever the converter would have recognized.
    """
    folder = llama_cpp_source.converter_dir()
    code, said = execute([str(folder), script, pre_tokenizer or "-", *arguments])
    if code != 0 or not target.is_file():
        artifacts.require_not_full(target)
        lines = [line for line in said.splitlines() if line.strip()]
        reason = " | ".join(lines[-LINES_SHOWN:]) or f"the converter gave no reason (exit {code})"
        raise ModelFileError(f"{model} was not converted: {reason}")


def execute(arguments: Sequence[str]) -> tuple[int, str]:
    """Runs `convert.upstream` in a process of its own; its exit code and what it wrote to stderr."""
    command = [sys.executable, "-m", "convert.upstream", *arguments]
    result = subprocess.run(
        command, env=config.quiet_environment(), capture_output=True, text=True, errors="replace", check=False
    )
    return result.returncode, result.stderr
