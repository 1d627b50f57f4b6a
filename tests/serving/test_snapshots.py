"""Files come back as they were or not at all."""

import dataclasses
import errno
import logging
import os
import stat
import threading
import time
from collections.abc import Sequence
from pathlib import Path

import pytest

from appliance.errors import EnvironmentIncomplete
from appliance.serving.decoder import Adapter
from appliance.serving.prefix_file import MAGIC, PIECE_BYTES
from appliance.serving.snapshots import KEPT_SECONDS, Identity, Prefix, SnapshotStore

IDENTITY = Identity(model_sha256="m", template_sha256="t", kv_type="f16", layout="1", adapters={"x": "1"})
PREFIX = Prefix((1, 2, 3))
PAYLOAD = bytes(range(256)) * 4


def store_in(folder: Path, limit_bytes: int = 10**6, identity: Identity = IDENTITY) -> SnapshotStore:
    return SnapshotStore(folder / "prefixes", limit_bytes, identity)


def files(folder: Path) -> list[Path]:
    return sorted((folder / "prefixes").iterdir())


def one_file(folder: Path) -> Path:
    """Writes a prefix and returns its file."""
    assert store_in(folder).write(PREFIX, PAYLOAD)
    (path,) = files(folder)
    return path


@pytest.mark.parametrize("prefix", [PREFIX, Prefix((1,), Adapter("x", 0.5), "tenant"), Prefix(tuple(range(100_000)))])
def test_round_trip(tmp_path: Path, prefix: Prefix) -> None:
    store = store_in(tmp_path, 10**7)
    assert prefix not in store
    assert store.write(prefix, PAYLOAD)
    again = store_in(tmp_path, 10**7)
    assert prefix in store
    assert again.prefixes() == [prefix]
    assert again.read(prefix) == PAYLOAD


def test_writing_gives_way_and_holds_up_nobody(tmp_path: Path) -> None:
    """Others ask the store while a file waits to be written on."""
    store = store_in(tmp_path, 10**7)
    asked: list[bool] = []

    def ask() -> None:
        asked.append(PREFIX in store)

    def give_way() -> None:
        other = threading.Thread(target=ask, daemon=True)
        other.start()
        other.join(5)

    payload = bytes(3 * PIECE_BYTES)
    assert store.write(PREFIX, payload, give_way)
    assert asked == [False] * 8, "three pieces are summed up; head, header and three pieces are written"
    assert store.read(PREFIX) == payload


def test_files_are_private_and_their_names_say_nothing(tmp_path: Path) -> None:
    path = one_file(tmp_path)
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert stat.S_IMODE(path.parent.stat().st_mode) == 0o700
    path.unlink()
    assert one_file(tmp_path).name != path.name


def test_folder_is_made_private(tmp_path: Path) -> None:
    (tmp_path / "prefixes").mkdir(mode=0o755)
    assert stat.S_IMODE(one_file(tmp_path).parent.stat().st_mode) == 0o700


def test_folder_that_is_none_is_said(tmp_path: Path) -> None:
    (tmp_path / "prefixes").write_text("")
    with pytest.raises(EnvironmentIncomplete, match="snapshot_mib = 0"):
        store_in(tmp_path)


@pytest.mark.parametrize("length", [0, 7, 40, 60, -1])
def test_truncated_file_is_deleted(tmp_path: Path, length: int, caplog: pytest.LogCaptureFixture) -> None:
    path = one_file(tmp_path)
    path.write_bytes(path.read_bytes()[:length])
    with caplog.at_level(logging.WARNING):
        assert store_in(tmp_path).prefixes() == []
    assert files(tmp_path) == []
    assert caplog.text.count("snapshot_deleted") == 1


@pytest.mark.parametrize("is_known", [False, True])
def test_any_flipped_bit_is_noticed(tmp_path: Path, is_known: bool) -> None:
    path = one_file(tmp_path)
    whole = path.read_bytes()
    for at in range(0, len(whole), 7):
        store = store_in(tmp_path) if is_known else None
        path.write_bytes(whole[:at] + bytes([whole[at] ^ 4]) + whole[at + 1 :])
        store = store or store_in(tmp_path)
        assert PREFIX not in store or store.read(PREFIX) is None
        assert PREFIX not in store
        assert not path.exists()
        path.touch(0o600)
        path.write_bytes(whole)


@pytest.mark.parametrize("content", [b"", b"something else", MAGIC[:-1] + b"\x02" + bytes(100), MAGIC + b"\xff" * 36])
def test_foreign_file_is_deleted(tmp_path: Path, content: bytes) -> None:
    path = one_file(tmp_path)
    path.write_bytes(content)
    (path.parent / "notes.txt").write_text("not ours")
    assert store_in(tmp_path).prefixes() == []
    assert [each.name for each in files(tmp_path)] == ["notes.txt"]


@pytest.mark.parametrize("change", ["model_sha256", "template_sha256", "kv_type", "layout"])
def test_file_of_another_model_is_not_used_and_stays(tmp_path: Path, change: str) -> None:
    path = one_file(tmp_path)
    other = dataclasses.replace(IDENTITY, **{change: "other"})
    assert store_in(tmp_path, identity=other).prefixes() == []
    assert path.exists()
    assert store_in(tmp_path).prefixes() == [PREFIX]


def test_file_of_an_adapter_that_was_replaced_is_not_used(tmp_path: Path) -> None:
    prefix = Prefix((1, 2), Adapter("x", 1.0))
    store_in(tmp_path).write(prefix, PAYLOAD)
    assert store_in(tmp_path, identity=dataclasses.replace(IDENTITY, adapters={"x": "2"})).prefixes() == []
    assert store_in(tmp_path, identity=dataclasses.replace(IDENTITY, adapters={})).prefixes() == []
    assert store_in(tmp_path).prefixes() == [prefix]


@pytest.mark.parametrize("mode", [0o644, 0o660, 0o602, 0o700])
def test_file_that_others_could_touch_is_deleted(tmp_path: Path, mode: int) -> None:
    path = one_file(tmp_path)
    path.chmod(mode)
    assert store_in(tmp_path).prefixes() == []
    assert not path.exists()


def test_link_is_not_followed(tmp_path: Path) -> None:
    path = one_file(tmp_path)
    target = path.rename(tmp_path / "elsewhere")
    path.symlink_to(target)
    assert store_in(tmp_path).prefixes() == []
    assert target.exists()
    assert not path.is_symlink()


def test_least_recently_used_goes_first(tmp_path: Path) -> None:
    store = store_in(tmp_path, 4500)
    prefixes = [Prefix((number,)) for number in range(3)]
    for at, prefix in enumerate(prefixes):
        assert store.write(prefix, PAYLOAD)
        os.utime(store._paths[prefix], (at, at))
    assert store.prefixes() == prefixes[::-1]
    store.touch(prefixes[0])
    assert store.write(Prefix((9,)), PAYLOAD)
    assert sum(path.stat().st_size for path in files(tmp_path)) <= 4500
    assert prefixes[1] not in store
    assert prefixes[0] in store
    assert set(store_in(tmp_path).prefixes()) == set(store.prefixes())


def test_files_of_other_models_count_and_go_too(tmp_path: Path) -> None:
    path = one_file(tmp_path)
    os.utime(path, (1, 1))
    store = store_in(tmp_path, 2000, dataclasses.replace(IDENTITY, model_sha256="other"))
    assert store.write(PREFIX, PAYLOAD)
    assert not path.exists()


@pytest.mark.parametrize("is_old", [False, True])
def test_protected_files_of_another_model_stay_unless_they_were_not_used_for_long(tmp_path: Path, is_old: bool) -> None:
    store = store_in(tmp_path, 2500)
    store.protect([PREFIX])
    assert store.write(PREFIX, PAYLOAD)
    used_at = time.time() - (KEPT_SECONDS + 60 if is_old else KEPT_SECONDS - 3600)
    os.utime(store._paths[PREFIX], (used_at, used_at))
    other = store_in(tmp_path, 2500, dataclasses.replace(IDENTITY, model_sha256="other"))
    assert other.write(Prefix((1,)), PAYLOAD[:500])
    assert other.write(Prefix((2,)), PAYLOAD) == is_old
    assert other.write(Prefix((3,)), PAYLOAD[:400]), "at the price of an ordinary one, if need be"
    assert store._paths[PREFIX].exists() != is_old


def test_protected_files_of_another_model_give_way_to_those_of_this_one(tmp_path: Path) -> None:
    """As when another model was promoted; ordinary ones go before."""
    store = store_in(tmp_path, 3000)
    store.protect([PREFIX])
    assert store.write(PREFIX, PAYLOAD)
    os.utime(store._paths[PREFIX], (1, 1))
    other = store_in(tmp_path, 3000, dataclasses.replace(IDENTITY, model_sha256="other"))
    assert other.write(Prefix((1,)), PAYLOAD[:500])
    other.protect([Prefix((2,)), Prefix((3,))])
    assert other.write(Prefix((2,)), PAYLOAD)
    assert (Prefix((1,)) in other, store._paths[PREFIX].exists()) == (False, True)
    assert other.write(Prefix((3,)), PAYLOAD)
    assert not store._paths[PREFIX].exists()


def test_what_was_protected_stays_until_somebody_says_what_is(tmp_path: Path) -> None:
    """After a restart, before the operator's documents are known."""
    store = store_in(tmp_path, 2500)
    store.protect([PREFIX])
    assert store.write(PREFIX, PAYLOAD)
    again = store_in(tmp_path, 2500)
    assert not again.write(Prefix((1,)), PAYLOAD)
    again.protect([])
    assert again.write(Prefix((1,)), PAYLOAD)
    assert PREFIX not in again


def test_file_larger_than_all_allowed_is_not_written(tmp_path: Path) -> None:
    assert not store_in(tmp_path, 1000).write(PREFIX, PAYLOAD)
    assert files(tmp_path) == []


def test_full_disk_is_said_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    store = store_in(tmp_path)
    whole_write = os.write

    def write(descriptor: int, data: bytes) -> int:
        if len(data) < 1024:
            return whole_write(descriptor, data)
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "write", write)
    with caplog.at_level(logging.WARNING):
        assert not store.write(PREFIX, PAYLOAD)
        assert not store.write(Prefix((9,)), PAYLOAD)
    assert caplog.text.count("snapshot_not_written") == 1
    assert files(tmp_path) == []
    assert store.prefixes() == []


def test_interrupted_writing_is_cleared_up_later(tmp_path: Path) -> None:
    path = one_file(tmp_path)
    young, old = path.with_name("a.partial"), path.with_name("b.partial")
    for each in (young, old):
        each.write_bytes(b"")
    os.utime(old, (1, 1))
    store_in(tmp_path)
    assert young.exists()
    assert not old.exists()


def test_what_is_finished_while_files_are_looked_through_is_not_kept(tmp_path: Path) -> None:
    """Of a text that is just being erased."""
    store = store_in(tmp_path)
    assert store.write(Prefix((9,)), PAYLOAD)
    may_write, outcome = threading.Event(), []

    def find(tokens: Sequence[int]) -> int | None:
        if tokens == [9]:
            may_write.set()
            writer.join(20)
        return 0 if tokens == [1, 2, 3] else None

    writer = threading.Thread(target=lambda: outcome.append(store.write(PREFIX, PAYLOAD, lambda: bool(may_write.wait(20)))))
    writer.start()
    while store._writing is None:
        time.sleep(0.001)
    with store.banning(find):
        assert outcome == [False]
        assert PREFIX not in store
    assert len(files(tmp_path)) == 1


def test_vanished_file_is_no_error(tmp_path: Path) -> None:
    path = one_file(tmp_path)
    store = store_in(tmp_path)
    path.unlink()
    store.touch(PREFIX)
    assert store.prefixes() == [PREFIX]
    assert store.read(PREFIX) is None


def test_what_is_read_keeps_no_file_open_and_is_unmapped_in_the_end(tmp_path: Path) -> None:
    store = store_in(tmp_path)
    store.write(Prefix((1, 2)), b"payload" * 10_000)
    descriptors = Path("/proc/self/fd")
    before = len(list(descriptors.iterdir()))
    held = store.read(Prefix((1, 2)))
    assert held == b"payload" * 10_000
    assert len(list(descriptors.iterdir())) == before
    (path,) = tmp_path.rglob("*.prefix")
    assert str(path) in Path("/proc/self/maps").read_text()
    path.unlink()
    assert bytes(held[-7:]) == b"payload"
    del held
    assert str(path) not in Path("/proc/self/maps").read_text()
