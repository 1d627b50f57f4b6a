"""A scheduler over counted cells, with what follows the operator's documents, of which every trace can be looked for."""

import os
import zlib
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest

from appliance.serving import document_erasure
from appliance.serving.kept_documents import KeptDocuments
from appliance.serving.passages import Passages
from appliance.serving.requests import Document
from appliance.serving.snapshots import Identity, SnapshotStore
from appliance.serving.wire import Documents
from tests.serving.counting_decoder import CountingDecoder
from tests.serving.held_tokens import places
from tests.serving.scheduler_bench import Bench, Client, until

SYSTEM = tuple(range(100, 120))
QUESTION = (7, 8, 9)
BEDS, FOOD, DESK = (Document(id=name, text=f"{name} and what there is to say") for name in ("beds", "food", "desk"))
ALL = (BEDS, FOOD, DESK)


def encoded(document: Document) -> tuple[int, ...]:
    """Every document begins with 1, 2 and ends with 3; those with other ids share nothing else."""
    base = 10_000 + 1000 * (zlib.crc32(document.id.encode()) % 900)
    name, text = (
        [base + at + ord(letter) for letter in letters] for at, letters in ((500, document.id), (0, document.text))
    )
    return (1, 2, *name, *text, 3)


SIZE = len(encoded(BEDS))


def store_in(folder: Path, limit_bytes: int = 10**6, model: str = "m") -> SnapshotStore:
    identity = Identity(model_sha256=model, template_sha256="t", kv_type="f16", layout="l")
    return SnapshotStore(folder / "snapshots", limit_bytes, identity)


def left_in(store: SnapshotStore) -> list[str]:
    return [path.name for path in sorted(store.folder.iterdir()) if path.name != document_erasure.LOCK]


class Served:
    """A scheduler with what follows the folder."""

    def __init__(self, store: SnapshotStore | None, *, reread_tokens: int | None = 0, slots: int = 2, **rest: Any) -> None:
        decoder = CountingDecoder(slots=slots, context_tokens=200, can_move=True)
        self.store = store
        self.bench = Bench(decoder, snapshots=store, reread_tokens=reread_tokens, **({"cache_tokens": 800} | rest))
        self.decoder = self.bench.decoder
        self.kept = KeptDocuments(self.bench.scheduler.documents, encoded, store, "m", retry_seconds=0.01)

    def keep(self, *documents: Document, refused: int = 0) -> None:
        self.kept.keep(Documents(documents=documents, refused=refused, is_read_ahead=True))
        self.kept._thread.submit(lambda: None).result(20)

    def counts(self) -> tuple[int, int, int, int]:
        counts = self.bench.scheduler.load().documents
        return (0, 0, 0, 0) if counts is None else (counts.known, counts.waiting, counts.refused, counts.erased)

    def knows(self, known: int, refused: int = 0, erased: int = 0) -> None:
        until(lambda: self.counts() == (known, 0, refused, erased))

    def ask(self, *documents: Document, question: Sequence[int] = QUESTION, is_exact: bool = False, **fields: Any) -> Client:
        prompt, bounds = list(SYSTEM), [len(SYSTEM)]
        for document in documents:
            prompt += encoded(document)
            bounds.append(len(prompt))
        found = None if is_exact else Passages(tuple(bounds), (None,) * len(documents))
        return self.bench.client(*prompt, *question, passages=found, **fields)

    def places(self, document: Document) -> list[str]:
        """Wherever something of it is held."""
        return places(self.bench, self.store, lambda tokens: holds(tokens, encoded(document)))

    def __enter__(self) -> "Served":
        return self

    def __exit__(self, *_: object) -> None:
        self.kept.close()
        self.bench.close()


def holds(tokens: Sequence[int], run: Sequence[int]) -> bool:
    """Whether any three tokens of it, its id or text, follow each other there."""
    told = {tuple(run[at : at + 3]) for at in range(2, len(run) - 2)}
    return any(tuple(tokens[at : at + 3]) in told for at in range(len(tokens)))


@pytest.fixture(autouse=True)
def no_settling(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("appliance.serving.scheduler.SETTLE_SECONDS", 0.0)


def failing(code: int, times: list[None], real: Callable[..., Any] | None = None, suffix: str = "") -> Callable[..., Any]:
    """Fails with this code for paths that end so; `times` counts it."""

    def call(path: Any, *rest: Any, **named: Any) -> Any:
        if real is not None and not str(path).endswith(suffix):
            return real(path, *rest, **named)
        times.append(None)
        raise OSError(code, os.strerror(code), str(path))

    return call
