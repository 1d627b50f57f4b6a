"""The operator's documents: read ahead and kept on disk for everybody, and erased without a trace; every cell is checked."""

import errno
import fcntl
import logging
import os
import threading
import zlib
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest

from appliance.errors import PromptTooLong
from appliance.serving import document_erasure, passages, prefix_file
from appliance.serving.kept_documents import KeptDocuments
from appliance.serving.passages import Passages
from appliance.serving.requests import Document
from appliance.serving.snapshots import Identity, Prefix, SnapshotStore
from appliance.serving.wire import Documents
from tests.serving.counting_decoder import CountingDecoder
from tests.serving.held_tokens import in_files, places
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
        return places(self.bench, self.store, lambda tokens: _holds(tokens, encoded(document)))

    def __enter__(self) -> "Served":
        return self

    def __exit__(self, *_: object) -> None:
        self.kept.close()
        self.bench.close()


def _holds(tokens: Sequence[int], run: Sequence[int]) -> bool:
    """Whether any three tokens of it, its id or text, follow each other there."""
    told = {tuple(run[at : at + 3]) for at in range(2, len(run) - 2)}
    return any(tuple(tokens[at : at + 3]) in told for at in range(len(tokens)))


@pytest.fixture(autouse=True)
def no_settling(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("appliance.serving.scheduler.SETTLE_SECONDS", 0.0)


@pytest.fixture
def store(tmp_path: Path) -> SnapshotStore:
    return store_in(tmp_path)


class TestReading:
    def test_documents_are_read_before_anybody_asks_for_everybody_and_once(self, store: SnapshotStore) -> None:
        with Served(store) as served:
            served.keep(*ALL)
            served.knows(3)
            assert served.decoder.computed == 3 * SIZE - 2 * 2, "what all begin with is read once"
            assert len(list(store.folder.glob("*.prefix"))) == 3
            for tenant in ("a", "b"):
                before = served.decoder.computed
                end = served.ask(DESK, BEDS, tenant=tenant).finished()
                assert (end.documents, end.stitched_tokens) == ("stitched", 2 * SIZE)
                assert served.decoder.computed - before == len(SYSTEM) + len(QUESTION) + 4
                served.ask(DESK, BEDS, tenant=tenant).finished()
            with served.bench.together():
                assert served.bench.scheduler._prefixes.worth_saving() is None, "what a tenant uses is not written once more"
            served.keep(*ALL)
            served.knows(3)
            assert len(list(store.folder.glob("*.prefix"))) == 3

    def test_a_restart_finds_them_on_disk(self, store: SnapshotStore, tmp_path: Path) -> None:
        with Served(store) as served:
            served.keep(*ALL)
            served.knows(3)
        with Served(store_in(tmp_path)) as served:
            served.keep(*ALL)
            served.knows(3)
            assert served.decoder.computed == 0
            assert served.ask(FOOD, BEDS).finished().stitched_tokens == 2 * SIZE
            assert served.decoder.computed == len(SYSTEM) + len(QUESTION) + 4

    def test_there_may_be_more_than_memory_holds(self, store: SnapshotStore) -> None:
        many = [Document(id=f"number {number}", text="what it says, at some length") for number in range(12)]
        size = len(encoded(many[-1]))
        with Served(store, cache_tokens=180) as served:
            served.keep(*many)
            served.knows(12)
            assert sum(len(encoded(each)) for each in many) - 2 * 11 == served.decoder.computed > 2 * 180
            assert served.bench.scheduler.load().cached_tokens <= 180
            for at in (0, 3, 6, 9):
                assert served.ask(many[at], many[11]).finished().stitched_tokens == len(encoded(many[at])) + size
            assert served.bench.scheduler._prefixes.place_left == 180, "they are not held on to in memory"

    def test_what_tenants_have_in_memory_is_not_pushed_out(self, store: SnapshotStore) -> None:
        with Served(store, cache_tokens=100, slots=1) as served:
            served.bench.client(*range(3000, 3090)).end()
            served.keep(*ALL)
            served.knows(3)
            assert served.bench.client(*range(3000, 3090), 5).finished().cached_tokens == 90

    def test_requests_come_first(self, store: SnapshotStore) -> None:
        with Served(store, slots=1) as served:
            served.decoder.gate.clear()
            served.keep(*ALL)
            served.decoder.entered.acquire()
            client = served.ask(BEDS, max_tokens=1)
            served.decoder.gate.set()
            assert client.finished().documents == "stitched"
            served.knows(3)

    def test_those_that_find_no_place_on_disk_are_refused_and_not_read(
        self, tmp_path: Path, caplog: pytest.LogCaptureFixture
    ) -> None:
        place = SIZE * (10 + 24) + 4096
        with Served(store_in(tmp_path, 2 * place + 100)) as served, caplog.at_level(logging.WARNING):
            served.keep(*ALL)
            served.knows(2, refused=1)
            until(lambda: "event=documents_known known=2 refused=1" in caplog.text)
            assert served.decoder.computed == 2 * SIZE - 2
            assert "fitting=2 of=3 remedy='raise serve.snapshot_mib to 1'" in caplog.text

    def test_nothing_else_on_disk_pushes_them_out(self, tmp_path: Path) -> None:
        store = store_in(tmp_path, 3 * (SIZE * (10 + 24) + 4096))
        with Served(store) as served:
            served.keep(*ALL)
            served.knows(3)
            left = store.limit_bytes - sum(path.stat().st_size for path in store.folder.glob("*.prefix"))
            other = Prefix(tuple(range(5000, 5100)), None, "a")
            assert not store.write(other, bytes(left))
            assert store.write(other, bytes(left // 2 - 1000))
            assert store.write(Prefix((1,), None, "a"), bytes(left // 2 + 1000)), "at the price of the one before"
            assert other not in store
            assert all(Prefix(passages.alone(encoded(each))) in store for each in ALL)

    def test_without_a_disk_as_many_are_read_as_memory_has_place_for(self, caplog: pytest.LogCaptureFixture) -> None:
        with Served(None, cache_tokens=2 * SIZE + 30) as served, caplog.at_level(logging.WARNING):
            served.keep(*ALL)
            served.knows(2, refused=1)
            assert "raise serve.cache_tokens by" in caplog.text
            assert served.decoder.computed == 2 * SIZE - 2
            assert served.ask(FOOD).finished().stitched_tokens == SIZE

    def test_a_full_disk_is_said_once_and_requests_are_answered(
        self, store: SnapshotStore, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
    ) -> None:
        def write(descriptor: int, data: bytes) -> int:  # noqa: ARG001
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

        monkeypatch.setattr(os, "write", write)
        with Served(store) as served, caplog.at_level(logging.WARNING):
            served.keep(*ALL)
            served.knows(0, refused=3)
            client = served.ask(FOOD, BEDS)
            assert client.finished().documents == "stitched"
            assert client.text == "10 11 12 13 14 "
            assert served.decoder.computed <= 3 * SIZE + len(SYSTEM) + 2 * SIZE + len(QUESTION) + 4
        assert caplog.text.count("event=snapshot_not_written") == 1
        assert list(store.folder.glob("*.p*")) == []

    def test_too_long_ones_are_refused_with_numbers(self, store: SnapshotStore, caplog: pytest.LogCaptureFixture) -> None:
        with Served(store) as served, caplog.at_level(logging.WARNING):
            served.keep(BEDS, Document(id="long", text="x" * 300), refused=2)
            served.knows(1, refused=3)
            assert "id='long'" in caplog.text
            assert "the limit is 199" in caplog.text

    def test_nothing_is_read_where_documents_are_read_in_their_place(
        self, store: SnapshotStore, caplog: pytest.LogCaptureFixture
    ) -> None:
        with Served(store, reread_tokens=None) as served, caplog.at_level(logging.WARNING):
            served.keep(*ALL)
            assert served.ask(FOOD).finished().documents == "exact"
            assert served.counts() == (0, 0, 0, 0)
            assert caplog.text.count("event=documents_not_read_ahead documents=3") == 1
            assert list(store.folder.glob("*.prefix")) == []

    def test_a_broken_file_is_read_again_and_not_forever(self, store: SnapshotStore) -> None:
        with Served(store, cache_tokens=SIZE + 60) as served:
            served.keep(BEDS)
            served.knows(1)
            for again in (True, True, False):
                (path,) = store.folder.glob("*.prefix")
                content = bytearray(path.read_bytes())
                content[-20] ^= 1
                path.write_bytes(content)
                served.bench.client(*range(3000, 3000 + SIZE + 55)).end()
                served.bench.client(*range(4000, 4000 + SIZE + 55)).end()
                assert served.ask(BEDS, tenant="t").finished().documents == "stitched"
                until(lambda: len(list(store.folder.glob("*.prefix"))) == int(again))  # noqa: B023
                served.knows(int(again), refused=int(not again))

    def test_what_cannot_be_copied_from_memory_is_not_tried_forever(
        self, store: SnapshotStore, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        with Served(store) as served:
            monkeypatch.setattr(served.bench.scheduler._prefixes, "save", lambda _: None)
            served.keep(*ALL)
            served.knows(0, refused=3)
            assert served.decoder.computed == 3 * SIZE - 2 * 2, "it is known, and not read again"

    def test_what_is_being_written_is_not_written_twice(self, store: SnapshotStore) -> None:
        may_write = threading.Event()
        with Served(store) as served:
            served.bench.scheduler._idle._give_way = lambda: bool(may_write.wait(20))  # type: ignore[method-assign]
            served.keep(BEDS)
            until(lambda: store._writing is not None)
            served.keep(BEDS, FOOD)
            waiting = served.counts()[1]
            may_write.set()
            assert waiting == 2
            served.knows(2)
            assert len(list(store.folder.glob("*.prefix"))) == 2

    def test_nothing_is_read_that_could_not_be_noted(
        self, store: SnapshotStore, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
    ) -> None:
        with Served(store) as served, caplog.at_level(logging.WARNING):
            served.keep(BEDS)
            served.knows(1)
            with monkeypatch.context() as patched:
                patched.setattr(document_erasure, "note", failing(errno.ENOSPC, times := []))
                served.keep(*ALL)
                until(lambda: len(times) > 2)
                assert served.decoder.computed == SIZE
                assert served.counts()[:2] == (1, 0)
                assert caplog.text.count("event=documents_unfinished task=note") == 1, "said once"
            served.knows(3)

    def test_a_document_that_no_prompt_holds_is_refused_once(
        self, store: SnapshotStore, caplog: pytest.LogCaptureFixture
    ) -> None:
        def encode(document: Document) -> tuple[int, ...]:
            if document.id == "food":
                raise PromptTooLong("too long", param="documents")
            return encoded(document)

        with Served(store) as served, caplog.at_level(logging.WARNING):
            served.kept._encode = encode
            served.keep(BEDS, FOOD)
            served.keep(BEDS, FOOD, DESK)
            served.knows(2, refused=1)
            assert caplog.text.count("event=document_refused id='food'") == 1

    def test_a_failed_reading_is_not_tried_again(self, store: SnapshotStore) -> None:
        with Served(store) as served:
            served.decoder.failures.append(RuntimeError("no"))
            served.keep(*ALL)
            served.knows(2, refused=1)


class TestErasing:
    """`Served.places` is the proof: it looks into cache, slots, cells, notes and files by itself."""

    def used(self, served: Served) -> None:
        """Everything that may come to hold a document."""
        for tenant in ("a", "b"):
            for each in range(2):
                served.ask(BEDS, FOOD, tenant=tenant).finished()
                served.ask(DESK, BEDS, question=(*QUESTION, 40 + each), tenant=tenant).finished()
                served.ask(BEDS, DESK, tenant=tenant, is_exact=True).finished()
                served.ask(BEDS, tenant=tenant, adapter="x").finished()
        served.bench.idle()

    @pytest.mark.parametrize("is_edited", [False, True])
    def test_what_was_removed_or_edited_is_nowhere_any_more(
        self, store: SnapshotStore, tmp_path: Path, is_edited: bool, caplog: pytest.LogCaptureFixture
    ) -> None:
        new = Document(id="beds", text="nothing of what was") if is_edited else Document(id="new", text="of another thing")
        with Served(store) as served, caplog.at_level(logging.WARNING):
            served.keep(*ALL)
            served.knows(3)
            self.used(served)
            until(lambda: len(list(store.folder.glob("*.prefix"))) > 3)  # with the adapter
            assert {"cache", "file", "notes"} <= set(served.places(BEDS))
            others = [served.places(each) for each in (FOOD, DESK)]
            served.keep(FOOD, DESK, new)
            assert "event=documents_erased documents=1" in caplog.text
            served.knows(3, erased=1)
            if not is_edited:
                assert served.places(BEDS) == []
            assert _whole(served, BEDS) == []
            assert [served.places(each) for each in (FOOD, DESK)] != [[], []], others
            assert served.ask(DESK, FOOD).finished().stitched_tokens == 2 * SIZE
        with Served(store_in(tmp_path)) as served:
            served.keep(FOOD, DESK, new)
            served.knows(3)
            assert _whole(served, BEDS) == []

    @pytest.mark.parametrize("reread_tokens", [0, 4])
    @pytest.mark.parametrize("call", range(8))
    def test_a_running_answer_ends_as_it_would_and_leaves_nothing(
        self, store: SnapshotStore, call: int, reread_tokens: int
    ) -> None:
        """Whatever it is just doing: reading what is not known, putting together, answering."""
        with Served(store, reread_tokens=reread_tokens) as served:
            served.keep(FOOD, BEDS)
            served.knows(2)
            while served.decoder.entered.acquire(blocking=False):
                pass
            served.decoder.hold_at = len(served.decoder.feeds) + call
            client, waiting = served.ask(BEDS, DESK), served.ask(DESK, BEDS, FOOD, tenant="b")
            for _ in range(call + 1):
                served.decoder.entered.acquire(timeout=1)
            served.decoder.hold_at = -1
            asked = Documents(documents=(FOOD,), is_read_ahead=True)
            served.kept.keep(asked)
            until(lambda: served.bench.scheduler.documents._orders or served.decoder.gate.is_set())
            served.decoder.gate.set()
            assert (client.finished().reason, client.text) == ("length", "10 11 12 13 14 ")
            assert (waiting.finished().reason, waiting.text) == ("length", "10 11 12 13 14 ")
            served.knows(1, erased=1)
            served.bench.idle()
            assert served.places(BEDS) == []
            assert served.places(FOOD) != []

    def test_what_was_removed_while_no_server_ran_is_erased_at_start(self, store: SnapshotStore, tmp_path: Path) -> None:
        with Served(store) as served:
            served.keep(*ALL)
            served.knows(3)
            self.used(served)
        with Served(store_in(tmp_path), reread_tokens=None) as served:  # documents are read exactly now
            assert served.places(BEDS) == ["file"]
            served.keep(FOOD, DESK)
            assert served.places(BEDS) == []
            assert served.places(FOOD) == ["file"]
            assert served.ask(BEDS).finished().documents == "exact"

    def test_a_half_read_document_is_erased_too(self, store: SnapshotStore) -> None:
        long = Document(id="long", text="what goes on and on, " * 7)
        with Served(store, chunk_tokens=64) as served:
            served.decoder.hold_at = 1
            served.keep(long)
            served.decoder.entered.acquire()
            served.decoder.entered.acquire()
            served.decoder.hold_at = -1
            served.kept.keep(Documents(is_read_ahead=True))
            until(lambda: bool(served.bench.scheduler.documents._orders))
            served.decoder.gate.set()
            served.knows(0, erased=1)
            assert served.places(long) == []

    def test_a_file_about_to_be_written_is_not(self, store: SnapshotStore) -> None:
        """The thread that writes has not come to it before everything is erased."""
        may_write = threading.Event()
        with Served(store) as served:
            served.bench.scheduler._idle._writer.submit(may_write.wait, 20)
            served.keep(BEDS)
            until(lambda: served.bench.scheduler._idle.is_writing)
            served.keep()
            may_write.set()
            served.knows(0, erased=1)
            served.bench.scheduler._idle._writer.submit(bool).result(20)
            assert served.places(BEDS) == []

    def test_a_file_being_written_is_given_up(self, store: SnapshotStore) -> None:
        may_write = threading.Event()
        with Served(store) as served:
            served.bench.scheduler._idle._give_way = lambda: bool(may_write.wait(20))  # type: ignore[method-assign]
            served.keep(BEDS)
            until(lambda: store._writing is not None)
            served.kept.keep(Documents(is_read_ahead=True))
            until(lambda: store._banned is not None)
            may_write.set()
            served.knows(0, erased=1)
            assert left_in(store) == []
            assert served.places(BEDS) == []

    @pytest.mark.parametrize(
        ("where", "name", "code"), [(os, "open", errno.EIO), (os, "open", errno.EACCES), (Path, "unlink", errno.EROFS)]
    )
    def test_what_could_not_be_erased_is_tried_until_it_is(
        self,
        store: SnapshotStore,
        where: Any,
        name: str,
        code: int,
        monkeypatch: pytest.MonkeyPatch,
        caplog: pytest.LogCaptureFixture,
    ) -> None:
        with Served(store) as served, caplog.at_level(logging.WARNING):
            served.keep(*ALL)
            served.knows(3)
            with monkeypatch.context() as patched:
                patched.setattr(where, name, failing(code, times := [], getattr(where, name), ".prefix"))
                served.keep(FOOD, DESK)
                until(lambda: len(times) > 7)
                assert len(list(store.folder.glob("*.prefix"))) == 3
                counts = served.bench.scheduler.load().documents
                assert counts is not None
                assert (counts.erased, counts.unerased) == (0, 1)
                assert caplog.text.count("event=documents_unfinished task=erase") == 1, "said once"
                assert "event=documents_erased" not in caplog.text
            served.knows(2, erased=1)
            assert served.places(BEDS) == []
            assert caplog.text.count("event=documents_erased documents=1 files=1") == 1

    def test_what_was_removed_is_erased_though_its_list_is_lost(self, store: SnapshotStore) -> None:
        """By what the engine itself remembers, from tenants' files too."""
        with Served(store) as served:
            served.keep(FOOD, BEDS)
            served.knows(2)
            for path in (*store.folder.glob("documents-*"), *store.folder.glob("*.prefix")):
                path.unlink()
            assert store.write(Prefix((*SYSTEM, *encoded(BEDS)), None, "a"), b"cells")
            served.keep(FOOD)
            served.knows(1, erased=1)
            assert served.places(BEDS) == []

    def test_erasing_waits_for_no_new_document(self, store: SnapshotStore) -> None:
        may_encode = threading.Event()

        def encode(document: Document) -> tuple[int, ...]:
            assert document.id != "desk" or may_encode.wait(20)
            return encoded(document)

        with Served(store) as served:
            served.kept._encode = encode
            served.keep(FOOD, BEDS)
            served.knows(2)
            served.kept.keep(Documents(documents=(FOOD, DESK), is_read_ahead=True))
            served.knows(1, erased=1)
            assert served.places(BEDS) == []
            may_encode.set()
            served.knows(2, erased=1)


def failing(code: int, times: list[None], real: Callable[..., Any] | None = None, suffix: str = "") -> Callable[..., Any]:
    """Fails with this code for paths that end so; `times` counts it."""

    def call(path: Any, *rest: Any, **named: Any) -> Any:
        if real is not None and not str(path).endswith(suffix):
            return real(path, *rest, **named)
        times.append(None)
        raise OSError(code, os.strerror(code), str(path))

    return call


def _whole(served: Served, document: Document) -> list[str]:
    """Where all of it is: an edited one shares its id with what it became."""
    run = list(encoded(document))
    return places(
        served.bench, served.store, lambda tokens: any(list(tokens[at:])[: len(run)] == run for at in range(len(tokens)))
    )


class TestFiles:
    def written(self, store: SnapshotStore, *documents: Document, owner: str | None = None) -> None:
        for each in documents:
            assert store.write(Prefix(passages.alone(encoded(each)), None, owner), b"cells")

    def noted(self, store: SnapshotStore, model: str, *documents: Document) -> None:
        document_erasure.note(store.folder, model, {document_erasure.digest(each): encoded(each) for each in documents})

    def test_files_of_every_model_and_tenant_are_erased(self, tmp_path: Path) -> None:
        for model in ("m", "n"):
            store = store_in(tmp_path, model=model)
            self.noted(store, model, *ALL)
            self.written(store, *ALL)
            self.written(store, *ALL, owner="a")
        before = len(list(store.folder.glob("*.prefix")))
        found = document_erasure.erase(store.folder, {document_erasure.digest(each) for each in (FOOD, DESK)})
        assert (found.files, before - found.files) == (4, len(list(store.folder.glob("*.prefix"))))
        left = [passages.texts(tokens) for tokens in in_files(store)]
        assert not any(_holds(tokens, encoded(BEDS)) for tokens in left)
        assert sum(tokens == list(encoded(FOOD)) for tokens in left) == 2 * 2 + 2

    def test_what_another_only_begins_with_stays(self, store: SnapshotStore) -> None:
        longer = Document(id="beds", text=BEDS.text + ", and more")
        self.noted(store, "m", BEDS, longer)
        self.written(store, BEDS, longer)
        document_erasure.erase(store.folder, {document_erasure.digest(longer)})
        assert [path.suffix for path in sorted(store.folder.iterdir())].count(".prefix") == 1

    @pytest.mark.parametrize("content", [None, "", "{", '{"schema": 2}', '{"schema": 1, "documents": 5}'])
    def test_where_the_list_is_lost_what_was_read_ahead_is_erased(self, store: SnapshotStore, content: str | None) -> None:
        self.written(store, BEDS)
        self.written(store, BEDS, owner="a")
        self.written(store, FOOD, owner="a")
        store.write(Prefix(SYSTEM), b"cells")
        if content is not None:
            (store.folder / "documents-m.json").write_text(content)
        found = document_erasure.erase(store.folder, {document_erasure.digest(BEDS)})
        assert (found.documents, found.files) == (1, 2)
        assert len(list(store.folder.glob("*.prefix"))) == 2

    def test_half_written_files_are_erased(self, store: SnapshotStore) -> None:
        self.noted(store, "m", BEDS)
        self.written(store, BEDS)
        (path,) = store.folder.glob("*.prefix")
        content = path.read_bytes()
        for number, size in enumerate((len(content) - 2, 60, 0)):
            half = store.folder / f"{number}.partial"
            half.touch(0o600)
            half.write_bytes(content[:size])
        (store.folder / ".documents-m.json.77").write_text("[1, 2]")
        document_erasure.erase(store.folder, {document_erasure.digest(BEDS)})
        assert len(left_in(store)) == 6, "nothing was removed"
        document_erasure.erase(store.folder, ())
        assert left_in(store) == []

    def test_what_cannot_be_deleted_is_remembered(self, store: SnapshotStore, monkeypatch: pytest.MonkeyPatch) -> None:
        self.noted(store, "m", BEDS)
        self.written(store, BEDS)

        def unlink(path: Path, missing_ok: bool = False) -> None:  # noqa: ARG001
            raise OSError(errno.EROFS, os.strerror(errno.EROFS), str(path))

        with monkeypatch.context() as patched:
            patched.setattr(Path, "unlink", unlink)
            with pytest.raises(OSError, match="Read-only"):
                document_erasure.erase(store.folder, ())
        assert document_erasure.erase(store.folder, ()).files == 1
        assert left_in(store) == []

    def test_what_another_engine_is_writing_stays(self, store: SnapshotStore) -> None:
        """Whose half written file does not say yet of what it is: that engine looks after it."""
        self.noted(store, "m", BEDS)
        self.written(store, BEDS)
        paths = [store.folder / f"{name}.partial" for name in ("living", "dead")]
        for path in paths:
            path.touch(0o600)
        with paths[0].open("wb") as stream:
            fcntl.flock(stream, fcntl.LOCK_EX)
            document_erasure.erase(store.folder, ())
            assert left_in(store) == ["living.partial"]

    def test_a_file_that_is_written_is_locked(self, store: SnapshotStore) -> None:
        seen = []

        def look() -> None:
            seen.extend(prefix_file.is_being_written(path) for path in store.folder.glob("*.partial"))

        assert store.write(Prefix((1,)), b"cells", look)
        assert seen
        assert all(seen)

    def test_what_another_engine_notes_meanwhile_is_not_forgotten(
        self, store: SnapshotStore, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """Of two that share the folder and the model."""
        self.noted(store, "m", BEDS, FOOD)
        other = threading.Thread(target=self.noted, args=(store, "m", DESK), daemon=True)
        write = document_erasure._write

        def late(path: Path, documents: document_erasure.Documents) -> None:
            if other.ident is None:
                other.start()
                other.join(0.3)  # were it not for the lock, it would be done
            write(path, documents)

        monkeypatch.setattr(document_erasure, "_write", late)
        document_erasure.erase(store.folder, {document_erasure.digest(FOOD)})
        other.join(20)
        known = document_erasure.noted(store.folder, "m")
        assert known.keys() == {document_erasure.digest(each) for each in (FOOD, DESK)}

    def test_a_list_that_cannot_be_read_is_not_overwritten(
        self, store: SnapshotStore, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        self.noted(store, "m", BEDS)
        with monkeypatch.context() as patched:
            patched.setattr(Path, "read_text", failing(errno.EIO, []))
            with pytest.raises(OSError, match="Input/output"):
                self.noted(store, "m", FOOD)
        assert len(document_erasure.noted(store.folder, "m")) == 1

    def test_no_folder_holds_nothing(self, tmp_path: Path) -> None:
        assert document_erasure.erase(tmp_path / "nowhere", ()) == document_erasure.ErasedFiles()


def test_the_list_is_there_before_the_first_file(store: SnapshotStore, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[int] = []
    write: Callable[..., bool] = SnapshotStore.write

    def noting(self: SnapshotStore, *rest: Any) -> bool:
        seen.append(len(document_erasure.noted(store.folder, "m")))
        return write(self, *rest)

    monkeypatch.setattr(SnapshotStore, "write", noting)
    with Served(store) as served:
        served.keep(*ALL)
        served.knows(3)
    assert seen == [3, 3, 3]
