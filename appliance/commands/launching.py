"""`--launch`: the same command again, in the processes that accelerate's launcher starts on this machine or on several."""

import importlib.util
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import NoReturn

from appliance import config
from appliance.errors import EnvironmentIncomplete, RecipeError
from appliance.training import processes

FLAG = "--launch"


def launch(file: Path, arguments: Sequence[str]) -> NoReturn:
    """Becomes the launcher, so that its exit code and the signals it is sent are this command's own.

    `arguments` are those of the command line. Raises for a file that is not there, and under a launcher.
    """
    if processes.count() > 1:
        raise RecipeError(f"{FLAG} {file}: this is one of {processes.count()} launched processes already; leave it out.")
    if not file.is_file():
        raise RecipeError(
            f"{FLAG} {file}: there is no such file; copy one of deploy/accelerate, or make one with `accelerate config`."
        )
    if importlib.util.find_spec("accelerate") is None:
        raise EnvironmentIncomplete(f"{FLAG} needs the package accelerate; install the training extra (`make setup`).")
    sys.stdout.flush()
    sys.stderr.flush()
    os.execve(sys.executable, [sys.executable, *command(file, arguments)], config.quiet_environment())


def command(file: Path, arguments: Sequence[str]) -> list[str]:
    """What Python is given: accelerate's launcher, and this command without its flag."""
    return ["-m", "accelerate.commands.launch", "--config_file", str(file), "-m", "appliance", *_without(arguments)]


def _without(arguments: Sequence[str]) -> list[str]:
    kept: list[str] = []
    words = iter(arguments)
    for word in words:
        if word == FLAG:
            next(words, None)
        elif not word.startswith(f"{FLAG}="):
            kept.append(word)
    return kept
