"""What this machine can do, and every problem with its remedy: `examine`. Loads no model and changes nothing."""

import dataclasses
import importlib.util
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

from appliance import config, containers, device, gpu, gpu_access
from appliance.console import human_bytes
from appliance.errors import RecipeError
from appliance.gpu_access import Problem

GIB = 1 << 30
LEAST_MEMORY_BYTES = 2 * GIB  # a 0.6B model in Q4_K_M with its server takes 0.8 GiB
LEAST_DISK_BYTES = 5 * GIB
USEFUL_FEATURES = ("avx512f", "avx2", "avx", "sse4_2", "asimd")
QUESTION_SECONDS = 60.0
ASK_LLAMA = """
from appliance.serving.llama import library
library.start()
print(int(library.c.llama_supports_gpu_offload()))
"""
ASK_TORCH = """
import dataclasses, json
from appliance.training import model
print(json.dumps(dataclasses.asdict(model.torch_build())))
"""


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Report:
    """`facts` in the order in which a person reads them; `problems` keep something from working, `hints` make it slower."""

    facts: Mapping[str, str]
    problems: Sequence[Problem]
    hints: Sequence[Problem]
    run_title: str
    run_line: str


def examine(host: gpu_access.Host = gpu_access.THIS_HOST) -> Report:
    machine, cards = device.machine(), gpu.gpus()
    root, cache = config.artifacts_root(), config.cache_root()
    llama, torch = _ask(ASK_LLAMA, "llama_cpp"), _ask(ASK_TORCH, "torch")
    present = gpu_access.vendors(host)
    built = gpu_access.TorchBuild(**json.loads(torch.said)) if torch and torch.said else None
    can_offload = None if llama is None or llama.failure else llama.said == "1"
    problems = list(gpu.problems(can_offload=can_offload, torch=built))
    problems += [
        _broken(name, asked) for name, asked in (("llama-cpp-python", llama), ("torch", torch)) if asked and asked.failure
    ]
    if machine.memory_total_bytes < LEAST_MEMORY_BYTES:
        least = human_bytes(LEAST_MEMORY_BYTES)
        problems.append(
            Problem(what=f"{human_bytes(machine.memory_total_bytes)} of memory", remedy=f"{least} are the least")
        )
    disks = {name: _free_bytes(folder) for name, folder in (("models", root), ("caches", cache))}
    for name, free in disks.items():
        if free < LEAST_DISK_BYTES:
            problems.append(
                Problem(what=f"{human_bytes(free)} are free for {name}", remedy="free some, or name another disk")
            )
    engine = next(iter(containers.installed()), None)
    vectors = next((name for name in USEFUL_FEATURES if name in machine.cpu_features), "no vector unit known")
    facts = {
        "cores": f"{machine.usable_cores} usable, {machine.physical_cores} physical; {vectors}",
        "memory": f"{human_bytes(machine.memory_available_bytes)} of {human_bytes(machine.memory_total_bytes)} to be had",
        "disk": ", ".join(f"{human_bytes(free)} free for {name}" for name, free in disks.items()),
        "GPU": ", ".join(map(str, cards)) or ("on the bus, not usable" if present else "none"),
        "serving": _state(llama, "computes on " + ("GPU and CPU" if llama and llama.said == "1" else "the CPU")),
        "training": _state(torch, f"torch {built.version}" if built else ""),
        "containers": engine or "neither docker nor podman is installed",
    }
    hints = [*_hints(machine), *_engine_hints(engine, present, host)]
    if not host.is_container:
        try:
            line = containers.detached(engine or "docker", containers.backend({}, host), host)
        except RecipeError as error:
            line = f"none yet. {error}"
        return Report(facts=facts, problems=problems, hints=hints, run_title="In a container", run_line=line)
    facts["containers"] = "this is one"
    line = containers.with_volume(host, os.environ.get(gpu_access.ARCHITECTURES))
    title = "This is a container, which knows no folders of its host. One like it, with a volume; on the host"
    return Report(facts=facts, problems=problems, hints=hints, run_title=title, run_line=line)


@dataclasses.dataclass(frozen=True, slots=True)
class _Asked:
    said: str
    failure: str


def _ask(code: str, package: str) -> _Asked | None:
    """In a process of its own: a library that crashes here would take the doctor along. None where it is not installed."""
    if importlib.util.find_spec(package) is None:
        return None
    command = [sys.executable, "-c", code]
    try:
        result = subprocess.run(
            command, capture_output=True, text=True, timeout=QUESTION_SECONDS, env=config.quiet_environment()
        )
    except subprocess.TimeoutExpired:
        return _Asked("", f"no answer within {QUESTION_SECONDS:.0f} s")
    if result.returncode:
        last = (result.stderr.strip().splitlines() or [f"ended with {result.returncode}"])[-1]
        return _Asked("", last)
    return _Asked(result.stdout.strip(), "")


def _state(asked: _Asked | None, well: str) -> str:
    if asked is None:
        return "not installed"
    return "broken" if asked.failure else well


def _broken(name: str, asked: _Asked) -> Problem:
    return Problem(what=f"{name} cannot be used ({asked.failure})", remedy="repeat `make setup`, or use an image")


def _engine_hints(engine: str | None, present: Sequence[gpu_access.Vendor], host: gpu_access.Host) -> Sequence[Problem]:
    problem = gpu_access.podman_problem(host) if engine == "podman" and "nvidia" in present else None
    return [] if problem is None else [problem]


def _hints(machine: device.Machine) -> Sequence[Problem]:
    found = []
    if machine.usable_cores < 2:
        found.append(Problem(what="One usable core", remedy="two are twice as fast; see the container's CPU quota"))
    if "avx2" not in machine.cpu_features and "asimd" not in machine.cpu_features:
        found.append(Problem(what="This CPU has no AVX2", remedy="expect a third of the speed; take a small model in Q4_0"))
    if machine.memory_available_bytes < LEAST_MEMORY_BYTES:
        remedy = "end other programs, or take a model under 1B"
        found.append(
            Problem(what=f"{human_bytes(machine.memory_available_bytes)} of memory are to be had now", remedy=remedy)
        )
    return found


def _free_bytes(folder: Path) -> int:
    while not folder.exists():
        folder = folder.absolute().parent
    return shutil.disk_usage(folder).free
