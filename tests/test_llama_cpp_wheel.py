"""The wheel of llama.cpp: how a build is named, what is kept of it, and how it fails. Nothing is compiled."""

import base64
import csv
import hashlib
import io
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from appliance.errors import EnvironmentIncomplete
from convert import llama_cpp_source as source
from convert import llama_cpp_wheel
from tests.setup_machine import alone, script, source_distribution


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    return alone(tmp_path, monkeypatch)


class TestWheelKey:
    def test_names_the_flags_the_cpu_and_the_python(self) -> None:
        plain = llama_cpp_wheel.wheel_key("", "cpu one")
        assert plain == llama_cpp_wheel.wheel_key("", "cpu one")
        assert plain.startswith(f"{source.VERSION}-cp3{sys.version_info.minor}-")
        assert (
            len({plain, llama_cpp_wheel.wheel_key("", "cpu two"), llama_cpp_wheel.wheel_key("-DGGML_CUDA=ON", "cpu one")})
            == 3
        )

    def test_reads_the_flags_of_the_environment(self, monkeypatch: pytest.MonkeyPatch) -> None:
        before = llama_cpp_wheel.wheel_key()
        monkeypatch.setenv("CMAKE_ARGS", "-DGGML_NATIVE=OFF")
        assert llama_cpp_wheel.wheel_key() == llama_cpp_wheel.wheel_key("-DGGML_NATIVE=OFF") != before

    def test_a_portable_wheel_is_the_same_on_every_cpu_of_an_architecture(self, monkeypatch: pytest.MonkeyPatch) -> None:
        keys = {}
        for machine, cpu in (("x86_64", "old"), ("x86_64", "new"), ("aarch64", "old")):
            monkeypatch.setattr(llama_cpp_wheel.platform, "machine", lambda machine=machine: machine)
            monkeypatch.setattr(llama_cpp_wheel, "cpu_identity", lambda machine=machine, cpu=cpu: f"{machine} {cpu}")
            keys[machine, cpu] = (llama_cpp_wheel.wheel_key(llama_cpp_wheel.PORTABLE), llama_cpp_wheel.wheel_key(""))
        assert len({portable for portable, _ in keys.values()}) == 2
        assert keys["x86_64", "old"][0] == keys["x86_64", "new"][0]
        assert len({native for _, native in keys.values()}) == 3

    def test_a_wheel_for_other_flags_is_not_taken(self, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        folder = cache / "wheels" / llama_cpp_wheel.wheel_key()
        folder.mkdir(parents=True)
        (folder / "one.whl").touch()
        assert llama_cpp_wheel.wheel_path() == folder / "one.whl" == llama_cpp_wheel.ensure_wheel("no python is needed")
        monkeypatch.setenv("CMAKE_ARGS", "-DGGML_NATIVE=OFF")
        with pytest.raises(EnvironmentIncomplete, match="make setup"):
            llama_cpp_wheel.wheel_path()


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
        llama_cpp_wheel.prune_wheel(wheel, pruned)
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
        archive = source_distribution(tmp_path / "sdist.tar.gz", {f"{name}/CMakeLists.txt": b""})
        monkeypatch.setattr(source, "ensure_source", lambda _: archive)
        monkeypatch.setenv("CMAKE_ARGS", "-DGGML_NATIVE=ON")
        build = cache / f"build-{llama_cpp_wheel.wheel_key()}"
        steps = f'mkdir {build}/objects; echo "flags: $CMAKE_ARGS"; seq 25; echo "[3/9] boom"; exit 7'
        python = script(tmp_path / "python", steps)
        with pytest.raises(EnvironmentIncomplete) as raised:
            llama_cpp_wheel.ensure_wheel(python)
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
    monkeypatch.setattr(
        source, "ensure_source", lambda _: source_distribution(tmp_path / "s.tar.gz", {f"{name}/CMakeLists.txt": b""})
    )
    monkeypatch.setattr(llama_cpp_wheel.platform, "machine", lambda: machine)
    monkeypatch.setenv("CMAKE_ARGS", flags)
    with pytest.raises(EnvironmentIncomplete):
        llama_cpp_wheel.ensure_wheel(script(tmp_path / "python", "exit 7"))
    (included,) = cache.glob("build-*/no-common.cmake")
    assert ("armv9.2" in included.read_text()) == is_arm
    assert llama_cpp_wheel.NO_COMMON in included.read_text()


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
