"""The pin of llama.cpp, its cache and the converter. No network."""

import hashlib
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import BinaryIO

import pytest

from appliance.errors import EnvironmentIncomplete
from convert import llama_cpp_source as source
from tests.setup_machine import alone, script, source_distribution

CONVERTER = {name: f"# {name}\n".encode() for name in (*source.CONVERTER_FILES, "conversion/base.py")}
CONVERTER |= {"gguf-py/gguf/gguf.py": b"# gguf\n", "models/templates/a.jinja": b"{{ messages }}\n"}


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    return alone(tmp_path, monkeypatch)


def vendored(files: Mapping[str, bytes]) -> dict[str, bytes]:
    return {f"llama_cpp_python-0.0.1/{source.VENDOR}{name}": content for name, content in files.items()}


def pip_that_gives_itself(folder: Path) -> str:
    """A Python whose `-m pip download --dest DIR` puts its own file there as the source distribution."""
    steps = f'for word; do if test "$last" = --dest; then cp "$0" "$word/{source.SOURCE_NAME}"; fi; last=$word; done'
    return script(folder / "python", steps)


class TestSource:
    def test_a_file_with_another_hash_is_refused(self, cache: Path, tmp_path: Path) -> None:
        python = pip_that_gives_itself(tmp_path)
        with pytest.raises(EnvironmentIncomplete, match=source.SOURCE_SHA256):
            source.ensure_source(python)
        assert list((cache / "downloads").iterdir()) == []

    def test_is_downloaded_once(self, cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        python = pip_that_gives_itself(tmp_path)
        monkeypatch.setattr(source, "SOURCE_SHA256", hashlib.sha256(Path(python).read_bytes()).hexdigest())
        (cache / "downloads/partial").mkdir(parents=True)  # what an interrupted download left
        assert source.ensure_source(python) == cache / "downloads" / source.SOURCE_NAME
        Path(python).unlink()
        assert source.ensure_source(python).exists()
        assert not (cache / "downloads/partial").exists()

    def test_a_failed_download_is_said(self, tmp_path: Path) -> None:
        with pytest.raises(EnvironmentIncomplete, match="Downloading"):
            source.ensure_source(script(tmp_path / "python", "exit 1"))


class TestConverter:
    def test_is_extracted_without_the_rest(self, cache: Path, tmp_path: Path) -> None:
        other = {"src/llama.cpp": b"", "conversion/../../../escape.py": b"", "examples/convert_hf_to_gguf.py": b""}
        archive = source_distribution(tmp_path / "sdist.tar.gz", vendored(CONVERTER | other) | {"x/setup.py": b""})
        folder = cache / f"llama.cpp-{source.VERSION}"
        source.extract_converter(archive, folder)
        assert source.converter_dir() == folder
        found = {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}
        assert found.pop(source.CONVERTER_MARK)
        assert found == CONVERTER
        assert [path.name for path in cache.iterdir()] == [folder.name]
        assert not list(tmp_path.rglob("escape.py"))

    def test_an_interrupted_extraction_looks_like_none(
        self, cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        archive = source_distribution(tmp_path / "sdist.tar.gz", vendored(CONVERTER))
        folder = cache / f"llama.cpp-{source.VERSION}"
        copy = shutil.copyfileobj
        copied: list[BinaryIO] = []

        def copy_two(content: BinaryIO, stream: BinaryIO) -> None:
            if len(copied) == 2:
                raise KeyboardInterrupt
            copy(content, stream)
            copied.append(stream)

        with monkeypatch.context() as patch:
            patch.setattr(shutil, "copyfileobj", copy_two)
            with pytest.raises(KeyboardInterrupt):
                source.extract_converter(archive, folder)
        assert not folder.exists()
        with pytest.raises(EnvironmentIncomplete, match="make setup"):
            source.converter_dir()
        source.extract_converter(archive, folder)
        assert source.converter_dir() == folder

    def test_one_of_another_pin_is_replaced(self, cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        archive = source_distribution(tmp_path / "sdist.tar.gz", vendored(CONVERTER))
        folder = cache / f"llama.cpp-{source.VERSION}"
        source.extract_converter(archive, folder)
        monkeypatch.setattr(source, "SOURCE_SHA256", "another")
        with pytest.raises(EnvironmentIncomplete):
            source.converter_dir()
        source.extract_converter(archive, folder)
        assert source.converter_dir() == folder

    def test_that_of_an_image_lies_apart_from_the_cache(
        self, cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        archive = source_distribution(tmp_path / "sdist.tar.gz", vendored(CONVERTER))
        folder = tmp_path / "opt" / f"llama.cpp-{source.VERSION}"
        source.extract_converter(archive, folder)
        monkeypatch.setenv("APPLIANCE_CONVERTER", str(folder.parent))
        assert source.converter_dir() == folder
        assert not cache.exists() or not list(cache.iterdir())

    def test_a_source_without_a_converter_is_refused(self, cache: Path, tmp_path: Path) -> None:
        files = {name: content for name, content in CONVERTER.items() if not name.startswith("gguf-py")}
        archive = source_distribution(tmp_path / "sdist.tar.gz", vendored(files))
        with pytest.raises(EnvironmentIncomplete, match="gguf-py"):
            source.extract_converter(archive, cache / "converter")
        assert not (cache / "converter").exists()
