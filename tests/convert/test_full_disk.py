"""A disk that fills up while a file is written: exit 3 with the remedy, whoever writes it, and nothing is left."""

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from appliance import artifacts
from convert import converter
from tests import tiny_disk
from tests.convert import adapters, families, quick_converter
from tests.convert.families import FAMILIES
from tests.convert.test_families import output
from tests.running import call


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, Any]]:
    folder = tmp_path_factory.mktemp("made")
    base = families.write_model(FAMILIES["Llama 3.2"], folder / "base")
    adapter = adapters.write(base, folder / "adapter", families.LLAMA_TARGETS)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("APPLIANCE_ARTIFACTS", str(folder / "artifacts"))
        quick_converter.install(patch)
        full = output(call("convert", "gguf", base, "--json"))["file"]
        yield {"base": base, "adapter": adapter, "full": full}


def arguments(made: dict[str, Any], command: str) -> tuple[str | Path, ...]:
    return {
        "merge": (made["adapter"], "--base", made["base"]),
        "adapter": (made["adapter"], "--base", made["base"]),
        "gguf": (made["base"],),
        "quantize": (made["full"], "--type", "Q8_0"),
    }[command]


@pytest.fixture
def disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A small one, of which nobody knew beforehand that it is."""
    with tiny_disk.mounted(tmp_path / "disk", 100) as folder:
        monkeypatch.setenv("APPLIANCE_ARTIFACTS", str(folder / "artifacts"))
        monkeypatch.setattr(artifacts, "require_space", lambda *_arguments: None)
        yield folder


@pytest.mark.parametrize("command", ["merge", "gguf", "adapter", "quantize"])
def test_disk_that_fills_up(command: str, made: dict[str, Any], disk: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    quick_converter.install(monkeypatch)
    result = call("convert", command, *arguments(made, command))
    assert result.exit_code == 3, result.stderr
    assert re.search(r"error: No space left on the device while writing .+; free some and repeat\.", result.stderr)
    assert not list(disk.rglob("manifest.json"))
    assert not [*disk.rglob("*.partial"), *disk.rglob("*.gguf"), *disk.rglob("*.safetensors")]


@pytest.mark.parametrize("command", ["gguf", "adapter"])
def test_failure_with_room_left_is_the_models(
    command: str, made: dict[str, Any], root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(converter, "execute", lambda _arguments: (1, "first\n\nValueError: no such thing\n"))
    result = call("convert", command, *arguments(made, command))
    assert result.exit_code == 1
    assert "was not converted: first | ValueError: no such thing" in result.stderr
    assert not list(root.rglob("*.partial"))


def test_space_is_asked_for_what_will_be_written(made: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    """Twice the source's for 32 bits of 16, less for fewer bits."""
    quick_converter.install(monkeypatch)
    asked: list[int] = []
    monkeypatch.setattr(artifacts, "require_space", lambda _folder, needed, _purpose: asked.append(needed))
    size = sum(file.stat().st_size for file in made["base"].glob("*.safetensors"))
    files = [
        output(call("convert", "gguf", made["base"], "--type", "f32", "--json"))["file"],
        output(call("convert", "gguf", made["base"], "--type", "bf16", "--json"))["file"],
        *(output(call("convert", "quantize", made["full"], "--type", kind, "--json"))["file"] for kind in ("F32", "Q4_0")),
    ]
    sizes = [file.stat().st_size for file in files]
    assert sizes[0] > 1.9 * size
    assert sizes[2] > 1.9 * made["full"].stat().st_size
    assert all(needed >= written for needed, written in zip(asked, sizes, strict=True))
    assert all(needed < written + 51_000_000 for needed, written in zip(asked, sizes, strict=True))
    assert asked[3] < made["full"].stat().st_size
