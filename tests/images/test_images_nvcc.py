"""`make image-test`, where nvcc is on the machine: llama.cpp for one kind of NVIDIA card, compiled and linked for real.

With the flags of Dockerfile.cuda. Left out are the kernels of flash attention, most of the compile, and the driver's library
where the toolkit has none to link with. Whether it computes is for a card to say.
"""

import os
import re
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from tests.images.conftest import REPOSITORY

pytestmark = pytest.mark.image

ARCHITECTURE = "86"  # RTX 3050
COMPILE_SECONDS = 7200.0


def test_one_architecture_compiles_and_links(tmp_path: Path) -> None:
    nvcc = shutil.which("nvcc")
    if nvcc is None:
        pytest.skip("nvcc is not on this machine, so nothing is compiled for CUDA")
    file = (REPOSITORY / "Dockerfile.cuda").read_text()
    found = re.search(r'^ARG CMAKE_ARGS="(.*)"$', file, re.MULTILINE)
    assert found is not None
    flags = found[1].replace("${CUDA_ARCHITECTURES}", f"{ARCHITECTURE}-real") + " -DGGML_CUDA_FA=OFF"
    if not list(Path(nvcc).resolve().parents[1].rglob("libcuda.so")):
        flags += " -DGGML_CUDA_NO_VMM=ON"
    environ = {**os.environ, "CMAKE_ARGS": flags}
    command = [sys.executable, "-m", "convert.llama_cpp_source"]
    said = subprocess.run(
        command, cwd=REPOSITORY, env=environ, stdout=subprocess.PIPE, text=True, check=True, timeout=COMPILE_SECONDS
    )
    wheel = Path(said.stdout.strip().splitlines()[-1])
    with zipfile.ZipFile(wheel) as archive:
        library = tmp_path / "libggml-cuda.so"
        library.write_bytes(archive.read(f"llama_cpp/lib/{library.name}"))
    needed = subprocess.run(["readelf", "--dynamic", library], capture_output=True, text=True, check=True).stdout
    assert re.search(r"\[libcudart\.so|\[libcublas\.so", needed)
    assert f"sm_{ARCHITECTURE}".encode() in library.read_bytes()
    print(f"\nlibggml-cuda.so for sm_{ARCHITECTURE}: {library.stat().st_size / 1e6:.0f} MB, with {nvcc}")
