"""The operator's documents are read ahead, and kept for everybody; every cell is checked."""

import errno
import logging
import os
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from appliance.errors import PromptTooLong
from appliance.serving import document_erasure, passages
from appliance.serving.requests import Document
from appliance.serving.snapshots import Prefix, SnapshotStore
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
    no_settling,  # noqa: F401  (a fixture)
    store_in,
)
from tests.serving.scheduler_bench import until


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
