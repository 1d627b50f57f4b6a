"""API keys: made, listed, revoked on the command line, and found by a running server."""

import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from appliance import config, keys, store_key
from appliance.errors import ApplianceError, RecipeError
from appliance.keys import KeyBook
from appliance.store import Store
from tests.running import call


@pytest.fixture(autouse=True)
def key_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    file = tmp_path / "secret" / "store.key"
    monkeypatch.setenv("APPLIANCE_KEY_FILE", str(file))
    return file


@pytest.fixture
def store(key_file: Path) -> Iterator[Store]:
    path = config.store_file()
    store_key.create(key_file, path)
    with Store.open(path, key_file) as store:
        yield store


def book(**settings: float) -> KeyBook:
    return KeyBook(config.store_file(), config.store_key_file(), refresh_seconds=0.0, **settings)  # type: ignore[arg-type]


def test_key_is_found_by_its_text_only(store: Store) -> None:
    key, text = keys.create(store, "desk", ["chat"])
    other, _ = keys.create(store, "prometheus", ["metrics"])
    assert len(text) == len("ak_") + 43
    with_keys = book()
    assert with_keys.find(text) == key
    for wrong in ("", "ak_", text[:-1], text + "x", text.swapcase(), key.id, "ключ", "\udcff"):
        assert with_keys.find(wrong) is None
    assert keys.list_keys(store) == [key, other]
    stored = str(store.rows("SELECT * FROM api_keys"))
    assert text not in stored
    with_keys.close()


def test_scopes() -> None:
    def key(*scopes: keys.Scope) -> keys.Key:
        return keys.Key(id="k", label="l", scopes=frozenset(scopes), last4="xxxx", created_at=0)

    assert [scope for scope in keys.SCOPES if key("chat").allows(scope)] == ["chat"]
    assert [scope for scope in keys.SCOPES if key("chat", "metrics").allows(scope)] == ["chat", "metrics"]
    assert [scope for scope in keys.SCOPES if key("admin").allows(scope)] == list(keys.SCOPES)


def test_revoked_key_is_refused_by_a_running_server(store: Store) -> None:
    running = book()
    assert not running.is_required
    key, text = keys.create(store, "desk", ["chat"])
    assert running.is_required
    assert running.find(text) == key
    keys.revoke(store, key.id)
    assert running.find(text) is None
    assert running.is_required, "a server whose keys have all ended is closed, not open"
    assert not running.has_active
    store.rows("UPDATE api_keys SET revoked_at = 5")
    assert keys.revoke(store, key.id).revoked_at == 5, "the time of the first revocation stays"
    with pytest.raises(RecipeError, match="no key 'key-0'"):
        keys.revoke(store, "key-0")
    running.close()


def test_key_expires(store: Store) -> None:
    _, text = keys.create(store, "desk", ["chat"], lifetime_seconds=3600)
    created = keys.list_keys(store)[0].created_at
    now = [created + 3599.0]
    running = book(clock=lambda: now[0])  # type: ignore[arg-type]
    assert running.find(text) is not None
    assert running.has_active
    now[0] += 1.0
    assert running.find(text) is None
    assert not running.has_active
    running.close()


def test_store_that_appears_later_is_found(key_file: Path) -> None:
    running = book()
    assert not running.is_required
    store_key.create(key_file, config.store_file())
    with Store.open(config.store_file(), key_file) as store:
        _, text = keys.create(store, "desk", ["chat"])
    assert running.is_required
    assert running.find(text) is not None
    running.close()


def test_replaced_store_is_read_anew(store: Store, key_file: Path) -> None:
    keys.create(store, "old", ["chat"])
    running = book()
    other = config.store_file().with_name("restored")
    with Store.open(other, key_file) as restored:
        _, text = keys.create(restored, "new", ["chat"])
        restored.rows("PRAGMA wal_checkpoint(TRUNCATE)")
    for suffix in ("-wal", "-shm"):
        config.store_file().with_name(f"store.sqlite3{suffix}").unlink(missing_ok=True)
    other.rename(config.store_file())
    assert running.find(text) is not None
    running.close()


def test_unreadable_store_never_means_no_keys(store: Store, key_file: Path, caplog: pytest.LogCaptureFixture) -> None:
    waiting = KeyBook(config.store_file().with_name("later.sqlite3"), key_file, refresh_seconds=0.0)
    _, text = keys.create(store, "desk", ["chat"])
    running = book()
    key_file.rename(key_file.with_name("lost"))
    with pytest.raises(ApplianceError):
        book()
    config.store_file().with_name("later.sqlite3").write_bytes(b"not a store" * 1000)
    for _ in range(3):
        with pytest.raises(ApplianceError):
            _ = waiting.is_required
    config.store_file().rename(config.store_file().with_name("moved"))
    config.store_file().write_bytes(b"not a store" * 1000)
    for _ in range(3):
        assert running.find(text) is not None, "what was read last stays in force"
    assert [record.getMessage().split()[0] for record in caplog.records] == ["event=keys_not_read"] * 2
    running.close()


@pytest.mark.parametrize(("text", "seconds"), [("90d", 7776000), ("12h", 43200), ("2w", 1209600), ("3650d", 315360000)])
def test_lifetime(text: str, seconds: int) -> None:
    assert keys.lifetime_seconds(text) == seconds


@pytest.mark.parametrize("text", ["", "90", "d", "0d", "-1d", "1.5d", "3651d", "9999999d", "1m", "1d ", "１d"])
def test_wrong_lifetime(text: str) -> None:
    with pytest.raises(RecipeError, match="--expires"):
        keys.lifetime_seconds(text)


@pytest.mark.parametrize("label", ["", "  ", "x" * 65, "a\nb", "\x1b[31mred"])
def test_wrong_label(label: str, key_file: Path) -> None:
    assert call("keys", "create", "--label", label).exit_code == 2
    assert not config.store_file().exists()
    assert not key_file.exists()


def test_command_line(key_file: Path) -> None:
    assert call("keys", "list").stdout.startswith("No keys")
    assert call("keys", "revoke", "key-1").exit_code == 2
    assert not config.store_file().exists()
    created = call("keys", "create", "--label", "desk", "--expires", "90d")
    text = created.stdout.strip()
    assert text.startswith("ak_")
    assert str(key_file) in created.stderr
    assert text not in created.stderr
    made = json.loads(call("keys", "create", "--label", "ops", "--scope", "metrics", "--scope", "chat", "--json").stdout)
    assert made["scopes"] == ["chat", "metrics"]
    assert made["expires_at"] is None
    listed = call("keys", "list")
    assert text not in listed.stdout
    assert text[-4:] in listed.stdout
    revoked = json.loads(call("keys", "revoke", made["id"], "--json").stdout)
    assert revoked["state"] == "revoked"
    states = {key["label"]: key["state"] for key in json.loads(call("keys", "list", "--json").stdout)["keys"]}
    assert states == {"desk": "active", "ops": "revoked"}
    with_keys = book()
    found = with_keys.find(text)
    assert found is not None
    assert found.label == "desk"
    assert with_keys.find(made["key"]) is None
    with_keys.close()


def test_lost_key_of_the_store_is_an_incomplete_environment(key_file: Path) -> None:
    call("keys", "create", "--label", "desk")
    key_file.unlink()
    for arguments in (("list",), ("create", "--label", "x"), ("revoke", "x")):
        result = call("keys", *arguments)
        assert result.exit_code == 3
        assert "bring back the file" in result.stderr
    assert not key_file.exists(), "a new key would never open this store"


def test_first_keys_of_several_processes_at_once() -> None:
    """One of them makes the store and its key; all make an API key."""
    command = [sys.executable, "-m", "appliance", "keys", "create", "--label"]
    started = [subprocess.Popen([*command, f"n{number}"], stdout=-1, stderr=-1, text=True) for number in range(4)]
    for process in started:
        _, said = process.communicate(timeout=60)
        assert process.returncode == 0, said
    listed = json.loads(call("keys", "list", "--json").stdout)["keys"]
    assert sorted(key["label"] for key in listed) == ["n0", "n1", "n2", "n3"]
