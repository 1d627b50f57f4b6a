"""`make image-test-cuda`: llama.cpp for one kind of NVIDIA card, compiled and linked for real. An hour on two cores; kept.

Compiled with the flags of Dockerfile.cuda by NVIDIA's own compiler, from NVIDIA's wheels, so that no toolkit need be
installed. What this cannot show: CUDA 12.6, which the image has (its compiler is in no wheel; this is 13.0), and that a card
computes. Left out are the kernels of flash attention, most of the compile.
"""

import os
import re
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from appliance.config import cache_root
from tests import tiny_gguf
from tests.images.conftest import REPOSITORY, cmake_flags
from tests.serving.serving_process import running_server

pytestmark = pytest.mark.image_cuda

ARCHITECTURE = "86"  # RTX 3050
TOOLKIT = (
    *("nvidia-cuda-nvcc==13.0.88", "nvidia-cuda-crt==13.0.88", "nvidia-nvvm==13.0.88", "nvidia-cuda-cccl==13.0.85"),
    *("nvidia-cuda-runtime==13.0.96", "nvidia-cublas==13.0.2.14"),
)
# What llama.cpp calls of the driver's library, which comes with the driver and is linked from an empty one in any toolkit.
DRIVER = (
    *("cuDeviceGet", "cuDeviceGetAttribute", "cuGetErrorString", "cuMemAddressFree", "cuMemAddressReserve", "cuMemCreate"),
    *("cuMemGetAllocationGranularity", "cuMemMap", "cuMemRelease", "cuMemSetAccess", "cuMemUnmap"),
)


@pytest.fixture(scope="module")
def toolkit() -> Path:
    """A folder laid out as an installed CUDA toolkit is."""
    folder = cache_root() / "cuda-toolkit-13.0"
    root = folder / "nvidia/cu13"
    if not (root / "lib64").exists():
        install = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--upgrade", "--target", str(folder)]
        subprocess.run([*install, *TOOLKIT], check=True)
        for library in (root / "lib").glob("lib*.so.13"):
            plain = library.with_suffix("")
            plain.unlink(missing_ok=True)
            plain.symlink_to(library.name)
        stubs = root / "lib/stubs"
        stubs.mkdir(exist_ok=True)
        functions = "".join(f"int {name}(void) {{ return 100; }}\n" for name in DRIVER)
        compiler = ["cc", "-shared", "-fPIC", "-x", "c", "-", "-Wl,-soname,libcuda.so.1", "-o", stubs / "libcuda.so"]
        subprocess.run(compiler, input=functions, text=True, check=True)
        (root / "lib64").symlink_to("lib")
    return root


@pytest.fixture(scope="module")
def package(toolkit: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with llama_cpp as it was compiled for the card."""
    flags = cmake_flags("cuda").replace("${CUDA_ARCHITECTURES}", f"{ARCHITECTURE}-real")
    flags += f" -DCMAKE_CUDA_COMPILER={toolkit}/bin/nvcc -DCUDAToolkit_ROOT={toolkit} -DGGML_CUDA_FA=OFF"
    environ = {**os.environ, "CMAKE_ARGS": flags}
    command = [sys.executable, "-m", "convert.llama_cpp_wheel"]
    said = subprocess.run(command, cwd=REPOSITORY, env=environ, stdout=subprocess.PIPE, text=True, check=True)
    folder = tmp_path_factory.mktemp("compiled")
    with zipfile.ZipFile(said.stdout.strip().splitlines()[-1]) as wheel:
        wheel.extractall(folder)
    return folder


def test_library_is_linked_with_cuda_and_holds_code_for_the_card(package: Path) -> None:
    library = package / "llama_cpp/lib/libggml-cuda.so"
    read = subprocess.run(["readelf", "--dynamic", library], capture_output=True, text=True, check=True).stdout
    needed = set(re.findall(r"\(NEEDED\).*\[(.*)\]", read))
    assert {"libcudart.so.13", "libcublas.so.13", "libcuda.so.1"} <= needed
    content = library.read_bytes()
    assert f"sm_{ARCHITECTURE}".encode() in content
    print(f"\nlibggml-cuda.so for sm_{ARCHITECTURE}: {len(content) / 1e6:.0f} MB")


@pytest.mark.parametrize("driver", ["missing", "without a card"])
def test_engine_computes_on_the_cpu_where_the_driver_cannot(
    driver: str, package: Path, toolkit: Path, root: Path, tmp_path: Path
) -> None:
    """Without libcuda.so.1 the library for cards does not load; with one that finds no card it has nothing to compute on."""
    libraries = [toolkit / "lib"]
    if driver == "without a card":
        (tmp_path / "libcuda.so.1").symlink_to(toolkit / "lib/stubs/libcuda.so")
        libraries.append(tmp_path)
    environ = {"PYTHONPATH": str(package), "LD_LIBRARY_PATH": ":".join(map(str, libraries))}
    loading = ["-c", f"import ctypes; ctypes.CDLL('{package}/llama_cpp/lib/libggml-cuda.so')"]
    loaded = subprocess.run(
        [sys.executable, *loading], env=os.environ | environ, capture_output=True, text=True, check=False
    )
    assert ("libcuda.so.1: cannot open shared object file" in loaded.stderr) == (driver == "missing")
    assert (loaded.returncode == 0) == (driver != "missing")
    model = tiny_gguf.write(tmp_path / "tiny.gguf")
    with running_server(model, root=root, environ=environ) as server:
        maps = Path(f"/proc/{server.engine}/maps").read_text()
        assert str(package) in maps
        assert ("libggml-cuda.so" in maps) == (driver != "missing")
        assert server.chat(max_tokens=4).json()["usage"]["completion_tokens"] == 4
