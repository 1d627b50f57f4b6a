"""tcmalloc is preloaded where it is, found where it is loaded; glibc gives back what it is told to."""

import ctypes.util
import os
import subprocess
import sys
from pathlib import Path

import pytest

from appliance import allocator

FRAGMENTS = """
import ctypes, sys
from appliance import allocator
from appliance.memory_holders import own_bytes
if sys.argv[1] == "given back":
    allocator.give_back()
malloc, free = ctypes.CDLL(None).malloc, ctypes.CDLL(None).free
malloc.restype, free.argtypes, malloc.argtypes = ctypes.c_void_p, [ctypes.c_void_p], [ctypes.c_size_t]
free(malloc(8 << 20))  # glibc then keeps all that is smaller
blocks = [malloc(512 << 10) for _ in range(200)]
for block in blocks:
    ctypes.memset(block, 1, 512 << 10)
before = own_bytes()
for block in blocks[::2]:
    free(block)
print((before - own_bytes()) >> 20)
"""
LOADED = "from appliance import allocator; print(allocator.is_tcmalloc(), allocator.kept_share('bfloat16'))"


def python(code: str, *arguments: str, environment: dict[str, str] | None = None) -> str:
    command = [sys.executable, "-c", code, *arguments]
    return subprocess.run(command, env=environment, capture_output=True, text=True, check=True).stdout.strip()


def without_preload() -> dict[str, str]:
    return {name: value for name, value in os.environ.items() if name != allocator.PRELOAD}


def test_glibc_gives_back_what_it_would_keep() -> None:
    freed = {how: int(python(FRAGMENTS, how, environment=without_preload())) for how in ("kept", "given back")}
    assert freed["given back"] >= 45  # of 50 MiB
    assert freed["kept"] <= 5


@pytest.mark.skipif(ctypes.util.find_library(allocator.TCMALLOC) is None, reason="libtcmalloc-minimal4 is not installed")
def test_process_that_it_is_preloaded_to_has_it() -> None:
    assert python(LOADED, environment=without_preload()) == "False 0.55"
    assert python(LOADED, environment=allocator.preloaded(without_preload())) == "True 0.05"


def test_is_preloaded_beside_what_is(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ctypes.util, "find_library", lambda name: f"lib{name}.so.4")
    assert allocator.preloaded({})["LD_PRELOAD"] == "libtcmalloc_minimal.so.4"
    assert allocator.preloaded({"LD_PRELOAD": "/a.so"})["LD_PRELOAD"] == "libtcmalloc_minimal.so.4:/a.so"
    chosen = {"LD_PRELOAD": "/opt/libtcmalloc.so"}
    assert allocator.preloaded(chosen) == chosen


def test_without_the_library_all_is_as_it_was(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(ctypes.util, "find_library", lambda _: None)
    assert allocator.preloaded({"A": "b"}) == {"A": "b"}
    assert not allocator.is_tcmalloc(tmp_path)
