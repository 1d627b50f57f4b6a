"""`make setup`: the `.venv`, pinned, with the llama.cpp wheel of this CPU. Entry point: `python3 -m appliance.setup`.

Everything that the machine lacks is said in one message before anything is downloaded. A finished setup leaves a stamp,
named by a digest of all it depends on, so that the next run has nothing to do; an interrupted one continues. Runs under
the system's Python: standard library only. How llama.cpp is fetched and compiled is in `convert/llama_cpp_source.py`.
"""

import sys

if sys.version_info < (3, 11):  # noqa: UP036 - this file is what tells an older Python so; the imports below need 3.11
    version = ".".join(map(str, sys.version_info[:3]))
    sys.exit("error: Python 3.11 or newer is needed, this is " + version + "; `make setup PYTHON=python3.12` takes another.")

import dataclasses
import hashlib
import importlib.util
import json
import re
import shlex
import shutil
import subprocess
import sysconfig
import tomllib
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from appliance import gpu_access
from appliance.config import cache_root
from appliance.errors import ApplianceError, EnvironmentIncomplete, several
from convert import llama_cpp_source, llama_cpp_wheel

ROOT = Path(__file__).resolve().parents[1]
EXTRAS = ("serve", "sign", "traces", "train", "convert", "onnx", "dev")
BACKENDS = ("cpu", "cuda", "rocm")
CPU_INDEX = "https://download.pytorch.org/whl/cpu"
ROCM_INDEX = "https://download.pytorch.org/whl/rocm7.1"
MINIMUM_CMAKE = (3, 21)
GIB = 1 << 30
# cpu: 1.8 GiB measured, and room for pip's temporary files; cuda and rocm: estimates, not measured.
VENV_BYTES = {"cpu": 3 * GIB, "cuda": 10 * GIB, "rocm": 20 * GIB}
CACHE_BYTES = 1 * GIB
TRIAL = {"CC": ("cc", "c", "#include <stdio.h>\n"), "CXX": ("c++", "c++", "#include <vector>\n")}
# torch's own OpenMP and the wheel's CPU code are what differs from machine to machine; both must load.
PROOF = "import torch, llama_cpp; llama_cpp.llama_backend_init()"


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """What is to be installed where; `torch_index` is None for whatever pip finds."""

    root: Path
    backend: str
    torch_index: str | None
    torch_pin: str
    requirements: tuple[str, ...]
    digest: str
    venv: Path
    constraints: Path

    @property
    def python(self) -> str:
        return str(self.venv / "bin/python")

    @property
    def stamp(self) -> Path:
        return self.venv / f".setup-{self.digest}"

    @property
    def foundation(self) -> str:
        """What a `.venv` cannot change in place: a difference makes a new one."""
        parts = [str(self.root), sys.version_info[:2], self.backend, self.torch_index, llama_cpp_wheel.wheel_key()]
        return json.dumps(parts)


@dataclasses.dataclass(frozen=True, slots=True)
class Missing:
    """A problem of the machine, and the Debian packages that cure it."""

    problem: str
    packages: tuple[str, ...] = ()


def main(arguments: Sequence[str]) -> int:
    def work() -> None:
        plan = make_plan(ROOT, llama_cpp_source.pip_environment())
        if "--check" in arguments:
            check_machine(plan, llama_cpp_source.pip_environment())
        else:
            set_up(plan)

    return reporting(work)


def reporting(work: Callable[[], None]) -> int:
    """Does the work; returns the exit code, with the reason said in words."""
    try:
        work()
    except ApplianceError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code
    except OSError as error:
        if error.errno != 28:  # ENOSPC
            raise
        print("error: No space left on the device; free some and repeat, what is done is kept.", file=sys.stderr)
        return EnvironmentIncomplete.exit_code
    except KeyboardInterrupt:
        print("interrupted; the same command continues from here", file=sys.stderr)
        return 130
    return 0


def make_plan(root: Path, environment: Mapping[str, str]) -> Plan:
    """Reads the pins and the environment's choices: BACKEND, TORCH_INDEX."""
    backend = environment.get("BACKEND") or gpu_access.backend()
    index = environment.get("TORCH_INDEX") or (ROCM_INDEX if backend == "rocm" else None)
    problems = []
    if backend not in BACKENDS:
        problems.append(f"BACKEND={backend}: not one of {', '.join(BACKENDS)}")
    if index is not None and not re.match(r"(https?|file)://", index):
        problems.append(f"TORCH_INDEX={index}: not an address such as {CPU_INDEX}")
    if problems:
        raise EnvironmentIncomplete(several(problems, "Setup cannot start"))
    project = tomllib.loads((root / "pyproject.toml").read_text())
    pins = {name: (root / f"constraints/{name}.txt").read_text() for name in ("common", *BACKENDS)}
    torch_pin = re.findall(r"^torch==\S+", pins[backend], re.MULTILINE)[0]
    plan = Plan(
        root=root,
        backend=backend,
        torch_index=index,
        torch_pin=torch_pin,
        requirements=requirements(project),
        digest="",
        venv=root / ".venv",
        constraints=root / f"constraints/{backend}.txt",
    )
    # The tables of pyproject.toml that decide what is installed; linters' settings do not.
    parts = [plan.foundation, project["project"], project["build-system"], pins, plan.requirements]
    digest = hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:16]
    return dataclasses.replace(plan, digest=digest)


def requirements(project: Mapping[str, object]) -> tuple[str, ...]:
    """All that is installed from an index beside torch; the wheel of llama-cpp-python comes from the cache."""
    table, build = project["project"], project["build-system"]
    assert isinstance(table, dict)
    assert isinstance(build, dict)
    extras = [name for extra in EXTRAS for name in table["optional-dependencies"][extra]]
    found = [*table["dependencies"], *extras, *build["requires"]]
    return tuple(dict.fromkeys(name for name in found if not name.startswith("llama-cpp-python")))


def set_up(plan: Plan) -> None:
    """Brings the environment to `plan`; returns at once when it is there already."""
    if is_ready(plan):
        return
    with llama_cpp_source.locked(plan.root):
        if is_ready(plan):
            return
        check_machine(plan, llama_cpp_source.pip_environment())
        for stale in plan.venv.glob(".setup-*"):
            stale.unlink()
        make_environment(plan)
        install_torch(plan)
        say("installing what training, conversion, serving and tests need")
        pip_install(plan, *plan.requirements)
        llama_cpp_source.ensure_converter(plan.python)
        pip_install(plan, str(llama_cpp_wheel.ensure_wheel(plan.python)))
        # Without build isolation: setuptools is installed and pinned, and nothing is downloaded for it.
        pip_install(plan, "--no-deps", "--no-build-isolation", "--editable", str(plan.root))
        prove(plan)
        plan.stamp.touch()
        say(f"ready: {plan.venv} ({plan.backend})")


def is_ready(plan: Plan) -> bool:
    if not (plan.stamp.exists() and Path(plan.python).exists()):
        return False
    try:
        llama_cpp_source.converter_dir()  # the cache may have been cleared since
    except EnvironmentIncomplete:
        return False
    return True


def check_machine(plan: Plan, environment: Mapping[str, str]) -> None:
    """Raises one EnvironmentIncomplete that names everything the machine lacks."""
    missing = missing_python_parts()
    try:
        llama_cpp_wheel.wheel_path()
    except EnvironmentIncomplete:
        missing += missing_build_tools(environment)
        needs_build = True
    else:
        needs_build = False
    has_torch = any(plan.venv.glob("lib/python3*/site-packages/torch/version.py"))
    needs = [(plan.root, GIB if has_torch else VENV_BYTES[plan.backend])]
    missing += missing_space([*needs, (cache_root(), CACHE_BYTES)] if needs_build else needs)
    refuse(missing)


def refuse(missing: Sequence[Missing]) -> None:
    if not missing:
        return
    packages = sorted({package for each in missing for package in each.packages})
    cure = f"\nOn Debian or Ubuntu: sudo apt-get install {' '.join(packages)}" if packages else ""
    problems = [each.problem for each in missing]
    raise EnvironmentIncomplete(several(problems, "Nothing was downloaded: this machine is not ready") + cure)


def missing_python_parts(*, needs_headers: bool = True) -> list[Missing]:
    found = []
    if not (importlib.util.find_spec("venv") and importlib.util.find_spec("ensurepip")):
        found.append(Missing(f"{sys.executable} has no venv and ensurepip", ("python3-venv",)))
    header = Path(sysconfig.get_path("include")) / "Python.h"
    if needs_headers and not header.exists():
        found.append(Missing(f"the headers of Python are missing ({header})", ("python3-dev",)))
    return found


def missing_build_tools(environment: Mapping[str, str]) -> list[Missing]:
    """What compiling llama.cpp needs: compilers that compile, and CMake (pip brings ninja)."""
    found = []
    for variable, (default, language, program) in TRIAL.items():
        command = shlex.split(environment.get(variable) or default)
        if not compiles([*command, "-x", language, "-fsyntax-only", "-"], program, environment):
            name = "C" if variable == "CC" else "C++"
            found.append(Missing(f"no working {name} compiler ({shlex.join(command)})", ("build-essential",)))
    cmake = cmake_version(environment)
    wanted = ".".join(map(str, MINIMUM_CMAKE))
    if cmake is None:
        found.append(Missing(f"no cmake ({wanted} or newer is needed)", ("cmake",)))
    elif cmake < MINIMUM_CMAKE:
        found.append(Missing(f"cmake is {'.'.join(map(str, cmake))}, {wanted} or newer is needed", ("cmake",)))
    return found


def compiles(command: Sequence[str], program: str, environment: Mapping[str, str]) -> bool:
    """Whether the compiler is there and finds its standard headers (a compiler without libc's headers is common)."""
    executable = shutil.which(command[0], path=environment.get("PATH", ""))
    if executable is None:
        return False
    run = [executable, *command[1:]]
    return subprocess.run(run, input=program.encode(), capture_output=True, env=environment, check=False).returncode == 0


def cmake_version(environment: Mapping[str, str]) -> tuple[int, int] | None:
    executable = shutil.which("cmake", path=environment.get("PATH", ""))
    if executable is None:
        return None
    text = subprocess.run([executable, "--version"], capture_output=True, text=True, check=False).stdout
    found = re.search(r"version (\d+)\.(\d+)", text)
    return (int(found[1]), int(found[2])) if found else None


def missing_space(needs: Sequence[tuple[Path, int]]) -> list[Missing]:
    """Disks with too little room; folders on one disk are added up."""
    disks: dict[int, tuple[list[str], int, int]] = {}
    for folder, size_bytes in needs:
        existing = next(parent for parent in (folder.absolute(), *folder.absolute().parents) if parent.exists())
        names, total, _ = disks.get(existing.stat().st_dev, ([], 0, 0))
        free = shutil.disk_usage(existing).free
        disks[existing.stat().st_dev] = ([*names, str(folder)], total + size_bytes, free)
    return [
        Missing(f"{total / GIB:.1f} GiB are needed in {' and '.join(names)}, {free / GIB:.1f} GiB are free")
        for names, total, free in disks.values()
        if free < total
    ]


def make_environment(plan: Plan) -> None:
    """A `.venv` with a pip that works; one that is broken or was made for something else is made anew."""
    mark = plan.venv / ".made-for"
    if pip_works(plan.python) and (not mark.exists() or mark.read_text() == plan.foundation):
        remove_half_installed(plan.venv)
    else:
        say(f"making {plan.venv}")
        # The base interpreter, because this one may be the environment's own.
        base = getattr(sys, "_base_executable", sys.executable)
        run([base, "-m", "venv", "--clear", str(plan.venv)], "Making the virtual environment failed.")
    mark.write_text(plan.foundation)


def pip_works(python: str) -> bool:
    if not Path(python).exists():
        return False
    return subprocess.run([python, "-m", "pip", "--version"], capture_output=True, check=False).returncode == 0


def remove_half_installed(venv: Path) -> None:
    """Forgets packages whose installation was cut short; pip writes INSTALLER last, but would call them installed."""
    for metadata in venv.glob("lib/python3*/site-packages/*.dist-info"):
        if not (metadata / "INSTALLER").exists():
            shutil.rmtree(metadata)


def install_torch(plan: Plan) -> None:
    """torch first and alone: any other package that asks for it would bring gigabytes of CUDA libraries."""
    version = plan.torch_pin.partition("==")[2]
    if any(plan.venv.glob(f"lib/python3*/site-packages/torch-{version}[-+.]*")):
        return
    index = plan.torch_index
    if index is None and plan.backend == "cpu" and brings_cuda(plan):
        index = CPU_INDEX
    say(f"installing {plan.torch_pin} for {plan.backend} from {index or 'where pip finds it'}")
    # Without its dependencies: PyTorch's indexes have other versions of them than the pinned ones.
    pip_install(plan, "--no-deps", plan.torch_pin, *(["--index-url", index] if index else []))


def brings_cuda(plan: Plan) -> bool:
    """Whether plain `pip install torch` would install CUDA libraries here, as PyPI's build for x86-64 does."""
    command = [plan.python, "-m", "pip", "install", "--quiet", "--dry-run", "--ignore-installed", "--report", "-"]
    command += ["--constraint", str(plan.constraints), plan.torch_pin]
    environment = llama_cpp_source.pip_environment()
    found = subprocess.run(command, stdout=subprocess.PIPE, env=environment, stdin=subprocess.DEVNULL, check=False)
    if found.returncode:
        raise EnvironmentIncomplete(f"pip finds no {plan.torch_pin}; its message is above. TORCH_INDEX names an index.")
    names = [package["metadata"]["name"].lower() for package in json.loads(found.stdout)["install"]]
    return any(name.startswith(("nvidia", "cuda", "triton")) for name in names)


def pip_install(plan: Plan, *arguments: str) -> None:
    quiet = [] if sys.stderr.isatty() else ["--quiet"]
    # ROCm's triton is on PyTorch's index alone, and torch asks for it by name.
    extra = ["--extra-index-url", plan.torch_index] if plan.torch_index and "--index-url" not in arguments else []
    command = [plan.python, "-m", "pip", "install", *quiet, "--constraint", str(plan.constraints), *extra, *arguments]
    run(command, "Installing failed; pip's message is above. What is installed stays, so repeat the command.")


def prove(plan: Plan) -> None:
    run([plan.python, "-c", PROOF], "The environment was made, but torch or llama_cpp does not load in it.")


def run(command: Sequence[str], failure: str) -> None:
    """Runs a step with its output on stderr; stdout is for results, and setup has none."""
    environment = llama_cpp_source.pip_environment()
    code = subprocess.run(command, env=environment, stdin=subprocess.DEVNULL, stdout=sys.stderr, check=False).returncode
    if code:
        raise EnvironmentIncomplete(f"{failure} (exit {code})")


def say(message: str) -> None:
    print(f"setup: {message}", file=sys.stderr, flush=True)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
