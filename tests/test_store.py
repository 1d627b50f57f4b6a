"""The encrypted store: what a thief of the data finds, which keys are refused, migrations, damage, locks."""

import os
import sqlite3
import stat
from collections.abc import Iterator
from pathlib import Path

import apsw
import pytest

from appliance import store_key
from appliance.errors import EnvironmentIncomplete, StoreError
from appliance.store import MIGRATIONS, Migration, Store

SECRET = "a-word-that-must-not-be-found"
NOTES = Migration("notes", "CREATE TABLE notes (text TEXT) STRICT")
COUNTS = Migration("counts", "CREATE TABLE counts (n INTEGER) STRICT; INSERT INTO counts VALUES (1)")


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "data" / "store.sqlite3"


@pytest.fixture
def key_file(tmp_path: Path, path: Path) -> Path:
    file = tmp_path / "secret" / "store.key"
    assert store_key.create(file, path)
    return file


def with_notes(path: Path, key_file: Path) -> Store:
    return Store.open(path, key_file, migrations=[NOTES])


@pytest.fixture
def store(path: Path, key_file: Path) -> Iterator[Store]:
    with with_notes(path, key_file) as store:
        yield store


def test_nothing_readable_lies_on_the_disk(store: Store, path: Path) -> None:
    store.rows("INSERT INTO notes VALUES (?)", (SECRET,))
    names = sorted(each.name for each in path.parent.iterdir())
    assert names == ["store.sqlite3", "store.sqlite3-shm", "store.sqlite3-wal"]
    for file in path.parent.iterdir():
        content = file.read_bytes()
        assert SECRET.encode() not in content
        assert b"CREATE TABLE" not in content
        assert stat.S_IMODE(file.stat().st_mode) == 0o600
    store.rows("PRAGMA wal_checkpoint(TRUNCATE)")
    assert SECRET.encode() not in path.read_bytes()
    with pytest.raises(sqlite3.DatabaseError), sqlite3.connect(path) as plain:
        plain.execute("SELECT * FROM notes")


def test_restart_needs_nobody(path: Path, key_file: Path) -> None:
    for number in range(3):
        with with_notes(path, key_file) as store:
            assert len(store.rows("SELECT * FROM notes")) == number
            store.rows("INSERT INTO notes VALUES ('x')")


def test_key_is_made_once_and_for_its_owner_only(path: Path, key_file: Path) -> None:
    text = key_file.read_text()
    assert len(bytes.fromhex(text)) == 32
    assert stat.S_IMODE(key_file.stat().st_mode) == 0o600
    assert not store_key.create(key_file, path)
    assert key_file.read_text() == text


@pytest.mark.parametrize("mode", [0o640, 0o604, 0o660, 0o644])
def test_key_that_others_can_read_is_refused(path: Path, key_file: Path, mode: int) -> None:
    key_file.chmod(mode)
    with pytest.raises(StoreError, match=rf"mode {mode:03o}.*chmod 600"):
        Store.open(path, key_file)


@pytest.mark.parametrize("text", ["", "ab" * 31, "ab" * 33, "g" * 64, "correct horse battery staple", "é" * 32])
def test_key_of_another_form_is_refused_without_being_shown(path: Path, key_file: Path, text: str) -> None:
    key_file.write_text(text)
    with pytest.raises(StoreError, match="64 hexadecimal digits") as refusal:
        Store.open(path, key_file)
    assert not text or text not in str(refusal.value)


@pytest.mark.parametrize("name", ["store.key", "deeper/store.key"])
def test_key_among_the_data_is_refused(path: Path, key_file: Path, name: str) -> None:
    inside = path.parent / name
    inside.parent.mkdir(parents=True)
    with pytest.raises(StoreError, match="every copy of the data"):
        store_key.create(inside, path)
    key_file.rename(inside)
    outside = key_file.with_name("link.key")
    outside.symlink_to(inside)
    for file in (inside, outside):
        with pytest.raises(StoreError, match="every copy of the data"):
            Store.open(path, file)


def test_missing_key(path: Path, key_file: Path, tmp_path: Path) -> None:
    with pytest.raises(EnvironmentIncomplete, match="`appliance keys create` makes it"):
        Store.open(path, tmp_path / "none.key")
    with_notes(path, key_file).close()
    for attempt in (Store.open, lambda store, key: store_key.create(key, store)):
        with pytest.raises(EnvironmentIncomplete, match="bring back the file"):
            attempt(path, tmp_path / "none.key")
    with pytest.raises(StoreError, match="no regular file"):
        Store.open(path, tmp_path)


def test_wrong_key(path: Path, key_file: Path, tmp_path: Path) -> None:
    with_notes(path, key_file).close()
    before = path.read_bytes()
    other = tmp_path / "other" / "store.key"
    store_key.create(other, tmp_path / "elsewhere" / "store.sqlite3")
    with pytest.raises(StoreError, match="made with another one"):
        with_notes(path, other)
    assert path.read_bytes() == before


def test_migrations_are_appended(path: Path, key_file: Path) -> None:
    with with_notes(path, key_file) as store:
        store.rows("INSERT INTO notes VALUES (?)", (SECRET,))
    with Store.open(path, key_file, migrations=[NOTES, COUNTS]) as store:
        assert store.rows("SELECT text FROM notes") == [(SECRET,)]
        assert store.rows("SELECT n FROM counts") == [(1,)]
        assert [row[0] for row in store.rows("SELECT name FROM migrations ORDER BY number")] == ["notes", "counts"]
    with pytest.raises(StoreError, match="schema 2, this version knows 1"):
        with_notes(path, key_file)
    changed = Migration("notes", "CREATE TABLE notes (text TEXT, more TEXT) STRICT")
    for other in ([changed, COUNTS], [changed]):
        with pytest.raises(StoreError, match="migration 1 is not the one of this version"):
            Store.open(path, key_file, migrations=other)


def test_migration_that_fails_leaves_nothing(path: Path, key_file: Path) -> None:
    bad = Migration("bad", "CREATE TABLE half (x TEXT) STRICT; INSERT INTO nowhere VALUES (1)")
    with pytest.raises(apsw.SQLError):
        Store.open(path, key_file, migrations=[NOTES, bad])
    with with_notes(path, key_file) as store:
        assert store.rows("SELECT name FROM sqlite_schema WHERE name = 'half'") == []


def test_released_migrations_are_never_changed() -> None:
    known = ["c475beed7425"]
    assert [each.checksum[:12] for each in MIGRATIONS[: len(known)]] == known


def test_transaction_is_whole_or_nothing(store: Store) -> None:
    with pytest.raises(apsw.SQLError), store.transaction():
        store.rows("INSERT INTO notes VALUES ('x'); INSERT INTO nowhere VALUES (1)")
    assert store.rows("SELECT * FROM notes") == []
    with store.transaction():
        store.rows("INSERT INTO notes VALUES ('x')")
    assert store.rows("SELECT * FROM notes") == [("x",)]


def test_changes_of_others_are_seen(store: Store, path: Path, key_file: Path) -> None:
    seen = store.changes
    store.rows("INSERT INTO notes VALUES ('own')")
    assert store.changes == seen
    with with_notes(path, key_file) as other:
        other.rows("INSERT INTO notes VALUES ('x')")
    assert store.changes != seen
    assert not store.is_replaced
    path.rename(path.with_name("old"))
    assert not store.is_replaced
    path.write_bytes(b"")
    assert store.is_replaced


def test_locked_store(store: Store, path: Path, key_file: Path) -> None:
    with (
        store.transaction(),
        Store.open(path, key_file, migrations=[NOTES], busy_milliseconds=10) as other,
        pytest.raises(StoreError, match="locked by another process"),
    ):
        other.rows("INSERT INTO notes VALUES ('x')")


def test_full_disk(store: Store) -> None:
    store.rows("PRAGMA max_page_count = 8")
    with pytest.raises(EnvironmentIncomplete, match="No space left"), store.transaction():
        store.rows("INSERT INTO notes VALUES (?)", ("x" * 100_000,))
    assert store.rows("SELECT * FROM notes") == []
    store.rows("INSERT INTO notes VALUES ('small')")


@pytest.mark.parametrize("at", [100, 4096 + 100, 2 * 4096 + 4000])
def test_every_damaged_byte_is_noticed(path: Path, key_file: Path, at: int) -> None:
    with with_notes(path, key_file) as store:
        store.rows("INSERT INTO notes VALUES (?)", ("x" * 9000,))
    content = bytearray(path.read_bytes())
    content[at] ^= 1
    path.write_bytes(content)
    with pytest.raises(StoreError, match="damaged"), with_notes(path, key_file) as store:
        store.check_integrity()


def test_whole_store_passes(store: Store) -> None:
    store.check_integrity()


def test_truncated_store(path: Path, key_file: Path) -> None:
    with with_notes(path, key_file) as store:
        store.rows("INSERT INTO notes VALUES (?)", ("x" * 9000,))
    os.truncate(path, 5000)
    with pytest.raises(StoreError, match="damaged"), with_notes(path, key_file) as store:
        store.check_integrity()


def test_erased_text_is_gone_from_the_pages(path: Path, key_file: Path) -> None:
    with with_notes(path, key_file) as store:
        assert store.rows("PRAGMA secure_delete") == [(1,)]
        assert store.rows("PRAGMA temp_store") == [(2,)]
        assert store.rows("PRAGMA synchronous") == [(2,)]
