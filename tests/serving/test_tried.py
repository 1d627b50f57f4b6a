"""What was tried once is not tried again, until anything about it changes."""

from pathlib import Path

import pytest

from appliance.errors import ModelFileError
from appliance.serving import probe, tried
from appliance.serving.digests import Digests
from appliance.serving.tried import NAME, Tried


@pytest.fixture
def probed(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, str | None]]:
    """The files that are really tried; one named bad.gguf does not load."""
    seen: list[tuple[str, str | None]] = []

    def check(path: Path, base: Path | None = None) -> None:
        seen.append((path.name, base and base.name))
        if path.name == "bad.gguf":
            raise ModelFileError("bad")

    monkeypatch.setattr(probe, "check", check)
    return seen


def files(folder: Path, *names: str) -> list[Path]:
    for name in names:
        (folder / name).write_bytes(name.encode())
    return [folder / name for name in names]


def memory(folder: Path, **options: bool) -> Tried:
    return Tried(folder, Digests(folder), **options)


def test_a_file_is_tried_once(tmp_path: Path, probed: list[tuple[str, str | None]]) -> None:
    (model, other) = files(tmp_path, "model.gguf", "other.gguf")
    for _ in range(2):
        memory(tmp_path).check(model)
    assert probed == [("model.gguf", None)]
    memory(tmp_path).check(other)
    model.write_bytes(b"changed")
    memory(tmp_path).check(model)
    memory(tmp_path, is_trusted=False).check(model)
    assert [name for name, _ in probed[1:]] == ["other.gguf", "model.gguf", "model.gguf"]


def test_an_adapter_is_tried_with_each_base(tmp_path: Path, probed: list[tuple[str, str | None]]) -> None:
    adapter, first, second = files(tmp_path, "adapter.gguf", "first.gguf", "second.gguf")
    for base in (first, second, first, None):
        memory(tmp_path).check(adapter, base)
    assert probed == [("adapter.gguf", "first.gguf"), ("adapter.gguf", "second.gguf"), ("adapter.gguf", None)]


def test_a_bad_file_is_tried_again(tmp_path: Path, probed: list[tuple[str, str | None]]) -> None:
    (bad,) = files(tmp_path, "bad.gguf")
    for _ in range(2):
        with pytest.raises(ModelFileError):
            memory(tmp_path).check(bad)
    assert len(probed) == 2


def test_another_llama_cpp_tries_anew(
    tmp_path: Path, probed: list[tuple[str, str | None]], monkeypatch: pytest.MonkeyPatch
) -> None:
    (model,) = files(tmp_path, "model.gguf")
    memory(tmp_path).check(model)
    monkeypatch.setattr(tried.importlib.metadata, "version", lambda name: "99")  # noqa: ARG005
    memory(tmp_path).check(model)
    assert len(probed) == 2


@pytest.mark.parametrize("content", ["", "[]", "{}", '{"schema": 1, "tried": [7]}', '{"schema": 2, "tried": []}'])
def test_a_damaged_memory_is_made_again(content: str, tmp_path: Path, probed: list[tuple[str, str | None]]) -> None:
    (model,) = files(tmp_path, "model.gguf")
    (tmp_path / NAME).write_text(content)
    for _ in range(2):
        memory(tmp_path).check(model)
    assert len(probed) == 1
