"""Remembered sha256: read once, noticed when changed, never trusted when the file was touched a moment ago."""

import hashlib
import os
import time
from pathlib import Path

import pytest

from appliance.serving import digests
from appliance.serving.digests import NAME, Digests


@pytest.fixture
def file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A file whose last change is, for the memory, long ago."""
    path = tmp_path / "model.gguf"
    path.write_bytes(b"weights")
    later = time.time() + 60
    monkeypatch.setattr(digests.time, "time", lambda: later)
    return path


def sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def reads(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The files whose content is read from now on."""
    seen: list[str] = []
    real = hashlib.file_digest

    def counted(stream: object, name: str) -> object:
        seen.append(str(getattr(stream, "name", "")))
        return real(stream, name)  # type: ignore[arg-type, type-var]

    monkeypatch.setattr(digests.hashlib, "file_digest", counted)
    return seen


def test_a_file_is_read_once(file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen = reads(monkeypatch)
    assert [Digests(tmp_path).of(file) for _ in range(3)] == [sha256(b"weights")] * 3
    assert len(seen) == 1
    assert Digests(tmp_path, is_trusted=False).of(file) == sha256(b"weights")
    assert len(seen) == 2


def test_a_change_of_the_same_size_and_time_is_noticed(file: Path, tmp_path: Path) -> None:
    before = file.stat()
    assert Digests(tmp_path).of(file) == sha256(b"weights")
    file.write_bytes(b"WEIGHTS")
    os.utime(file, ns=(before.st_atime_ns, before.st_mtime_ns))
    assert Digests(tmp_path).of(file) == sha256(b"WEIGHTS")


def test_a_fresh_file_is_not_remembered(tmp_path: Path) -> None:
    path = tmp_path / "fresh.gguf"
    path.write_bytes(b"weights")
    Digests(tmp_path).of(path)
    assert not (tmp_path / NAME).exists()


@pytest.mark.parametrize("text", ["", "{", "[]", '{"schema": 1}', '{"schema": 2, "files": {}}', '{"schema":1,"files":[]}'])
def test_a_damaged_memory_is_made_again(file: Path, tmp_path: Path, text: str, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / NAME).write_text(text)
    seen = reads(monkeypatch)
    assert [Digests(tmp_path).of(file) for _ in range(2)] == [sha256(b"weights")] * 2
    assert len(seen) == 1


def test_a_memory_that_cannot_be_kept_costs_only_time(file: Path, tmp_path: Path) -> None:
    assert Digests(tmp_path / "missing").of(file) == sha256(b"weights")
