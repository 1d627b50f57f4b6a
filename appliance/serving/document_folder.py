"""The operator's folder of documents: what is in it, what cannot be read and why, and whether it has changed.

A `.txt` or `.md` file is a document, whose id is its path in the folder; a `.jsonl` file has {"id", "text"} in each line.
Read by the server's own process: engines may open no such files. Knows nothing of engines.
"""

import dataclasses
import json
import logging
from collections.abc import Iterator
from pathlib import Path

from appliance.errors import EnvironmentIncomplete
from appliance.serving.requests import Document

TEXT_SUFFIXES, LINES_SUFFIX = (".txt", ".md"), ".jsonl"
MOST_BYTES = 32 * 2**20  # of all files: they cross to the engine in one piece
MAX_ID_CHARACTERS = 512  # as in requests

Mark = tuple[tuple[str, int, int, int], ...]

logger = logging.getLogger("appliance.serving")


@dataclasses.dataclass(frozen=True, slots=True)
class FolderContent:
    """`problems` say what was not taken, with file and line, and why."""

    documents: tuple[Document, ...] = ()
    problems: tuple[str, ...] = ()


class _Refused(Exception):
    """Why a document is not taken."""


def read(folder: Path) -> FolderContent:
    """All documents, by id. Raises `EnvironmentIncomplete` when the folder itself cannot be read."""
    problems: list[str] = []
    found: dict[str, tuple[Document, str]] = {}
    for document, where in _documents(folder, problems):
        try:
            _check(document)
            if document.id in found:
                raise _Refused(f"its id {document.id!r} is that of {found[document.id][1]} too; give each one of its own")
        except _Refused as error:
            problems.append(f"{where}: {error}.")
        else:
            found[document.id] = document, where
    return FolderContent(tuple(document for _, (document, _) in sorted(found.items())), tuple(problems))


class FolderWatch:
    """Tells when a folder has changed, once it does not change any more."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._taken: Mark | None = None
        self._seen: Mark | None = None
        self._is_gone = False

    def first(self) -> FolderContent:
        """What is in it. Raises as `read` does."""
        self._taken = self._seen = _mark(self._folder)
        return read(self._folder)

    def look(self) -> FolderContent | None:
        """What is in it now, if that is new and the same as at the last look.

        A folder that is gone altogether, as when a disk is not mounted, has not lost its documents; that is said once.
        """
        try:
            mark = _mark(self._folder)
            if mark == self._seen != self._taken:
                content = read(self._folder)
                self._taken = mark
                return content
            self._seen, self._is_gone = mark, False
        except EnvironmentIncomplete as error:
            if not self._is_gone:
                logger.warning("event=document_folder_gone reason='%s What was read of it stays.'", error)
            self._is_gone = True
        return None


def _files(folder: Path) -> list[Path]:
    try:
        next(folder.iterdir(), None)
        paths = sorted(folder.rglob("*"))
    except OSError as error:
        raise EnvironmentIncomplete(
            f"serve.document_folder: {folder} cannot be read ({error.strerror}); name a folder, or leave the setting out."
        ) from error
    suffixes = (*TEXT_SUFFIXES, LINES_SUFFIX)
    shown = [path for path in paths if not any(part.startswith(".") for part in path.relative_to(folder).parts)]
    return [path for path in shown if path.suffix.lower() in suffixes and not path.is_dir()]


def _mark(folder: Path) -> Mark:
    """Changes with each change of a file, as far as names, sizes and times tell."""
    found = []
    for path in _files(folder):
        try:
            status = path.stat()
        except OSError:
            found.append((str(path), -1, 0, 0))
        else:
            found.append((str(path), status.st_size, status.st_mtime_ns, status.st_ino))
    return tuple(found)


def _documents(folder: Path, problems: list[str]) -> Iterator[tuple[Document, str]]:
    """Each document, with the place where it stands."""
    left = MOST_BYTES
    for path in _files(folder):
        name = path.relative_to(folder).as_posix()
        try:
            data = _content(path, left)
            text = data.decode()
        except _Refused as error:
            problems.append(f"{path}: {error}.")
        except UnicodeDecodeError as error:
            line = data.count(b"\n", 0, error.start) + 1
            problems.append(f"{path}:{line}: it is not UTF-8 at byte {error.start}; save it as UTF-8.")
        else:
            left -= len(data)
            if path.suffix.lower() == LINES_SUFFIX:
                yield from _lines(path, text, problems)
            else:
                yield Document(id=name, text=text), str(path)


def _content(path: Path, left: int) -> bytes:
    """Raises `_Refused` for a file that cannot be read, or is larger than `left`."""
    try:
        with path.open("rb") as stream:
            data = stream.read(left + 1)
    except OSError as error:
        raise _Refused(f"it cannot be read ({error.strerror})") from error
    if len(data) > left:
        raise _Refused(f"it does not fit any more: the files of the folder may have {MOST_BYTES} bytes together")
    return data


def _lines(path: Path, text: str, problems: list[str]) -> Iterator[tuple[Document, str]]:
    for number, line in enumerate(text.split("\n"), 1):
        if not line.strip():
            continue
        where = f"{path}:{number}"
        try:
            row = json.loads(line)
        except ValueError as error:
            problems.append(f"{where}: it is not JSON ({error}).")
            continue
        if not isinstance(row, dict) or not all(isinstance(row.get(key), str) for key in ("id", "text")):
            problems.append(f'{where}: it must read {{"id": "…", "text": "…"}}.')
        else:
            yield Document(id=row["id"], text=row["text"]), where


def _check(document: Document) -> None:
    """Raises `_Refused` for what no request could send."""
    if not document.text.strip():
        raise _Refused("it is empty")
    if not 0 < len(document.id) <= MAX_ID_CHARACTERS:
        raise _Refused(f"its id has {len(document.id)} characters; it must have 1 to {MAX_ID_CHARACTERS}")
    try:
        (document.id + document.text).encode()
    except UnicodeEncodeError as error:
        raise _Refused("its name or text has characters that are no text") from error
