"""`make image-cpu`, `make image-cuda`, `make image-rocm`: builds an image, and with MODEL= a second one with a model in it.

    python3 -m appliance.images cpu|cuda|rocm

ENGINE=docker|podman, TARGET=serve|train, MODEL=FILE.appliance and BUILD_ARGS choose. Shows the commands that it runs. Needs
only the standard library: nothing is installed yet.
"""

import os
import shlex
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path

from appliance import __version__, config, containers
from appliance.errors import ApplianceError, EnvironmentIncomplete, RecipeError

TARGETS = ("serve", "train")
ENVIRONMENT = {"DOCKER_BUILDKIT": "1"}  # before docker 23, as in Debian 12, `RUN --mount` is unknown without it
MODEL_FILE = "model.appliance"  # as Dockerfile.model calls it


def engine(environ: Mapping[str, str]) -> str:
    """The one that was asked for, else the first that answers. Raises `EnvironmentIncomplete` when there is none."""
    asked = environ.get("ENGINE")
    if asked and asked not in containers.ENGINES:
        raise RecipeError(f"ENGINE={asked} builds no image; choose docker or podman.")
    reasons = []
    for name in [asked] if asked else containers.ENGINES:
        reason = containers.unanswering(name)
        if reason is None:
            return name
        reasons.append(reason)
    raise EnvironmentIncomplete(f"Building an image takes docker or podman: {'; '.join(reasons)}.")


def build(engine: str, backend: str, target: str, arguments: Sequence[str] = (), revision: str = "unknown") -> list[str]:
    """The command; `arguments` are the caller's own and come last, so that they win. docker's takes `ENVIRONMENT`."""
    labels = ["--build-arg", f"VERSION={__version__}", "--build-arg", f"REVISION={revision}"]
    file = containers.ROOT / f"Dockerfile.{backend}"
    tag = containers.image(backend, target)
    return [*_builder(engine), "--target", target, "-f", str(file), "-t", tag, *labels, *arguments, str(containers.ROOT)]


def build_with_model(engine: str, backend: str, context: Path) -> list[str]:
    """The command; `context` is a folder with the model's file and nothing else."""
    base = containers.image(backend, "serve")
    file = containers.ROOT / "Dockerfile.model"
    return [*_builder(engine), "-f", str(file), "-t", f"{base}-model", "--build-arg", f"BASE={base}", str(context)]


def model_file(environ: Mapping[str, str], target: str) -> Path | None:
    """What MODEL names; None where it names nothing. Raises `RecipeError`."""
    if not environ.get("MODEL"):
        return None
    path = Path(environ["MODEL"])
    if target != "serve":
        raise RecipeError(f"MODEL={path} goes with TARGET=serve, and TARGET is {target}.")
    if not path.is_file():
        remedy = "`.venv/bin/appliance models export --to FILE` writes one"
        raise RecipeError(f"MODEL={path} is not a file; {remedy}.")
    return path


def revision() -> str:
    """The commit, with "-changed" where files differ from it."""
    if shutil.which("git") is None:
        return "unknown"
    command = ["git", "describe", "--always", "--abbrev=40", "--exclude=*", "--dirty=-changed"]
    asked = subprocess.run(command, cwd=containers.ROOT, capture_output=True, text=True)
    return asked.stdout.strip() or "unknown"


def _builder(engine: str) -> list[str]:
    # Only podman has the option, and without it drops the health check.
    return [engine, "build", *(["--format", "docker"] if engine == "podman" else [])]


def _words(arguments: str) -> list[str]:
    try:
        return shlex.split(arguments)
    except ValueError as error:
        raise RecipeError(f"BUILD_ARGS={arguments} cannot be split into words: {error}.") from error


def _run(command: Sequence[str]) -> None:
    added = ENVIRONMENT if command[0] == "docker" else {}
    shown = [*(f"{name}={value}" for name, value in added.items()), shlex.join(command)]
    print(*shown, file=sys.stderr, flush=True)
    code = subprocess.run(command, env={**os.environ, **added}).returncode
    if code:
        raise EnvironmentIncomplete(f"`{shlex.join(command[:2])}` failed with {code}; its message is above.")


def make(backend: str, environ: Mapping[str, str]) -> None:
    """Builds what is asked for. Raises `RecipeError` and `EnvironmentIncomplete`."""
    target = environ.get("TARGET") or "serve"
    if target not in TARGETS:
        raise RecipeError(f"TARGET={target} is none; choose serve or train.")
    model = model_file(environ, target)
    chosen = engine(environ)
    _run(build(chosen, backend, target, _words(environ.get("BUILD_ARGS", "")), revision()))
    if model is None:
        return
    cache = config.cache_root()
    cache.mkdir(parents=True, exist_ok=True)
    # A folder of its own: the file may lie among others, all of which docker would send to its daemon.
    with tempfile.TemporaryDirectory(dir=cache, prefix="image-") as context:
        shutil.copyfile(model, Path(context) / MODEL_FILE)
        _run(build_with_model(chosen, backend, Path(context)))


def main(arguments: Sequence[str]) -> int:
    try:
        make(arguments[0], os.environ)
    except ApplianceError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
