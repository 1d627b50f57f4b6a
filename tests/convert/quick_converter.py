"""llama.cpp's converters without their four seconds of imports: each run is a fork of one process that has imported them.

The fork is of a server that has done nothing else, so that no thread of this process (torch's, llama.cpp's) is copied.
"""

import multiprocessing
import os
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

import pytest

from convert import converter, upstream

WAIT_SECONDS = 120.0


def install(monkeypatch: pytest.MonkeyPatch) -> None:
    """Runs converters this way as long as the patch lasts."""
    monkeypatch.setattr(converter, "execute", execute)


def execute(arguments: Sequence[str]) -> tuple[int, str]:
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["tests.convert.converter_preload"])
    with tempfile.NamedTemporaryFile() as said:
        process = context.Process(target=_convert, args=(list(arguments), said.name))
        process.start()
        process.join(WAIT_SECONDS)
        assert process.exitcode is not None
        return process.exitcode, Path(said.name).read_text(encoding="utf-8", errors="replace")


def _convert(arguments: list[str], said: str) -> None:
    """In the fork."""
    with open(said, "w") as stream:  # noqa: PTH123 (its descriptor is what is wanted)
        os.dup2(stream.fileno(), sys.stderr.fileno())
    upstream.main(arguments)
