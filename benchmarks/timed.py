"""Runs a command to its end, with its time and the most anonymous memory of its processes: what the kernel cannot drop."""

import statistics
import subprocess
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from appliance import config
from appliance.errors import ApplianceError
from benchmarks import processes

SAMPLE_SECONDS = 0.05
WEIGHTS, MAPPED_EVERY = ".safetensors", 40  # samples: smaps costs milliseconds
WINDOW_SECONDS = 20.0  # longer than a step, in which all weights are used that are used as they lie in their file
SHOWN_CHARACTERS = 2000  # of what a command that failed had to say


@dataclass(frozen=True, slots=True)
class Timed:
    """The largest sum that was sampled. `held_bytes` has with it the pages of weights that are used as they lie in their
    file, as of most of the run: the kernel could drop them, and would read them again for every step. Pages that were
    only read while loading are not among them, but in runs that are shorter than three windows.
    """

    seconds: float
    anonymous_bytes: int
    held_bytes: int


def run(command: Sequence[str], environment: Mapping[str, str] | None = None, output: Path | None = None) -> Timed:
    """Writes what the command prints to `output`; raises `ApplianceError` where it fails. Mapped are files of weights."""
    environ = {**config.quiet_environment(), **(environment or {})}
    with tempfile.TemporaryFile("w+") as log, output.open("w") if output else tempfile.TemporaryFile("w") as result:
        started = time.monotonic()
        process = subprocess.Popen(command, env=environ, stdout=result, stderr=log)
        peak = samples = used = 0
        windows: list[int] = []
        window_began = started
        while process.poll() is None:
            tree = processes.tree(process.pid)
            anonymous = sum(processes.anonymous_now(each) for each in tree)
            if samples % MAPPED_EVERY == 0:
                used = sum(processes.used_now(each, WEIGHTS) for each in tree) or used
                if time.monotonic() - window_began > WINDOW_SECONDS:
                    windows.append(used)
                    window_began, used = time.monotonic(), 0
                    for each in tree:
                        processes.forget_used(each)
            peak = max(peak, anonymous)
            samples += 1
            time.sleep(SAMPLE_SECONDS)
        seconds = time.monotonic() - started
        if process.returncode:
            log.seek(0)
            words = " ".join(each.strip().splitlines()[0] for each in command[:6])
            raise ApplianceError(f"{words} … failed (exit {process.returncode}): {log.read()[-SHOWN_CHARACTERS:]}")
    return Timed(seconds, peak, peak + int(statistics.median(windows or [used])))
