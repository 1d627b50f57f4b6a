"""A portable llama.cpp is told once where its libraries lie; another build is told nothing."""

from pathlib import Path

from appliance import llama_backends


class Library:
    def __init__(self) -> None:
        self.told: list[bytes] = []

    def ggml_backend_load_all_from_path(self, folder: bytes) -> None:
        self.told.append(folder)


class Functions:
    """As `llama_cpp.llama_cpp`: a module in a package that has its libraries in `lib`."""

    def __init__(self, package: Path, *libraries: str) -> None:
        (package / "lib").mkdir(parents=True)
        for name in libraries:
            (package / "lib" / name).touch()
        self.__file__ = str(package / "llama_cpp.py")
        self._lib = Library()


def test_portable_build_is_told_once(tmp_path: Path) -> None:
    portable = Functions(tmp_path / "portable", "libllama.so", "libggml-cpu-haswell.so")
    for _ in range(2):
        llama_backends.load(portable)
    assert portable._lib.told == [str(tmp_path / "portable" / "lib").encode()]


def test_other_builds_need_nothing(tmp_path: Path) -> None:
    native = Functions(tmp_path / "native", "libllama.so", "libggml-cpu.so.0")
    llama_backends.load(native)
    assert native._lib.told == []
