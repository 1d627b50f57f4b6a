"""Where and with what a benchmark was run: machine, commit, versions, load. For the head of a report."""

import datetime
import importlib.metadata
import os
import platform
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

import appliance
from appliance import device

ROOT = Path(__file__).resolve().parents[1]
SERVING = ("llama-cpp-python", "uvicorn", "fastapi", "numpy")
TRAINING = ("torch", "transformers", "peft", "trl", "accelerate")


def machine() -> Mapping[str, str]:
    memory = f"{device.memory_total_bytes() / 1e9:.1f} GB, {device.memory_available_bytes() / 1e9:.1f} available"
    return {
        "CPU": f"{cpu_model()}, {device.usable_cores()} usable cores ({device.physical_cores()} physical)",
        "memory": memory,
        "system": f"{platform.system()} {platform.release()}, Python {platform.python_version()}",
    }


def versions(packages: Sequence[str] = SERVING) -> Mapping[str, str]:
    found = [f"{name} {importlib.metadata.version(name)}" for name in packages]
    return {"commit": commit(), "versions": ", ".join([f"appliance {appliance.__version__}", *found])}


def command() -> str:
    """As it was typed: `python -m …`, whatever the interpreter's path."""
    specification = getattr(sys.modules["__main__"], "__spec__", None)
    name = specification.name.removesuffix(".__main__") if specification is not None else Path(sys.argv[0]).name
    return " ".join(["python", "-m", name, *sys.argv[1:]])


def now() -> str:
    return datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%d %H:%M UTC")


def load() -> str:
    """The load average over one minute: work of others that was there too."""
    return f"{os.getloadavg()[0]:.2f}"


def commit() -> str:
    """The commit of the working tree, and whether there is more in the tree than that."""
    try:
        found = [
            subprocess.run(["git", *arguments], cwd=ROOT, capture_output=True, text=True, check=True).stdout.strip()
            for arguments in (("rev-parse", "--short=12", "HEAD"), ("status", "--porcelain"))
        ]
    except (OSError, subprocess.CalledProcessError):
        return "unknown (no git here)"
    return f"{found[0]} and changes not committed" if found[1] else found[0]


def cpu_model() -> str:
    """As /proc/cpuinfo names it; on ARM it names none."""
    for line in (device.read_text(Path("/proc/cpuinfo")) or "").splitlines():
        name, _, value = line.partition(":")
        if name.strip() == "model name":
            return value.strip()
    return platform.machine()
