"""`make image-test-arm64`: the CPU image for ARM, from the same file, under emulation. Minutes, so CI leaves it out.

llama.cpp is cross-compiled first, since an emulated compiler would take hours; all else happens in the emulated build. What
emulation cannot show: speed, and the server as a whole, since the engine refuses to start beside a thread that is not its
own, and qemu has one in each process.
"""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from appliance.config import cache_root
from appliance.errors import ApplianceError
from convert import llama_cpp_wheel
from tests import tiny_gguf
from tests.images.conftest import REPOSITORY, cmake_flags
from tests.images.image_engine import ImageEngine
from tests.images.image_run import COMPUTE, CONFINED

pytestmark = pytest.mark.image_arm64

IMAGE = "localhost/edge-appliance:cpu-arm64"
COMPILERS = ("aarch64-linux-gnu-gcc", "aarch64-linux-gnu-g++")
REGISTERED = Path("/proc/sys/fs/binfmt_misc/qemu-aarch64")
# Of 2012; with SVE and without dot products; of 2019, with these and 16-bit floats; all that the emulator knows.
CPUS = {
    "cortex-a53": "libggml-cpu-armv8.0_1.so",
    "a64fx": "libggml-cpu-armv8.0_1.so",
    "neoverse-n1": "libggml-cpu-armv8.2_2.so",
    "max": "libggml-cpu-armv9.2_2.so",
}


@pytest.fixture(scope="module")
def wheels() -> Path:
    """A folder with the wheel for ARM under the name that the build looks for."""
    if missing := [name for name in COMPILERS if shutil.which(name) is None]:
        pytest.skip(f"no {', '.join(missing)} (Debian: g++-aarch64-linux-gnu)")
    cross = "-DCMAKE_SYSTEM_NAME=Linux -DCMAKE_SYSTEM_PROCESSOR=aarch64"
    flags = f"{cmake_flags()} {cross} -DCMAKE_C_COMPILER={COMPILERS[0]} -DCMAKE_CXX_COMPILER={COMPILERS[1]}"
    environ = {**os.environ, "CMAKE_ARGS": flags, "_PYTHON_HOST_PLATFORM": "linux-aarch64"}
    subprocess.run([sys.executable, "-m", "convert.llama_cpp_wheel"], cwd=REPOSITORY, env=environ, check=True)
    (wheel,) = (cache_root() / "wheels" / llama_cpp_wheel.wheel_key(flags)).glob("*_aarch64.whl")
    folder = cache_root() / "wheels-arm64"
    place = folder / llama_cpp_wheel.wheel_key(cmake_flags(), "aarch64")
    place.mkdir(parents=True, exist_ok=True)
    shutil.copy(wheel, place)
    return folder


@pytest.fixture(scope="module")
def engine() -> ImageEngine:
    if not REGISTERED.exists():
        pytest.skip("programs for ARM do not run here (Debian: qemu-user-static and binfmt-support)")
    engine = ImageEngine()
    try:
        engine.ensure_base("arm64")
    except ApplianceError as error:
        pytest.skip(f"no base image can be made here: {error}")
    return engine


@pytest.fixture(scope="module")
def image(engine: ImageEngine, wheels: Path) -> str:
    mounts = {wheels: "/opt/cache/wheels", cache_root() / "downloads": "/opt/cache/downloads"}
    options = engine.build_options({"CMAKE_ARGS": cmake_flags()}, mounts, "arm64")
    seconds = engine.build("cpu", "serve", options, IMAGE)
    layers, _ = engine.layers(IMAGE)
    print(f"\n{IMAGE}: built in {seconds:.0f} s, {sum(layer.size_bytes for layer in layers) / 1e6:.0f} MB compressed")
    return IMAGE


def test_image_is_for_arm(engine: ImageEngine, image: str) -> None:
    assert engine.inspect(image)["Architecture"] == "arm64"
    said = engine.run(
        "podman", "run", "--rm", "--entrypoint", "python3", image, "-c", "import os; print(os.uname().machine)"
    )
    assert said.stdout.strip() == "aarch64"


def test_image_takes_a_model_in(engine: ImageEngine, image: str, stick: Path) -> None:
    """Everything compiled that the command line and the store stand on loads, and the bundle's digests agree."""
    run = ("podman", "run", "--rm", *CONFINED, "--tmpfs", "/data:rw,mode=1777", "--volume", f"{stick}:/stick:ro", image)
    said = engine.run(*run, "models", "import", "/stick/tiny.appliance", "--promote")
    assert "(imported, promoted)" in said.stdout


def test_each_kind_of_cpu_gets_its_variant_and_computes_the_same(engine: ImageEngine, image: str, tmp_path: Path) -> None:
    """No illegal instruction, and the same greedy tokens."""
    model = tiny_gguf.write(tmp_path / "tiny.gguf")
    run = ("podman", "run", "--rm", *CONFINED, "--volume", f"{model}:/model.gguf:ro", "--entrypoint", "python3")
    found = {}
    for cpu in CPUS:
        *tokens, library = engine.run(*run, "--env", f"QEMU_CPU={cpu}", image, "-c", COMPUTE).stdout.split()
        assert len(tokens) == 8, tokens
        found[cpu] = (library, tokens)
    assert {cpu: library for cpu, (library, _) in found.items()} == CPUS
    assert len({tuple(tokens) for _, tokens in found.values()}) == 1
