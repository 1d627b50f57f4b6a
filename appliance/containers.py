"""`make serve` and `make train`: in a container where there is an engine and an image, else in `.venv`; always says which.

    python3 -m appliance.containers serve|train [ARGUMENTS]

ENGINE=docker|podman|none and BACKEND=cpu|cuda|rocm choose; otherwise both are detected. The container gets the caller's user
and the caller's folders, and nothing else. Only the standard library: it runs before anything is installed.
"""

import dataclasses
import os
import shlex
import shutil
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import get_args

from appliance import config, gpu_access
from appliance.errors import ApplianceError, EnvironmentIncomplete, RecipeError

ROOT = Path(__file__).resolve().parents[1]
ENGINES = ("docker", "podman")
CONFINED = ("--read-only", "--tmpfs", "/tmp:size=64m", "--cap-drop", "ALL", "--security-opt", "no-new-privileges")
TRAINING_TMP = ("--read-only", "--tmpfs", "/tmp:size=2g,exec", "--cap-drop", "ALL", "--security-opt", "no-new-privileges")
PORT = 8080
COMMANDS = {"train": "run", "serve": "serve"}  # training ends in a model that can be served: converted, verified, promoted
QUESTION_SECONDS = 20.0


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Place:
    """Where a command is to run: an engine and an image, or `.venv`, and why there."""

    engine: str | None
    image: str
    why: str = ""


def backend(environ: Mapping[str, str], host: gpu_access.Host = gpu_access.THIS_HOST) -> str:
    """Raises `RecipeError` for a BACKEND that there is none of."""
    if chosen := environ.get("BACKEND"):
        if chosen not in get_args(gpu_access.Backend):
            raise RecipeError(f"BACKEND={chosen} is none; choose cpu, cuda or rocm.")
        return chosen
    return gpu_access.backend(host)


def image(backend: str, target: str) -> str:
    """The name of an image; `target` is serve or train."""
    return f"edge-appliance:{backend}{'-train' if target == 'train' else ''}"


def place(environ: Mapping[str, str], verb: str) -> Place:
    """Raises `EnvironmentIncomplete` when the engine that was asked for cannot be used, or has no image."""
    wanted = image(backend(environ), verb)
    asked = environ.get("ENGINE")
    if asked == "none":
        return Place(engine=None, image=wanted, why="ENGINE=none")
    if asked and asked not in ENGINES:
        raise RecipeError(f"ENGINE={asked} is none; choose docker, podman or none.")
    candidates = [asked] if asked else [name for name in ENGINES if shutil.which(name)]
    reasons = []
    for engine in candidates:
        reason = _unusable(engine, wanted)
        if reason is None:
            return Place(engine=engine, image=wanted)
        reasons.append(reason)
    if asked:
        raise EnvironmentIncomplete(f"{reasons[0]}; or choose ENGINE=none, which uses .venv.")
    return Place(engine=None, image=wanted, why="; ".join(reasons) or "there is no docker or podman")


def command(verb: str, where: Place, arguments: Sequence[str], host: gpu_access.Host = gpu_access.THIS_HOST) -> list[str]:
    """What is to be executed. A recipe among the arguments of `train` is mounted with its folder, for reading."""
    if where.engine is None:
        return [str(ROOT / ".venv/bin/appliance"), COMMANDS[verb], *arguments]
    inside = list(arguments)
    mounts = [f"{folder}:/data/{name}" for name, folder in folders().items()]
    options = ["--rm", "--interactive", *(TRAINING_TMP if verb == "train" else CONFINED)]
    if verb == "train":
        options += ["--network", "none"]
        for position, argument in enumerate(arguments):
            if argument.endswith(".toml"):
                recipe = Path(argument).resolve()
                mounts.append(f"{recipe.parent}:/recipe:ro")
                inside[position] = f"/recipe/{recipe.name}"
    else:
        inside, told = _taken_out(inside, ("--host", "--port"))
        options += ["--publish", f"{told.get('--host', '127.0.0.1')}:{told.get('--port', PORT)}:{PORT}"]
        inside += ["--host", "0.0.0.0", "--port", str(PORT)]  # of the container, which publishes what was asked for
    options += ["--user", f"{os.getuid()}:{os.getgid()}", *access(where.image, host)]
    volumes = [part for mount in mounts for part in ("--volume", mount)]
    return [where.engine, "run", *options, *volumes, where.image, COMMANDS[verb], *inside]


def _taken_out(arguments: Sequence[str], names: Sequence[str]) -> tuple[list[str], dict[str, str]]:
    """The arguments without these options, written as `--name value` or `--name=value`, and their values."""
    left, told = [], {}
    waiting = iter(arguments)
    for argument in waiting:
        name, separator, value = argument.partition("=")
        if name in names:
            told[name] = value if separator else next(waiting, "")
        else:
            left.append(argument)
    return left, told


def folders() -> Mapping[str, Path]:
    """The caller's, by their names inside: models with the store, the files with the first keys, the store's key."""
    root = config.artifacts_root().resolve()
    return {"artifacts": root, "keys": root.parent / "keys", "secret": config.store_key_file().resolve().parent}


def access(image: str, host: gpu_access.Host = gpu_access.THIS_HOST) -> Sequence[str]:
    """The cards, and for AMD the numbers of the groups that own them on this host."""
    kind = image.partition(":")[2]
    if kind.startswith("cuda"):
        return ["--gpus", "all"]
    if kind.startswith("rocm"):
        numbers = gpu_access.groups(host)
        return [
            "--device",
            "/dev/kfd",
            "--device",
            "/dev/dri",
            *(part for each in numbers for part in ("--group-add", str(each))),
        ]
    return []


def detached(engine: str, kind: str, host: gpu_access.Host = gpu_access.THIS_HOST) -> str:
    """The line for a person that starts a server which stays, with the folders it needs."""
    run = command("serve", Place(engine=engine, image=image(kind, "serve")), [], host)
    staying = ["--detach" if part == "--interactive" else part for part in run if part != "--rm"]
    return f"mkdir -p {shlex.join(map(str, folders().values()))} && {shlex.join(staying)}"


def unanswering(engine: str) -> str | None:
    """Why an engine cannot be used; None when it can."""
    if shutil.which(engine) is None:
        return f"{engine} is not installed"
    asked = _asked(engine, "version")
    if asked is None:
        return f"{engine} does not answer"
    return f"{engine} does not answer (is its daemon running, and may you use it?)" if asked else None


def _unusable(engine: str, image: str) -> str | None:
    """Why; None when it can run the image."""
    if reason := unanswering(engine):
        return reason
    backend_name, _, kind = image.partition(":")[2].partition("-")
    build = f"make image-{backend_name}{' TARGET=train' if kind else ''}"
    if _asked(engine, "image", "inspect", image) != 0:
        return f"{engine} has no image {image}; `{build}` makes it"
    return None


def _asked(engine: str, *question: str) -> int | None:
    """The exit status; None where it takes too long."""
    try:
        return subprocess.run([engine, *question], capture_output=True, timeout=QUESTION_SECONDS).returncode
    except subprocess.TimeoutExpired:
        return None


def main(arguments: Sequence[str]) -> int:
    verb, rest = arguments[0], arguments[1:]
    try:
        where = place(os.environ, verb)
    except ApplianceError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code
    chosen = command(verb, where, rest)
    if where.engine is None:
        print(f"in .venv: {where.why}", file=sys.stderr)
        setup = subprocess.run([sys.executable, "-m", "appliance.setup"], cwd=ROOT)
        if setup.returncode:
            return setup.returncode
    else:
        for folder in folders().values():
            folder.mkdir(parents=True, exist_ok=True)
    print(shlex.join(chosen), file=sys.stderr, flush=True)
    os.execvp(chosen[0], chosen)
    raise AssertionError  # an exec does not return


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
