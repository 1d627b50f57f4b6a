"""Remembers which foreign files loaded without harm: `probe.py` tries each once a version of llama.cpp, not at each start.

A file is known by its sha256, an adapter by its base's too. Whoever can write to this memory can do as much to the files: it
saves seconds at each start, and the engine is locked in all the same.
"""

import contextlib
import importlib.metadata
import json
from pathlib import Path

from appliance import artifacts
from appliance.serving import probe
from appliance.serving.digests import Digests

NAME = "tried.json"
SCHEMA = 1
MAX_FILES = 256


class Tried:
    """Kept in `folder`; `is_trusted=False` tries every file anew, and remembers it."""

    def __init__(self, folder: Path, digests: Digests, *, is_trusted: bool = True) -> None:
        self._path = folder / NAME
        self._digests = digests
        self._is_trusted = is_trusted

    def check(self, path: Path, base: Path | None = None) -> None:
        """As `probe.check`, unless the file passed it before."""
        files = [self._digests.of(each) for each in (path, base) if each is not None]
        key = " ".join([importlib.metadata.version("llama-cpp-python"), *files])
        known = self._read()
        if self._is_trusted and key in known:
            return
        probe.check(path, base=base)
        newest = [*(each for each in known if each != key), key][-MAX_FILES:]
        with contextlib.suppress(OSError):  # a folder that cannot be written to only costs time at the next start
            artifacts.write_atomically(self._path, json.dumps({"schema": SCHEMA, "tried": newest}, indent=1) + "\n")

    def _read(self) -> list[str]:
        try:
            table = json.loads(self._path.read_text(encoding="utf-8"))
        except (OSError, ValueError):
            return []  # missing or damaged: it is made again
        is_known = isinstance(table, dict) and table.get("schema") == SCHEMA and isinstance(table.get("tried"), list)
        return [each for each in table["tried"] if isinstance(each, str)] if is_known else []
