"""Erases what is on disk of documents that are not in the operator's folder any more, for every model that has read them.

Beside the prefix files lies a list for each model: which documents of the folder it may have read, by a digest of
what they show, with their tokens. It is written before the first of their files, so that whatever was removed is found
again, also while no server ran. Used by the server at its start, when no engine writes yet, and by engines. Knows nothing
of cells.
"""

import dataclasses
import hashlib
import json
import logging
from collections.abc import Collection, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from appliance import artifacts
from appliance.serving import passages, prefix_file
from appliance.serving.requests import Document
from appliance.serving.runs import Run, finder
from appliance.text import passages as passage_texts

SCHEMA = 1
LISTS, HALF_WRITTEN_LISTS = "documents-*.json", ".documents-*"

logger = logging.getLogger("appliance.serving")

Documents = Mapping[str, Sequence[int]]  # tokens by digest


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
    known = _read(path)
    if documents.keys() - known.keys():
        _write(path, {**known, **documents})


def noted(folder: Path, model_sha256: str) -> Documents:
    """What `note` was told, as far as it was not erased since."""
    return _read(_list_of(folder, model_sha256))


def erase(folder: Path, kept: Collection[str]) -> ErasedFiles:
    """Deletes every file that holds a document whose digest is not `kept`, and forgets it. Raises `OSError`.

    The operator's documents that no list tells of count as removed: their list was lost.
    """
    if not folder.is_dir():
        return ErasedFiles()
    lists = {path: _read(path) for path in sorted(folder.glob(LISTS))}
    removed = {path: {name: run for name, run in known.items() if name not in kept} for path, known in lists.items()}
    held = list(_held(folder))
    runs = {path: set(map(tuple, gone.values())) for path, gone in removed.items()}
    for _, of, tokens, is_operators in held:
        if is_operators and tokens not in map(tuple, lists.get(of, {}).values()):
            runs.setdefault(of, set()).add(tokens)
    if not any(runs.values()):
        return ErasedFiles()
    # Files hold documents whole: one that only begins alike is another.
    finders = {of: finder([Run(tokens, len(tokens)) for tokens in gone]) for of, gone in runs.items()}
    found = [path for path, of, tokens, _ in held if of in finders and finders[of](tokens) is not None]
    told = {path for path, *_ in held}
    # What is so short that nobody can say of what it is may be the beginning of one.
    found += [path for path in folder.glob(f"*{prefix_file.PARTIAL_SUFFIX}") if path not in told]
    for path in (*found, *folder.glob(HALF_WRITTEN_LISTS)):
        path.unlink(missing_ok=True)
    for path, gone in removed.items():
        if gone:
            _write(path, {name: run for name, run in lists[path].items() if name not in gone})
    artifacts.flush(folder)
    return ErasedFiles(sum(map(len, runs.values())), len(found))


def _held(folder: Path) -> Iterator[tuple[Path, Path, tuple[int, ...], bool]]:
    """Each file, half written ones too, with its model's list, the token ids in it, and whether it is the operator's."""
    for path in sorted(folder.iterdir()):
        if (
            path.suffix in (prefix_file.SUFFIX, prefix_file.PARTIAL_SUFFIX)
            and (fields := prefix_file.told(path)) is not None
        ):
            known = fields["tokens"]
            is_operators = fields["owner"] is None and passages.is_alone(known)
            yield path, _list_of(folder, fields["model_sha256"]), tuple(passages.texts(known)), is_operators


def _list_of(folder: Path, model_sha256: str) -> Path:
    return folder / f"documents-{model_sha256[:32]}.json"


def _read(path: Path) -> dict[str, list[int]]:
    try:
        table: Any = json.loads(path.read_text(encoding="utf-8"))
        found: dict[str, list[int]] = dict(table["documents"]) if table["schema"] == SCHEMA else {}
    except FileNotFoundError:
        return {}
    except (OSError, ValueError, KeyError, TypeError) as error:
        logger.warning("event=document_list_unreadable file=%s reason=%r", path.name, str(error))
        return {}
    return found


def _write(path: Path, documents: Documents) -> None:
    if documents:
        artifacts.write_atomically(path, json.dumps({"schema": SCHEMA, "documents": documents}) + "\n")
    else:
        path.unlink(missing_ok=True)
