"""Erases what is on disk of documents that are not in the operator's folder any more, for every model that has read them.

Beside the prefix files lies a list for each model: which documents of the folder it may have read, by a digest of
what they show, with their tokens. It is written before the first of their files, so that whatever was removed is found
again, also while no server ran. Used by the server at its start and by engines, of which several may share the folder.
Knows nothing of cells.
"""

import contextlib
import dataclasses
import fcntl
import hashlib
import json
import logging
import os
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from appliance import artifacts
from appliance.serving import passages, prefix_file
from appliance.serving.requests import Document
from appliance.serving.runs import Run, finder, packed
from appliance.text import passages as passage_texts

SCHEMA = 1
LISTS, HALF_WRITTEN_LISTS, LOCK = "documents-*.json", ".documents-*", ".documents.lock"

logger = logging.getLogger("appliance.serving")

Documents = Mapping[str, Run]  # by digest


@dataclasses.dataclass(frozen=True, slots=True)
class ErasedFiles:
    """How many documents were found to have been removed, and how many files held something of them."""

    documents: int = 0
    files: int = 0


def digest(document: Document) -> str:
    """Of what a prompt shows of it: with another text or id it is another document."""
    return hashlib.sha256(passage_texts.shown(document.id, document.text).encode()).hexdigest()


def note(folder: Path, model_sha256: str, documents: Documents) -> None:
    """Adds documents to those that a model may have read. Raises `OSError`."""
    path = _list_of(folder, model_sha256)
    if documents.keys() <= _read(path).keys():
        return
    with _locked(folder):
        _write(path, {**_read(path), **documents})


def noted(folder: Path, model_sha256: str) -> Documents:
    """What `note` was told, as far as it was not erased since. Raises `OSError`."""
    return _read(_list_of(folder, model_sha256))


def erase(folder: Path, kept: Collection[str], removed: Mapping[str, Collection[Run]] | None = None) -> ErasedFiles:
    """Deletes every file that holds a document whose digest is not `kept`, and forgets it.

    The operator's documents that no list tells of count as removed: their list was lost. `removed` ones, by the model that
    may have read them, do too. Raises `OSError` when not all could be deleted; asked again, it goes on.
    """
    if not folder.is_dir() or not _Found(folder, kept, removed or {}).runs:
        return ErasedFiles()
    with _locked(folder):
        found = _Found(folder, kept, removed or {})
        finders = {of: finder(gone.values()) for of, gone in found.runs.items()}  # files hold documents whole
        holding = [path for path, of, tokens, _ in found.held if of in finders and finders[of](tokens) is not None]
        _delete(folder, found, holding)
        for path, known in found.lists.items():
            if known.keys() - set(kept):
                _write(path, {name: run for name, run in known.items() if name in kept})
        artifacts.flush(folder)
    return ErasedFiles(sum(map(len, found.runs.values())), len(holding))


class _Found:
    """What is to be erased: `runs`, by content, for each model's list; and the files there are."""

    def __init__(self, folder: Path, kept: Collection[str], removed: Mapping[str, Collection[Run]]) -> None:
        self.failures: list[OSError] = []
        self.lists = {path: _read(path) for path in sorted(folder.glob(LISTS))}
        self.held = list(_held(folder, self.failures))
        self.runs: dict[Path, dict[bytes, Run]] = {}
        for path, known in self.lists.items():
            self._add(path, (run for name, run in known.items() if name not in kept))
        for model_sha256, runs in removed.items():
            self._add(_list_of(folder, model_sha256), runs)
        listed = {path: {packed(run).tobytes() for run in known.values()} for path, known in self.lists.items()}
        for _, of, tokens, is_operators in self.held:
            if is_operators and packed(tokens).tobytes() not in listed.get(of, ()):
                self._add(of, [tokens])

    def _add(self, path: Path, runs: Iterable[Run]) -> None:
        for run in runs:
            self.runs.setdefault(path, {})[packed(run).tobytes()] = run


def _delete(folder: Path, found: _Found, holding: Sequence[Path]) -> None:
    """All that can be; then raises `OSError` for what could not."""
    told = {path for path, *_ in found.held}
    # What is so short that nobody can say of what it is may be the beginning of one.
    halves = [path for path in folder.glob(f"*{prefix_file.PARTIAL_SUFFIX}") if path not in told]
    abandoned = [path for path in halves if not prefix_file.is_being_written(path)]
    failures = found.failures
    for path in (*holding, *abandoned, *folder.glob(HALF_WRITTEN_LISTS)):  # only who holds the lock writes lists
        try:
            path.unlink(missing_ok=True)
        except OSError as error:
            failures.append(error)
    artifacts.flush(folder)  # before a list forgets what was in them
    if failures:
        raise failures[0]


@contextlib.contextmanager
def _locked(folder: Path) -> Iterator[None]:
    """One engine after the other, of those that share the folder; the lock ends with the process. Raises `OSError`."""
    descriptor = os.open(folder / LOCK, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, prefix_file.FILE_MODE)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        os.close(descriptor)


def _held(folder: Path, failures: list[OSError]) -> Iterator[tuple[Path, Path, Run, bool]]:
    """Each file, half written ones too, with its model's list, the token ids in it, and whether it is the operator's."""
    for path in sorted(folder.iterdir()):
        if path.suffix not in (prefix_file.SUFFIX, prefix_file.PARTIAL_SUFFIX):
            continue
        try:
            fields = prefix_file.told(path)
        except OSError as error:
            failures.append(error)
            continue
        if fields is not None:
            known = fields["tokens"]
            is_operators = fields["owner"] is None and passages.is_alone(known)
            yield path, _list_of(folder, fields["model_sha256"]), packed(passages.texts(known)), is_operators


def _list_of(folder: Path, model_sha256: str) -> Path:
    return folder / f"documents-{model_sha256[:32]}.json"


def _read(path: Path) -> dict[str, Run]:
    """Raises `OSError`; a list that is damaged tells nothing."""
    try:
        table: Any = json.loads(path.read_text(encoding="utf-8"))
        found = dict(table["documents"]) if table["schema"] == SCHEMA else {}
        return {str(name): packed(run) for name, run in found.items()}
    except FileNotFoundError:
        return {}
    except (ValueError, KeyError, TypeError, OverflowError) as error:
        logger.warning("event=document_list_unreadable file=%s reason=%r", path.name, str(error))
        return {}


def _write(path: Path, documents: Documents) -> None:
    if documents:
        lists = {name: list(run) for name, run in documents.items()}
        artifacts.write_atomically(path, json.dumps({"schema": SCHEMA, "documents": lists}) + "\n")
    else:
        path.unlink(missing_ok=True)
