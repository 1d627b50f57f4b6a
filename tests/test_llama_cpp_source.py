"""The pin of llama.cpp, the cache, the converter and the wheel. No network, nothing is compiled."""

import base64
import csv
import hashlib
import io
import shutil
import subprocess
import sys
import tarfile
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import BinaryIO

import pytest

from appliance.errors import EnvironmentIncomplete
from convert import llama_cpp_source as source

CONVERTER = {name: f"# {name}\n".encode() for name in (*source.CONVERTER_FILES, "conversion/base.py")}
CONVERTER |= {"gguf-py/gguf/gguf.py": b"# gguf\n", "models/templates/a.jinja": b"{{ messages }}\n"}


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    folder = tmp_path / "cache"
    monkeypatch.setenv("APPLIANCE_CACHE", str(folder))
    for name in ("CMAKE_ARGS", "TORCH_INDEX", "BACKEND"):
        monkeypatch.delenv(name, raising=False)
    return folder


def script(path: Path, text: str) -> str:
    path.write_text(f"#!/bin/sh\n{text}\n")
    path.chmod(0o755)
    return str(path)


def sdist(path: Path, files: Mapping[str, bytes]) -> Path:
    with tarfile.open(path, "w:gz") as archive:
        for name, content in files.items():
            member = tarfile.TarInfo(name)
            member.size = len(content)
            archive.addfile(member, io.BytesIO(content))
    return path


def vendored(files: Mapping[str, bytes]) -> dict[str, bytes]:
    return {f"llama_cpp_python-0.0.1/{source.VENDOR}{name}": content for name, content in files.items()}


def pip_that_gives_itself(folder: Path) -> str:
    """A Python whose `-m pip download --dest DIR` puts its own file there as the source distribution."""
    steps = f'for word; do if test "$last" = --dest; then cp "$0" "$word/{source.SOURCE_NAME}"; fi; last=$word; done'
    return script(folder / "python", steps)


class TestWheelKey:
    def test_names_the_flags_the_cpu_and_the_python(self) -> None:
        plain = source.wheel_key("", "cpu one")
        assert plain == source.wheel_key("", "cpu one")
        assert plain.startswith(f"{source.VERSION}-cp3{sys.version_info.minor}-")
        assert len({plain, source.wheel_key("", "cpu two"), source.wheel_key("-DGGML_CUDA=ON", "cpu one")}) == 3

    def test_reads_the_flags_of_the_environment(self, monkeypatch: pytest.MonkeyPatch) -> None:
        before = source.wheel_key()
        monkeypatch.setenv("CMAKE_ARGS", "-DGGML_NATIVE=OFF")
        assert source.wheel_key() == source.wheel_key("-DGGML_NATIVE=OFF") != before

    def test_a_portable_wheel_is_the_same_on_every_cpu_of_an_architecture(self, monkeypatch: pytest.MonkeyPatch) -> None:
        keys = {}
        for machine, cpu in (("x86_64", "old"), ("x86_64", "new"), ("aarch64", "old")):
            monkeypatch.setattr(source.platform, "machine", lambda machine=machine: machine)
            monkeypatch.setattr(source, "cpu_identity", lambda machine=machine, cpu=cpu: f"{machine} {cpu}")
            keys[machine, cpu] = (source.wheel_key(source.PORTABLE), source.wheel_key(""))
        assert len({portable for portable, _ in keys.values()}) == 2
        assert keys["x86_64", "old"][0] == keys["x86_64", "new"][0]
        assert len({native for _, native in keys.values()}) == 3

    def test_a_wheel_for_other_flags_is_not_taken(self, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        folder = cache / "wheels" / source.wheel_key()
        folder.mkdir(parents=True)
        (folder / "one.whl").touch()
        assert source.wheel_path() == folder / "one.whl" == source.ensure_wheel("no python is needed")
        monkeypatch.setenv("CMAKE_ARGS", "-DGGML_NATIVE=OFF")
        with pytest.raises(EnvironmentIncomplete, match="make setup"):
            source.wheel_path()


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
        archive = sdist(tmp_path / "sdist.tar.gz", vendored(CONVERTER | other) | {"x/setup.py": b""})
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
        archive = sdist(tmp_path / "sdist.tar.gz", vendored(CONVERTER))
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
        archive = sdist(tmp_path / "sdist.tar.gz", vendored(CONVERTER))
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
        archive = sdist(tmp_path / "sdist.tar.gz", vendored(CONVERTER))
        folder = tmp_path / "opt" / f"llama.cpp-{source.VERSION}"
        source.extract_converter(archive, folder)
        monkeypatch.setenv("APPLIANCE_CONVERTER", str(folder.parent))
        assert source.converter_dir() == folder
        assert not cache.exists() or not list(cache.iterdir())

    def test_a_source_without_a_converter_is_refused(self, cache: Path, tmp_path: Path) -> None:
        files = {name: content for name, content in CONVERTER.items() if not name.startswith("gguf-py")}
        archive = sdist(tmp_path / "sdist.tar.gz", vendored(files))
        with pytest.raises(EnvironmentIncomplete, match="gguf-py"):
            source.extract_converter(archive, cache / "converter")
        assert not (cache / "converter").exists()


class TestWheel:
    def test_pruned_wheel_is_valid_and_loads_what_it_loaded(self, tmp_path: Path) -> None:
        lib = "llama_cpp/lib"
        kept = [f"{lib}/libllama.so", f"{lib}/libllama.so.0", f"{lib}/libggml.so", f"{lib}/libggml.so.0"]
        kept += [f"{lib}/libggml-base.so.0", f"{lib}/libggml-cpu-zen4.so", "llama_cpp/__init__.py"]
        dropped = [f"{lib}/libllama.so.0.5.0", f"{lib}/libggml-base.so", f"{lib}/libggml-base.so.0.25.3"]
        dropped += ["lib/libllama.so", "lib/cmake/llama.cmake", "include/llama.h", "bin/tool"]
        wheel = make_wheel(tmp_path / "llama_cpp_python-0.0.1-py3-none-any.whl", [*kept, *dropped])
        pruned = tmp_path / "pruned" / wheel.name
        pruned.parent.mkdir()
        source.prune_wheel(wheel, pruned)
        with zipfile.ZipFile(pruned) as archive:
            contents = {name: archive.read(name) for name in archive.namelist()}
        rows = {
            row[0]: row[1] for row in csv.reader(io.StringIO(contents["llama_cpp_python-0.0.1.dist-info/RECORD"].decode()))
        }
        assert {name for name in contents if ".dist-info/" not in name} == set(kept)
        assert rows.keys() == contents.keys()
        assert all(rows[name] == digest(content) for name, content in contents.items() if not name.endswith("RECORD"))
        command = [sys.executable, "-m", "pip", "install", "--no-index", "--no-deps"]
        command += ["--target", str(tmp_path / "site"), str(pruned)]
        assert subprocess.run(command, capture_output=True, check=False).returncode == 0
        assert (tmp_path / "site/llama_cpp/lib/libllama.so").exists()

    def test_a_failed_compile_shows_the_end_of_its_log(
        self, cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        name = source.SOURCE_NAME.removesuffix(".tar.gz")
        archive = sdist(tmp_path / "sdist.tar.gz", {f"{name}/CMakeLists.txt": b""})
        monkeypatch.setattr(source, "ensure_source", lambda _: archive)
        monkeypatch.setenv("CMAKE_ARGS", "-DGGML_NATIVE=ON")
        build = cache / f"build-{source.wheel_key()}"
        steps = f'mkdir {build}/objects; echo "flags: $CMAKE_ARGS"; seq 25; echo "[3/9] boom"; exit 7'
        python = script(tmp_path / "python", steps)
        with pytest.raises(EnvironmentIncomplete) as raised:
            source.ensure_wheel(python)
        message = str(raised.value)
        assert "exit 7" in message
        assert "[3/9] boom" in message
        assert "-DLLAVA_BUILD=OFF" in message
        assert "-DGGML_NATIVE=ON" in message
        assert str(cache / "logs") in message
        assert (build / "source/CMakeLists.txt").exists()
        assert not (build / "objects").exists()


@pytest.mark.parametrize(
    ("machine", "flags", "is_arm"),
    [("x86_64", "", False), ("aarch64", "", True), ("x86_64", "-DCMAKE_SYSTEM_PROCESSOR=aarch64", True)],
)
def test_an_arm_compiler_without_sme_is_helped(
    cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, machine: str, flags: str, is_arm: bool
) -> None:
    """What the build includes; that it is enough is seen by `make image-test-arm64`."""
    name = source.SOURCE_NAME.removesuffix(".tar.gz")
    monkeypatch.setattr(source, "ensure_source", lambda _: sdist(tmp_path / "s.tar.gz", {f"{name}/CMakeLists.txt": b""}))
    monkeypatch.setattr(source.platform, "machine", lambda: machine)
    monkeypatch.setenv("CMAKE_ARGS", flags)
    with pytest.raises(EnvironmentIncomplete):
        source.ensure_wheel(script(tmp_path / "python", "exit 7"))
    (included,) = cache.glob("build-*/no-common.cmake")
    assert ("armv9.2" in included.read_text()) == is_arm
    assert source.NO_COMMON in included.read_text()


def digest(content: bytes) -> str:
    return "sha256=" + base64.urlsafe_b64encode(hashlib.sha256(content).digest()).decode().rstrip("=")


def make_wheel(path: Path, names: list[str]) -> Path:
    info = "llama_cpp_python-0.0.1.dist-info"
    files = {name: f"content of {name}".encode() for name in names}
    files["llama_cpp/__init__.py"] = b""
    files[f"{info}/METADATA"] = b"Metadata-Version: 2.1\nName: llama_cpp_python\nVersion: 0.0.1\n"
    files[f"{info}/WHEEL"] = b"Wheel-Version: 1.0\nGenerator: test\nRoot-Is-Purelib: true\nTag: py3-none-any\n"
    record = "".join(f"{name},{digest(content)},{len(content)}\n" for name, content in files.items())
    files[f"{info}/RECORD"] = f"{record}{info}/RECORD,,\n".encode()
    with zipfile.ZipFile(path, "w") as archive:
        for name, content in files.items():
            archive.writestr(name, content)
    return path
