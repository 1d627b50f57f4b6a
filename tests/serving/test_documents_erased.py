"""A removed document is erased from memory and disk while requests run, whatever fails meanwhile; every cell is checked."""

import errno
import logging
import os
import threading
from pathlib import Path
from typing import Any

import pytest

from appliance.serving.requests import Document
from appliance.serving.snapshots import Prefix, SnapshotStore
from appliance.serving.wire import Documents
from tests.serving.held_tokens import places
from tests.serving.kept_documents_bench import (
    ALL,
    BEDS,
    DESK,
    FOOD,
    QUESTION,
    SIZE,
    SYSTEM,
    Served,
    encoded,
    failing,
    left_in,
    no_settling,  # noqa: F401  (a fixture)
    store_in,
)
from tests.serving.scheduler_bench import until


@pytest.fixture
def store(tmp_path: Path) -> SnapshotStore:
    return store_in(tmp_path)


def _whole(served: Served, document: Document) -> list[str]:
    """Where all of it is: an edited one shares its id with what it became."""
    run = list(encoded(document))
    return places(
        served.bench, served.store, lambda tokens: any(list(tokens[at:])[: len(run)] == run for at in range(len(tokens)))
    )


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
