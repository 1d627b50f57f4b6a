"""The build of the peers, with tools that only pretend: what they are called with, and what is left when they fail."""

import io
import tarfile
from collections.abc import Callable
from pathlib import Path

import pytest

from appliance import setup
from appliance.errors import EnvironmentIncomplete
from benchmarks import peers
from benchmarks.peers import PROGRAMS
from convert import llama_cpp_source

PROGRAM = '#!/bin/sh\\necho "version: 1"\\nexit ${EXIT:-0}\\n'
COMPILES = f"""
mkdir -p "$2/bin"
for name in {" ".join(PROGRAMS)}; do printf '{PROGRAM}' > "$2/bin/$name"; chmod +x "$2/bin/$name"; done
ln -sf llama-server "$2/bin/link"
"""


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty cache, and a source distribution with nothing in it."""
    folder = tmp_path / "cache"
    monkeypatch.setenv("APPLIANCE_CACHE", str(folder))
    monkeypatch.delenv("CMAKE_ARGS", raising=False)
    name = llama_cpp_source.SOURCE_NAME.removesuffix(".tar.gz")
    archive = tmp_path / "sdist.tar.gz"
    with tarfile.open(archive, "w:gz") as stream:
        stream.addfile(tarfile.TarInfo(f"{name}/{llama_cpp_source.VENDOR}CMakeLists.txt"), io.BytesIO())
    monkeypatch.setattr(llama_cpp_source, "ensure_source", lambda: archive)
    monkeypatch.setattr(setup, "missing_build_tools", lambda _: [])
    return folder


@pytest.fixture
def tools(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str], Path]:
    """Puts `cmake` and `ninja` in front of the others; they write down how they were called. Returns where."""
    folder, calls = tmp_path / "tools", tmp_path / "calls"
    folder.mkdir()
    monkeypatch.setenv("PATH", f"{folder}:/usr/bin:/bin")

    def put(ninja: str) -> Path:
        for name, steps in (("cmake", 'mkdir -p "$4"'), ("ninja", ninja)):
            program = folder / name
            program.write_text(f'#!/bin/sh\necho "{name} $*" >> {calls}\n{steps}\n')
            program.chmod(0o755)
        return calls

    return put


def test_compiled_once_and_moved_into_place_whole(
    cache: Path, tools: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CMAKE_ARGS", "-DGGML_NATIVE=OFF '-DX=a b'")
    calls = tools(COMPILES)
    with pytest.raises(EnvironmentIncomplete, match="make bench-peers"):
        peers.binary("llama-server")
    programs = peers.ensure_programs()
    assert [peers.binary(name) for name in PROGRAMS] == [programs / name for name in PROGRAMS]
    assert (programs / "link").is_symlink()
    configured, compiled = calls.read_text().splitlines()
    assert f"-S {cache}/peers/build-{programs.parent.name}/source/vendor/llama.cpp" in configured
    assert configured.endswith("-DGGML_NATIVE=OFF -DX=a b -G Ninja")
    assert "-DLLAMA_OPENSSL=OFF" in configured
    assert compiled.endswith(" ".join(PROGRAMS))
    assert list((cache / "peers").iterdir()) == [programs.parent], "the build folder is gone"
    assert peers.ensure_programs() == programs
    assert len(calls.read_text().splitlines()) == 2, "the second run calls nobody"
    monkeypatch.setenv("CMAKE_ARGS", "-DGGML_NATIVE=ON")
    with pytest.raises(EnvironmentIncomplete, match="llama-bench is not built for this machine"):
        peers.binary("llama-bench")


def test_a_failure_shows_the_end_of_the_log_and_starts_afresh(cache: Path, tools: Callable[[str], Path]) -> None:
    calls = tools('touch "$2/half.o"; seq 40; echo "[3/9] boom"; exit 7')
    with pytest.raises(EnvironmentIncomplete, match=r"(?s)exit 7.*\[3/9\] boom"):
        peers.ensure_programs()
    assert not list(cache.rglob("half.o"))
    assert list(cache.rglob("CMakeLists.txt")), "the source is not unpacked again"
    tools(COMPILES)
    peers.ensure_programs()
    assert [line.split()[0] for line in calls.read_text().splitlines()] == ["cmake", "ninja", "cmake", "ninja"]


def test_an_interrupted_compile_goes_on_where_it_was(tools: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch) -> None:
    tools('touch "$2/first.o"')
    with monkeypatch.context() as patch:
        patch.setattr(peers, "install", _interrupt)
        with pytest.raises(KeyboardInterrupt):
            peers.ensure_programs()
    assert not peers.programs_folder().exists()
    tools(f'test -e "$2/first.o" || exit 1\n{COMPILES}')
    peers.ensure_programs()


def test_programs_that_do_not_start_are_not_kept(tools: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch) -> None:
    tools(COMPILES)
    monkeypatch.setenv("EXIT", "127")
    with pytest.raises(EnvironmentIncomplete, match="llama-server was built and does not start"):
        peers.ensure_programs()
    assert not peers.programs_folder().exists()
    tools('rm -r "$2/bin"; mkdir -p "$2/bin"')
    with pytest.raises(EnvironmentIncomplete, match="llama-server was built and cannot be run: No such file"):
        peers.ensure_programs()
    monkeypatch.delenv("EXIT")
    tools(COMPILES)
    peers.ensure_programs()


def test_everything_that_is_missing_is_named_at_once(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(setup, "missing_build_tools", lambda _: [setup.Missing("no cmake", ("cmake",))])
    monkeypatch.setenv("PATH", str(cache))
    with pytest.raises(EnvironmentIncomplete, match=r"(?s)no cmake.*neither ninja nor make.*install cmake ninja-build"):
        peers.ensure_programs()
    assert not (cache / "peers").exists()


def _interrupt(*_: object) -> None:
    raise KeyboardInterrupt
