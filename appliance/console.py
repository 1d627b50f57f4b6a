"""What every command shares: error reporting with exit codes, `--json`, progress on stderr.

stdout is the result, stderr is progress. This file knows nothing of what the commands do.
"""

import errno
import json
import os
import re
import signal
import sys
import time
from collections.abc import Callable, Mapping
from typing import Any, NoReturn, TypeVar

import click

from appliance.errors import ApplianceError, EnvironmentIncomplete

JSON_SCHEMA = 1
UNITS = {f"{prefix}{i}": (1024 if i else 1000) ** power for power, prefix in enumerate("KMGT", 1) for i in ("", "i")}
F = TypeVar("F", bound=Callable[..., Any])


class Command(click.Command):
    """A Click command that reports an `ApplianceError` in words and leaves with its exit code."""

    def invoke(self, ctx: click.Context) -> Any:
        try:
            return super().invoke(ctx)
        except ApplianceError as error:
            self._leave(ctx, error)
        except OSError as error:
            if error.errno == errno.ENOSPC:  # wherever it strikes: what was complete is kept
                full = f"No space left on the device while writing {error.filename or 'a file'}; free some and repeat."
                self._leave(ctx, EnvironmentIncomplete(full))
            if error.filename is None:
                raise
            self._leave(ctx, ApplianceError(f"{error.filename}: {error.strerror}; check the path and its permissions."))
        except ModuleNotFoundError as error:
            if error.name is None or error.name.partition(".")[0] in ("appliance", "convert"):
                raise
            missing = f"The Python package {error.name!r} is not installed; run `make setup`, or use an image that has it."
            self._leave(ctx, EnvironmentIncomplete(missing))
        except KeyboardInterrupt:
            note("interrupted")
            sys.exit(128 + signal.SIGINT)

    def _leave(self, ctx: click.Context, error: ApplianceError) -> NoReturn:
        if ctx.params.get("as_json"):
            details = {"code": error.api_code, "message": str(error)}
            click.echo(json.dumps({"schema": JSON_SCHEMA, "error": details}, ensure_ascii=False))
        click.echo(f"error: {error}", err=True)
        sys.exit(error.exit_code)


def json_option(function: F) -> F:
    """Adds `--json`, whose value arrives as `as_json`."""
    return click.option("--json", "as_json", is_flag=True, help="Print the result as JSON.")(function)


def emit(result: Mapping[str, Any], as_json: bool, text: str | None = None) -> None:
    """Prints a command's result to stdout: the JSON object, or its text form."""
    if as_json:
        click.echo(json.dumps({"schema": JSON_SCHEMA, **result}, ensure_ascii=False, default=str))
    else:
        click.echo(text if text is not None else "\n".join(f"{key}: {value}" for key, value in result.items()))


def note(message: str) -> None:
    """A line for the person watching, on stderr."""
    click.echo(message, err=True)


class Memory(click.ParamType[int]):
    """An amount of memory in words: `3GiB`, `800 MiB`, `4GB`; its value is in bytes."""

    name = "SIZE"

    def convert(self, value: Any, _parameter: click.Parameter | None, _context: click.Context | None) -> int:
        if isinstance(value, int):
            return value
        match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([KMGT]i?)B\s*", str(value))
        if match is None or not float(match[1]):
            self.fail(f"{value!r} is no amount of memory; write for example 3GiB or 800MiB.")
        return int(float(match[1]) * UNITS[match[2]])


def human_bytes(size_bytes: float) -> str:
    for unit in ("B", "KiB", "MiB"):
        if size_bytes < 1024:
            return f"{size_bytes:.0f} {unit}" if unit == "B" else f"{size_bytes:.1f} {unit}"
        size_bytes /= 1024
    return f"{size_bytes:.1f} GiB"


def human_seconds(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"


class Progress:
    """A progress line with time left: redrawn on a terminal, one line every ten seconds elsewhere."""

    QUIET_INTERVAL_SECONDS = 10.0

    def __init__(self, label: str, total: int, done: int = 0) -> None:
        self.label, self.total = label, total
        self._first_done, self._started = done, time.monotonic()
        self._last_line = self._started
        self._is_terminal = sys.stderr.isatty() and os.environ.get("TERM") != "dumb"

    def say(self, message: str) -> None:
        """A line that stays, in the place of the progress line, which is drawn anew below it."""
        note(f"\r\x1b[K{message}" if self._is_terminal else message)

    def update(self, done: int, detail: str = "") -> None:
        now = time.monotonic()
        is_last = done >= self.total
        if not self._is_terminal and not is_last and now - self._last_line < self.QUIET_INTERVAL_SECONDS:
            return
        self._last_line = now
        ran = done - self._first_done
        left = (now - self._started) / ran * (self.total - done) if ran > 0 else None
        times = f"{human_seconds(now - self._started)} gone"
        if left is not None and not is_last:
            times += f", {human_seconds(left)} left"
        line = f"{self.label} {done}/{self.total}  {times}  {detail}".rstrip()
        if self._is_terminal:
            click.echo(f"\r\x1b[K{line}", err=True, nl=is_last)
        else:
            click.echo(line, err=True)
