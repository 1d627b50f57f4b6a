"""The sha256 of model files, remembered: gigabytes are read once, not at each start.

A digest is known by the file's device, inode, size and times of change. Whoever can write to the file can also write to
this memory: it saves time, and guards against damage and mistakes, not against an attacker with that right. Knows nothing
of models.
"""

import contextlib
import hashlib
import json
import os
import time
from pathlib import Path

from appliance import artifacts
from appliance.errors import ArtifactError

NAME = "digests.json"
SCHEMA = 1
MAX_FILES = 256
SETTLED_SECONDS = 2.0  # a file changed later than this may change again within the same tick of the clock


class Digests:
    """Kept in `folder`; `is_trusted=False` computes each digest anew, and remembers it."""

    def __init__(self, folder: Path, *, is_trusted: bool = True) -> None:
        self._path = folder / NAME
        self._is_trusted = is_trusted

    def of(self, path: Path) -> str:
        """The sha256 of a file in hexadecimal. Raises `ArtifactError` when it changes meanwhile."""
        with path.open("rb") as stream:
            before = _mark(stream.fileno())
            known = self._read()
            if self._is_trusted and before in known:
                return known[before]
            digest = hashlib.file_digest(stream, "sha256").hexdigest()
            status = os.fstat(stream.fileno())
            if _mark(stream.fileno()) != before:
                raise ArtifactError(f"{path} is being written; wait until that is done, and repeat.")
        if time.time() - max(status.st_mtime, status.st_ctime) > SETTLED_SECONDS:
            self._remember(before, digest)
        return digest

    def _read(self) -> dict[str, str]:
        try:
            table = json.loads(self._path.read_text(encoding="utf-8"))
        except (OSError, ValueError):
            return {}  # missing or damaged: it is made again
        is_known = isinstance(table, dict) and table.get("schema") == SCHEMA and isinstance(table.get("files"), dict)
        return {str(mark): str(digest) for mark, digest in table["files"].items()} if is_known else {}

    def _remember(self, mark: str, digest: str) -> None:
        files = self._read()
        files.pop(mark, None)
        files[mark] = digest
        newest = dict(list(files.items())[-MAX_FILES:])
        with contextlib.suppress(OSError):  # a folder that cannot be written to only costs time at the next start
            artifacts.write_atomically(self._path, json.dumps({"schema": SCHEMA, "files": newest}, indent=1) + "\n")


def _mark(descriptor: int) -> str:
    status = os.fstat(descriptor)
    numbers = (status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns, status.st_ctime_ns)
    return "-".join(map(str, numbers))
