"""`make serve` and `make train`: in a container where there is an engine and an image, else in `.venv`; always says which.

    python3 -m appliance.containers serve|train [ARGUMENTS]

ENGINE=docker|podman|none and BACKEND=cpu|cuda|rocm choose; otherwise both are detected. The container gets the caller's user
and what `container_files.py` says, and nothing else. Only the standard library: it runs before anything is installed.
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

from appliance import config, container_files, device, gpu_access, store_key
from appliance.errors import ApplianceError, EnvironmentIncomplete, RecipeError

ROOT = Path(__file__).resolve().parents[1]
ENGINES = ("docker", "podman")
CONFINED = ("--read-only", "--tmpfs", "/tmp:size=64m", "--cap-drop", "ALL", "--security-opt", "no-new-privileges")
TRAINING_TMP = ("--read-only", "--tmpfs", "/tmp:size=2g,exec", "--cap-drop", "ALL", "--security-opt", "no-new-privileges")
LOOPBACK, PORT = "127.0.0.1", 8080
# SELinux keeps a container from its caller's files. Their labels could be changed (`:z`), which lasts, and for a home or
# what else others use breaks them; so this container goes without labels.
UNLABELLED = ("--security-opt", "label=disable")
COMMANDS = {"train": "run", "serve": "serve"}  # training ends in a model that can be served: converted, verified, promoted
PREPARE = "prepare"
MODES = {"keys": 0o755, "home": 0o700}  # Prometheus' user reads a key of his own
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


def place(environ: Mapping[str, str], verb: str, host: gpu_access.Host = gpu_access.THIS_HOST) -> Place:
    """Raises `EnvironmentIncomplete` when the engine that was asked for cannot be used, or has no image."""
    wanted = image(backend(environ, host), verb)
    asked = environ.get("ENGINE")
    if asked == "none":
        return Place(engine=None, image=wanted, why="ENGINE=none")
    if asked and asked not in ENGINES:
        raise RecipeError(f"ENGINE={asked} is none; choose docker, podman or none.")
    candidates = [_own_name(asked)] if asked else installed()
    reasons = []
    for engine in candidates:
        reason = _unusable(engine, wanted, host)
        if reason is None:
            return Place(engine=engine, image=wanted)
        reasons.append(reason)
    if asked:
        raise EnvironmentIncomplete(f"{reasons[0]}; or choose ENGINE=none, which uses .venv.")
    return Place(engine=None, image=wanted, why="; ".join(reasons) or "there is no docker or podman")


def installed() -> Sequence[str]:
    """The engines that are here, by their own names."""
    return list(dict.fromkeys(_own_name(name) for name in ENGINES if shutil.which(name)))


def _own_name(engine: str) -> str:
    """`podman` where Debian's podman-docker calls it docker: it wants to be told of cards and users in its own way."""
    if engine != "docker" or not shutil.which(engine) or not shutil.which("podman"):
        return engine
    try:
        answer = subprocess.run([engine, "--version"], capture_output=True, text=True, timeout=QUESTION_SECONDS)
    except subprocess.TimeoutExpired:
        return engine
    return "podman" if "podman" in answer.stdout.lower() else engine


def command(verb: str, where: Place, arguments: Sequence[str], host: gpu_access.Host = gpu_access.THIS_HOST) -> list[str]:
    """What is to be executed. Files that arguments name are mounted for reading, a recipe with its folder.

    Raises `RecipeError` for what should not or cannot be brought in.
    """
    if where.engine is None:
        return [str(ROOT / ".venv/bin/appliance"), COMMANDS[verb], *arguments]
    options = ["--rm", "--interactive", *(TRAINING_TMP if verb == "train" else CONFINED)]
    if device.read_number(host.sys / "fs/selinux/enforce") == 1:
        options += UNLABELLED
    after: list[str] = []
    if verb == "train":
        options += ["--network", "none"]
    else:
        arguments, told = _taken_out(arguments, ("--host", "--port"))
        address = _address(told.get("--host") or os.environ.get("APPLIANCE_SERVE_HOST") or LOOPBACK)
        options += ["--publish", f"{address}:{told.get('--port') or os.environ.get('APPLIANCE_SERVE_PORT') or PORT}:{PORT}"]
        after = ["--host", "0.0.0.0", "--port", str(PORT)]  # of the container, which publishes what was asked for
    files = container_files.CallersFiles(verb)
    inside = [*map(files.word, arguments), *after]
    files.pass_on(os.environ)
    rootless = is_rootless(where.engine)
    options += ["--user", f"{os.getuid()}:{os.getgid()}", *(["--userns", "keep-id"] if rootless else [])]
    options += [*access(where.engine, where.image, host, rootless=rootless), *files.options()]
    return [where.engine, "run", *options, where.image, COMMANDS[verb], *inside]


def _address(host: str) -> str:
    """As `--publish` wants it: numbers, and those of IPv6 in brackets."""
    if host == "localhost":
        return LOOPBACK
    return f"[{host}]" if ":" in host and not host.startswith("[") else host


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


def is_rootless(engine: str) -> bool:
    """Podman as an ordinary user, who would be another one inside without `keep-id`; docker's daemon is root's."""
    return engine == "podman" and os.getuid() != 0


def access(engine: str, image: str, host: gpu_access.Host, *, rootless: bool) -> Sequence[str]:
    """The cards, and for AMD the groups that own them on this host: by number, or where rootless as the caller's own."""
    kind = image.partition(":")[2]
    if kind.startswith("cuda"):
        return gpu_access.NVIDIA_IN_PODMAN if engine == "podman" else gpu_access.NVIDIA_IN_DOCKER
    if kind.startswith("rocm"):
        numbers = ["keep-groups"] if rootless else gpu_access.groups(host)
        return [
            "--device",
            "/dev/kfd",
            "--device",
            "/dev/dri",
            *(part for each in numbers for part in ("--group-add", str(each))),
        ]
    return []


def detached(engine: str, kind: str, host: gpu_access.Host = gpu_access.THIS_HOST) -> str:
    """The line for a person that starts a server which stays, with what it needs of the caller's made before."""
    run = command("serve", Place(engine=engine, image=image(kind, "serve")), [], host)
    staying = ["--detach" if part == "--interactive" else part for part in run if part != "--rm"]
    before = [["cd", str(Path.cwd())], [sys.executable, "-m", "appliance.containers", PREPARE]]
    return " && ".join(map(shlex.join, (*before, staying)))


def with_volume(host: gpu_access.Host, compiled: str | None) -> str:
    """The same for whoever is inside a container and does not see the host's folders: with a volume of the engine's."""
    engine = "podman" if host.is_podman else "docker"
    kind = "cpu" if compiled is None else "rocm" if "gfx" in compiled else "cuda"
    tag = image(kind, "serve")
    options = ["--detach", *CONFINED, "--publish", f"127.0.0.1:{PORT}:{PORT}", "--volume", "appliance:/data"]
    cards = access(engine, tag, host, rootless=gpu_access.UNMAPPED_GROUP in gpu_access.groups(host))
    return shlex.join([engine, "run", *options, *cards, tag])


def prepare(verb: str) -> None:
    """Makes what the container gets of the caller's, which an engine would make as root's.

    Raises as `store_key.create`, and `EnvironmentIncomplete` where it cannot be written.
    """
    try:
        for name, folder in container_files.folders(verb).items():
            if not folder.exists():
                folder.mkdir(parents=True)
                if name in MODES:
                    folder.chmod(MODES[name])  # whatever the umask
        if verb == "serve":
            store_key.create(config.store_key_file(), config.store_file())
    except OSError as error:
        raise EnvironmentIncomplete(
            f"{error.filename} cannot be made by user {os.getuid()} ({error.strerror}), and the container is to use it; "
            "name folders that he may write with APPLIANCE_ARTIFACTS, APPLIANCE_CACHE, APPLIANCE_LEASES and "
            "APPLIANCE_KEY_FILE."
        ) from error


def unanswering(engine: str) -> str | None:
    """Why an engine cannot be used; None when it can."""
    if shutil.which(engine) is None:
        return f"{engine} is not installed"
    asked = _asked(engine, "version")
    if asked is None:
        return f"{engine} does not answer"
    return f"{engine} does not answer (is its daemon running, and may you use it?)" if asked else None


def _unusable(engine: str, image: str, host: gpu_access.Host) -> str | None:
    """Why; None when it can run the image."""
    if reason := unanswering(engine):
        return reason
    backend_name, _, kind = image.partition(":")[2].partition("-")
    build = f"make image-{backend_name}{' TARGET=train' if kind else ''}"
    if _asked(engine, "image", "inspect", image) != 0:
        return f"{engine} has no image {image}; `{build}` makes it"
    if engine == "podman" and backend_name == "cuda" and (problem := gpu_access.podman_problem(host)):
        return str(problem).rstrip(".")
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
        if verb == PREPARE:
            prepare("serve")
            return 0
        where = place(os.environ, verb)
        chosen = command(verb, where, rest)
        if where.engine is not None:
            prepare(verb)
    except ApplianceError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code
    if where.engine is None:
        print(f"in .venv: {where.why}", file=sys.stderr)
        setup = subprocess.run([sys.executable, "-m", "appliance.setup"], cwd=ROOT)
        if setup.returncode:
            return setup.returncode
    print(shlex.join(chosen), file=sys.stderr, flush=True)
    if where.engine is not None and verb == "serve":
        folder = container_files.folders(verb)["keys"]
        said = f"The first start makes API keys. /data/keys in there is {folder} here: `make chat` finds {folder}/chat.key"
        print(said, file=sys.stderr, flush=True)
    os.execvp(chosen[0], chosen)
    raise AssertionError  # an exec does not return


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
