"""Where the environment lies that exports to ONNX, and how it is run: `export`. `make onnx-env` builds it.

Optimum's exporter needs transformers 4, the rest of this project transformers 5, so it has an environment of its own, in
the cache, named by a digest of its pinned packages. How it is built is in `appliance/onnx_setup.py`.
"""

import errno
import hashlib
import json
import os
import subprocess
import sys
from pathlib import Path

from appliance import config
from appliance.errors import EnvironmentIncomplete, ModelFileError
from convert import onnx_export

CONSTRAINTS = Path(__file__).resolve().parents[1] / "constraints/onnx-export.txt"
REMEDY = "run `make onnx-env` in the project's folder (once; 1.3 GB in the cache)"


def digest() -> str:
    """Names the environment: its packages and the Python that runs them."""
    if not CONSTRAINTS.is_file():
        raise EnvironmentIncomplete(f"{CONSTRAINTS} is missing: exporting to ONNX needs the project's folder, as cloned.")
    return hashlib.sha256(f"{sys.version_info[:2]}\n{CONSTRAINTS.read_text()}".encode()).hexdigest()[:12]


def folder() -> Path:
    return config.cache_root() / f"onnx-export-{digest()}"


def mark() -> Path:
    """Exists when the environment is whole."""
    return folder() / ".whole"


def python() -> Path:
    """The environment's interpreter; raises `EnvironmentIncomplete` when it is not built."""
    found = folder() / "bin/python"
    if not (mark().exists() and found.exists()):
        raise EnvironmentIncomplete(f"The environment that exports to ONNX is not in {folder()}; {REMEDY}.")
    return found


def export(model: Path, target: Path, task: str) -> dict[str, str]:
    """Writes model.onnx and model-int8.onnx into `target`; returns the versions of the packages that made them.

    Raises `ModelFileError` with the exporter's last words when it fails.
    """
    # Isolated: neither the current folder nor PYTHONPATH may lend it a package of the other environment.
    command = [str(python()), "-I", str(onnx_export.__file__), str(model.absolute()), str(target.absolute()), task]
    result = subprocess.run(
        command, env=config.quiet_environment(), stdin=subprocess.DEVNULL, capture_output=True, text=True, errors="replace"
    )
    if result.returncode == onnx_export.NO_SPACE:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(target))
    try:
        if result.returncode == 0:
            versions: dict[str, str] = json.loads(result.stdout.strip().splitlines()[-1])
            return versions
    except (ValueError, IndexError):
        pass
    lines = [line.strip() for line in result.stderr.splitlines() if line.strip()]
    raise ModelFileError(f"{model} was not exported: {' | '.join(lines[-3:]) or f'exit code {result.returncode}'}")
