"""The operator's folder of documents: what is in it, what cannot be read and why, and whether it has changed.

A `.txt` or `.md` file is a document, whose id is its path in the folder; a `.jsonl` file has {"id", "text"} in each line.
Read by the server's own process: engines may open no such files. Knows nothing of engines.
"""

import codecs
import collections
import dataclasses
import json
import logging
import os
import stat
from collections.abc import Collection, Iterator
from pathlib import Path

from appliance.errors import EnvironmentIncomplete
from appliance.serving.requests import Document

TEXT_SUFFIXES, LINES_SUFFIX = (".txt", ".md"), ".jsonl"
MOST_BYTES = 32 * 2**20  # of all files: they cross to the engine in one piece
MAX_ID_CHARACTERS = 512  # as in requests
RESTLESS_LOOKS = 15  # at a file that is another each time, before that is said

Stamp = tuple[int, ...]  # another one after each change of a file, as far as sizes and times tell

logger = logging.getLogger("appliance.serving")


@dataclasses.dataclass(frozen=True, slots=True)
class FolderContent:
    """`problems` say what was not taken, with file and line, and why."""

    documents: tuple[Document, ...] = ()
    problems: tuple[str, ...] = ()


@dataclasses.dataclass(frozen=True, slots=True)
class _File:
    """What was read of a file. `is_final`: while its stamp stays, reading it again would give nothing else."""

    stamp: Stamp
    documents: tuple[tuple[Document, str], ...] = ()  # each with the place where it stands
    problems: tuple[str, ...] = ()
    size: int = 0
    is_final: bool = True


@dataclasses.dataclass(frozen=True, slots=True)
class _Listing:
    """The files of a folder, on `device`; and the folders in it that cannot be read, with the reason."""

    device: int
    stamps: dict[Path, Stamp]
    closed: dict[Path, str]

    def is_hidden(self, path: Path) -> bool:
        """Whether it may still be there, in a folder that cannot be read."""
        return any(folder in path.parents for folder in self.closed)


class _Refused(Exception):
    """Why a document is not taken."""


def read(folder: Path) -> FolderContent:
    """All documents, by id. Raises `EnvironmentIncomplete` when the folder itself cannot be read."""
    return FolderWatch(folder).first()


class FolderWatch:
    """Tells when a folder has changed. A file counts as changed, or as removed, once two looks in a row agree on it."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._device: int | None = None
        self._seen: dict[Path, Stamp] = {}
        self._files: dict[Path, _File] = {}
        self._told: FolderContent | None = None
        self._restless: collections.Counter[Path] = collections.Counter()  # how often in a row a file was another
        self._is_gone = False
        self._is_new = True

    def first(self) -> FolderContent:
        """What is in it. Raises as `read` does."""
        listing = _listed(self._folder)
        self._device, self._seen, self._is_new = listing.device, listing.stamps, False
        self._read(listing)
        self._told = self._content(listing)
        return self._told

    def look(self) -> FolderContent | None:
        """What is in it now, if that is new. Of a file that keeps changing, what was last read of it stays.

        A folder that is gone altogether, as when a disk is not mounted, has not lost its documents; that is said once.
        """
        try:
            listing = _listed(self._folder)
            if self._device not in (None, listing.device) and not listing.stamps:
                raise EnvironmentIncomplete(f"serve.document_folder: {self._folder} is on another disk, and empty.")
        except EnvironmentIncomplete as error:
            if not self._is_gone:
                logger.warning("event=document_folder_gone reason=%r", f"{error} What was read of it stays.")
            self._is_gone = True
            return None
        self._device, self._is_gone = listing.device, False
        before, self._seen = self._seen, listing.stamps
        moving = {path for path in before.keys() | listing.stamps.keys() if before.get(path) != listing.stamps.get(path)}
        self._say_restless(moving)
        if self._is_new:
            self._is_new = False  # all of it may be half written
            return None
        self._read(listing, moving)
        content = self._content(listing)
        if content == self._told:
            return None
        self._told = content
        return content

    def _read(self, listing: _Listing, moving: Collection[Path] = ()) -> None:
        """Reads what is not known, and forgets what is gone, but for files that are `moving`."""
        left = MOST_BYTES
        found: dict[Path, _File] = {}
        for path in sorted(self._files.keys() | listing.stamps.keys()):
            known, stamp = self._files.get(path), listing.stamps.get(path)
            file = known
            if path not in moving and stamp is None:
                file = known if listing.is_hidden(path) else None
            elif path not in moving and stamp is not None and (known is None or known.stamp != stamp or not known.is_final):
                file = _file(path, path.relative_to(self._folder).as_posix(), stamp, left, known)
            if file is not None:
                found[path] = file
                left -= file.size
        self._files = found

    def _content(self, listing: _Listing) -> FolderContent:
        problems = [f"{path}: {reason}; what was read of it before stays." for path, reason in listing.closed.items()]
        found: dict[str, tuple[Document, str]] = {}
        for file in self._files.values():
            problems += file.problems
            for document, where in file.documents:
                if document.id in found:
                    other = found[document.id][1]
                    problems.append(f"{where}: its id {document.id!r} is that of {other} too; give each one of its own.")
                else:
                    found[document.id] = document, where
        return FolderContent(tuple(document for _, (document, _) in sorted(found.items())), tuple(problems))

    def _say_restless(self, moving: Collection[Path]) -> None:
        """Once for each file, until it rests."""
        self._restless = collections.Counter({path: self._restless[path] + 1 for path in moving})
        for path, count in self._restless.items():
            if count == RESTLESS_LOOKS:
                reason = "it keeps changing; what was last read of it stays until it rests"
                logger.warning("event=document_restless file=%r reason=%r", str(path), reason)


def _listed(folder: Path) -> _Listing:
    """Raises `EnvironmentIncomplete` when the folder itself cannot be read."""
    stamps: dict[Path, Stamp] = {}
    closed: dict[Path, str] = {}
    waiting = [folder]
    try:
        device = folder.stat().st_dev
        while waiting:
            at = waiting.pop()
            try:
                entries = _entries(at)
            except OSError as error:
                if at == folder:
                    raise
                if not isinstance(error, FileNotFoundError):
                    closed[at] = f"it cannot be read ({error.strerror})"
                continue
            for entry in entries:
                if entry.is_dir(follow_symlinks=False):
                    waiting.append(Path(entry.path))
                elif Path(entry.name).suffix.lower() in (*TEXT_SUFFIXES, LINES_SUFFIX) and not Path(entry.path).is_dir():
                    stamps[Path(entry.path)] = _stamp(entry)
    except OSError as error:
        raise EnvironmentIncomplete(
            f"serve.document_folder: {folder} cannot be read ({error.strerror}); name a folder, or leave the setting out."
        ) from error
    return _Listing(device, stamps, closed)


def _entries(folder: Path) -> list[os.DirEntry[str]]:
    with os.scandir(folder) as entries:
        return [entry for entry in entries if not entry.name.startswith(".")]


def _stamp(entry: os.DirEntry[str]) -> Stamp:
    try:
        status = entry.stat()
    except OSError:
        return ()
    return status.st_size, status.st_mtime_ns, status.st_ctime_ns, status.st_ino, status.st_dev


def _file(path: Path, name: str, stamp: Stamp, left: int, known: _File | None) -> _File:
    """What is in a file now. Of one that cannot be read, what is known of it stays; it is tried again."""
    try:
        data = _data(path, left)
    except FileNotFoundError as error:
        return _File(stamp, problems=(f"{path}: it cannot be read ({error.strerror}).",), is_final=False)
    except OSError as error:
        problem = f"{path}: it cannot be read ({error.strerror})."
        kept = known or _File(stamp)
        return dataclasses.replace(kept, stamp=stamp, problems=(problem,), is_final=False)
    except _Refused as error:
        return _File(stamp, problems=(f"{path}: {error}.",), is_final=False)
    problems: list[str] = []
    documents = []
    for document, where in _documents(path, name, data, problems):
        try:
            _check(document)
        except _Refused as error:
            problems.append(f"{where}: {error}.")
        else:
            documents.append((document, where))
    return _File(stamp, tuple(documents), tuple(problems), len(data))


def _data(path: Path, left: int) -> bytes:
    """Raises `OSError`, and `_Refused` for what is no file, or larger than `left`."""
    descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)  # a pipe would have us wait for its writer
    try:
        status = os.fstat(descriptor)
        if not stat.S_ISREG(status.st_mode):
            raise _Refused("it is no ordinary file")
        with open(descriptor, "rb", closefd=False) as stream:
            data = stream.read(left + 1) if status.st_size <= left else None
    finally:
        os.close(descriptor)
    if data is None or len(data) > left:
        raise _Refused(f"it does not fit any more: the files of the folder may have {MOST_BYTES} bytes together")
    return data


def _documents(path: Path, name: str, data: bytes, problems: list[str]) -> Iterator[tuple[Document, str]]:
    """Each document, with the place where it stands."""
    try:
        text = data.removeprefix(codecs.BOM_UTF8).decode()
    except UnicodeDecodeError as error:
        line = error.object.count(b"\n", 0, error.start) + 1
        problems.append(f"{path}:{line}: it is not UTF-8 at byte {error.start}; save it as UTF-8.")
        return
    if path.suffix.lower() == LINES_SUFFIX:
        yield from _lines(path, text, problems)
    else:
        yield Document(id=name, text=text), str(path)


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
        except RecursionError:
            problems.append(f"{where}: it is nested too deep.")
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
