"""The keys that a server makes for itself: never two, never one that nobody has, whenever it is interrupted."""

import shutil
import stat
from pathlib import Path

import pytest

from appliance import config, first_keys, keys, store_key
from appliance.errors import NotAuthenticated
from appliance.evaluation.asking import ask_served_model
from appliance.store import Store
from tests import killed, tiny_artifact, tiny_gguf
from tests.running import environment
from tests.serving.serving_process import running_server


def found(folder: Path, store: Path, key_file: Path) -> dict[str, set[str]]:
    """The scopes of the key in each file, by name; for what is no valid key, none."""
    book = keys.KeyBook(store, key_file)
    try:
        files = {path.name: book.find(path.read_text().strip()) for path in folder.glob("*.key")}
        return {name: set() if key is None else set(key.scopes) for name, key in files.items()}
    finally:
        book.close()


def test_keys_are_made_once(tmp_path: Path) -> None:
    folder, store, key_file = tmp_path / "keys", tmp_path / "data/store", tmp_path / "secret/store.key"
    made = first_keys.make(folder, store, key_file)
    assert made == [folder / "chat.key", folder / "metrics.key"]
    assert [stat.S_IMODE(path.stat().st_mode) for path in made] == [0o600, 0o644]
    assert found(folder, store, key_file) == {"chat.key": {"chat"}, "metrics.key": {"metrics"}}
    (folder / "chat.key").unlink()
    assert first_keys.make(folder, store, key_file) == []


@pytest.mark.parametrize(("scope", "names"), [("chat", ["metrics.key"]), ("admin", [])])
def test_what_an_operator_has_made_is_enough(scope: keys.Scope, names: list[str], tmp_path: Path) -> None:
    store, key_file = tmp_path / "data/store", tmp_path / "secret/store.key"
    store_key.create(key_file, store)
    with Store.open(store, key_file) as opened:
        keys.revoke(opened, keys.create(opened, "mine", [scope])[0].id)
    assert [path.name for path in first_keys.make(tmp_path / "keys", store, key_file)] == names


def test_asking_finds_the_key_that_was_made_for_it(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Beside the artifacts, where a container that `make serve` started left it, or where it was said."""
    monkeypatch.delenv("APPLIANCE_MAKE_KEYS", raising=False)
    assert first_keys.for_asking() is None
    first_keys.make(config.first_keys_folder(), config.store_file(), config.store_key_file())
    key = (root.parent / "keys/chat.key").read_text().strip()
    assert first_keys.for_asking() == key
    monkeypatch.setenv("APPLIANCE_MAKE_KEYS", str(root.parent / "elsewhere"))
    assert first_keys.for_asking() is None
    shutil.move(root.parent / "keys", root.parent / "elsewhere")
    assert first_keys.for_asking() == key
    (root.parent / "elsewhere/chat.key").write_bytes(b"\xff\xfe")
    assert first_keys.for_asking() is None, "no text"
    monkeypatch.setenv("APPLIANCE_MAKE_KEYS", str(root.parent / "elsewhere/chat.key"))
    assert first_keys.for_asking() is None, "no folder"


def test_questions_after_a_run_need_no_key_of_those_that_were_made(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nor a store: a container that trains has not its key."""
    tiny_artifact.promoted(root)
    first_keys.make(config.first_keys_folder(), config.store_file(), config.store_key_file())
    monkeypatch.setenv("APPLIANCE_KEY_FILE", str(root.parent / "not mounted"))
    assert ask_served_model([]).model == "tiny"


def test_interrupted_at_any_moment_it_is_made_whole_the_next_time(tmp_path: Path) -> None:
    base = tmp_path / "base"
    folder, store, key_file = base / "keys", base / "data/store", base / "secret/store.key"
    deaths = 0
    for _ in killed.moments(base, lambda: first_keys.make(folder, store, key_file)):
        deaths += 1
        first_keys.make(folder, store, key_file)
        assert found(folder, store, key_file) == {"chat.key": {"chat"}, "metrics.key": {"metrics"}}
        shutil.rmtree(base)
    assert deaths > 10


def test_server_for_others_begins_with_keys(root: Path, tmp_path: Path) -> None:
    model = tiny_gguf.write(tmp_path / "tiny.gguf")
    folder = tmp_path / "keys"
    assert "APPLIANCE_MAKE_KEYS" not in environment(root)
    with running_server(model, "--host", "0.0.0.0", root=root, environ={"APPLIANCE_MAKE_KEYS": str(folder)}) as server:
        server.url = server.url.replace("0.0.0.0", "127.0.0.1")
        server.http.base_url = server.url  # type: ignore[assignment]
        chat, metrics = ((folder / name).read_text().strip() for name in ("chat.key", "metrics.key"))
        assert server.chat(max_tokens=1).json()["error"]["code"] == NotAuthenticated.api_code
        server.http.headers["Authorization"] = f"Bearer {chat}"
        assert server.chat(max_tokens=1).status_code == 200
        assert server.http.get("/metrics").status_code == 403
        server.http.headers["Authorization"] = f"Bearer {metrics}"
        assert server.http.get("/metrics").status_code == 200
        assert server.stop() == 0
    assert sum("made a first API key" in line for line in server.errors) == 2
    assert not any(chat in line or metrics in line for line in server.errors)
