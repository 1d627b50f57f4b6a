"""Files that hold something of a document, of whatever model, and the list by which they are found again."""

import errno
import fcntl
import os
import threading
from pathlib import Path

import pytest

from appliance.serving import document_erasure, passages, prefix_file
from appliance.serving.requests import Document
from appliance.serving.snapshots import Prefix, SnapshotStore
from tests.serving.held_tokens import in_files
from tests.serving.kept_documents_bench import (
    ALL,
    BEDS,
    DESK,
    FOOD,
    SYSTEM,
    encoded,
    failing,
    holds,
    left_in,
    store_in,
)


@pytest.fixture
def store(tmp_path: Path) -> SnapshotStore:
    return store_in(tmp_path)


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
        assert not any(holds(tokens, encoded(BEDS)) for tokens in left)
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
