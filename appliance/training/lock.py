"""`run.lock.json`: everything a run came from, resolved, so that it can be repeated. Main entries: `describe`, `read`.

It holds no time and no figure that was measured: a run that is repeated on the same machine writes the same file.
"""

import hashlib
import importlib.metadata
import itertools
import json
import platform
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import appliance
from appliance import __version__, artifacts, config, device
from appliance import recipe as recipes
from appliance.artifacts import Plan
from appliance.errors import ArtifactError, DataError, several
from appliance.recipe import STARTER, Recipe
from appliance.training import processes
from appliance.training.rewards import registry

LOCK = "run.lock.json"
SCHEMA = 1
OF_A_MODEL = (".safetensors", ".json", ".jinja", ".model", ".txt")  # not the curve beside a starter, which holds times
WEIGHTS = "adapter_model.safetensors"
REQUIRED = {"phase", "artifact", "digest", "parents", "recipe", "data", "base", "versions", "code_sha256", "weights_sha256"}
# Packages whose version can change what is computed; of the others the lock only keeps it.
COMPUTING = (
    "torch",
    "transformers",
    "tokenizers",
    "trl",
    "peft",
    "accelerate",
    "datasets",
    "bitsandbytes",
    "numpy",
    "safetensors",
)


@dataclass(frozen=True, slots=True)
class Lock:
    """A lock file as it was written; `recipe` is what it resolves to, with what was changed on the command line."""

    path: Path
    written: Mapping[str, Any]
    recipe: Recipe

    @property
    def phases(self) -> list[str]:
        """The phases up to the one that was locked."""
        phases = self.recipe.phases
        done = [*phases[: phases.index(self.written["phase"]) + 1]]
        return [*(["base"] if self.recipe.base == STARTER else []), *done]


def describe(recipe: Recipe, identity: Plan, phase: str, folder: Path, dataset: Path, base: Path) -> dict[str, Any]:
    """What the lock file of an adapter says; `folder` holds its weights already.

    GRPO has `rewards`, with encoders and functions by content, and `adapter`, the sha256 of one that the recipe names.
    """
    judged: dict[str, Any] = {"rewards": registry.identities(recipe)} if phase == "grpo" else {}
    continued = recipe.grpo.adapter if phase == "grpo" else None
    if continued is not None:
        judged["adapter"] = artifacts.digest_file(continued / WEIGHTS)
    return {
        "schema": SCHEMA,
        "phase": phase,
        "artifact": f"{identity.kind}/{identity.name}-{identity.digest[:12]}",
        "digest": identity.digest,
        "parents": list(identity.parents),
        "recipe": config.plain(recipe),
        "data": artifacts.load(dataset).manifest["inputs"]["files"],
        "base": {"name": recipe.base, "files": base_files(base)},
        **judged,
        "weights_sha256": artifacts.digest_file(folder / WEIGHTS),
        "code_sha256": code_digest(),
        "versions": versions(),
        "machine": machine(),
    }


def write(folder: Path, contents: Mapping[str, Any]) -> None:
    text = json.dumps(contents, indent=2, ensure_ascii=False, sort_keys=True) + "\n"
    (folder / LOCK).write_text(text, encoding="utf-8")


def read(path: Path, sets: Sequence[str]) -> Lock:
    """A lock file, or that of an adapter's folder; raises `ArtifactError` for what is none, `RecipeError` for bad `sets`."""
    file = path / LOCK if path.is_dir() else path
    try:
        written = json.loads(file.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ArtifactError(f"{file} does not exist; an adapter's folder has one, as {LOCK}.") from None
    except ValueError as error:
        raise ArtifactError(f"{file} is not valid JSON: {error}.") from error
    if not isinstance(written, dict) or written.get("schema") != SCHEMA or not written.keys() >= REQUIRED:
        raise ArtifactError(f"{file} is no lock file of schema {SCHEMA}; take the {LOCK} of an adapter's folder.")
    return Lock(file, written, recipes.from_resolved(written["recipe"], sets, str(file)))


def require_inputs(lock: Lock, base: Path | None) -> None:
    """Raises `DataError` where data, base, rewards or adapter are other than was locked; `base` is None for the starter."""
    problems = []
    for name, expected in lock.written["data"].items():
        path = getattr(lock.recipe.data, name)
        if path is None or not path.is_file():
            problems.append(f"{path} does not exist; name the file with --set data.{name}=FILE")
        elif (actual := artifacts.digest_file(path)) != expected:
            digests = f"sha256 {actual[:12]}…, locked {expected[:12]}…"
            problems.append(f"{path} is another: {digests}; name the file with --set data.{name}=FILE")
    if base is not None:
        found = base_files(base)
        changed = [name for name, sha256 in lock.written["base"]["files"].items() if found.get(name) != sha256]
        problems += [f"{base / name} is another than the base that was locked" for name in changed]
    if problems := [*problems, *_other_rewards(lock), *_other_adapter(lock)]:
        raise DataError(several(problems, f"{lock.path} cannot be repeated"))


def _other_rewards(lock: Lock) -> list[str]:
    """Encoders and functions that changed; a weight or another setting is changed on purpose, with --set."""
    then = lock.written.get("rewards", {})
    now = registry.identities(lock.recipe) if then else {}
    return [
        f"grpo.rewards.{name} has {key} {now.get(name, {}).get(key, 'none')}, locked {entries[key]}"
        for name, entries in then.items()
        for key in ("encoder", "function")
        if key in entries and now.get(name, {}).get(key) != entries[key]
    ]


def _other_adapter(lock: Lock) -> list[str]:
    expected, folder = lock.written.get("adapter"), lock.recipe.grpo.adapter
    if expected is None or folder is None:
        return []
    if not (folder / WEIGHTS).is_file():
        return [f"{folder} is no adapter; name the folder with --set grpo.adapter=FOLDER"]
    actual = artifacts.digest_file(folder / WEIGHTS)
    if actual == expected:
        return []
    digests = f"sha256 {actual[:12]}…, locked {expected[:12]}…"
    return [f"{folder} is another: {digests}; name the folder with --set grpo.adapter=FOLDER"]


def differences(lock: Lock, identity: Plan) -> list[str]:
    """What here may compute something else than was locked, in words; `identity` is what would be made here."""
    now, then = versions(), lock.written["versions"]
    said = [f"{name} {now.get(name)} (locked {then.get(name)})" for name in COMPUTING if now.get(name) != then.get(name)]
    if code_digest() != lock.written["code_sha256"]:
        said.append(f"the appliance's code {__version__} (locked {then.get('edge-appliance')})")
    if identity.digest != lock.written["digest"]:
        parents = ", ".join(f"{new} (locked {old})" for new, old in _pairs(identity, lock) if new != old)
        said.append(f"what is trained: {f'from {parents}' if parents else 'its settings, or the revision of its phase'}")
    here, there = machine(), lock.written["machine"]
    return said + [f"{key} {here[key]} (locked {there.get(key)})" for key in here if here[key] != there.get(key)]


def _pairs(identity: Plan, lock: Lock) -> Iterator[tuple[str | None, str | None]]:
    return itertools.zip_longest(identity.parents, lock.written["parents"])


def base_files(base: Path) -> dict[str, str]:
    """The sha256 of each file of a base model: those of its manifest, where it has one."""
    if (base / artifacts.MANIFEST).is_file():
        files = artifacts.load(base).manifest["files"].items()
        return {name: entry["sha256"] for name, entry in files if Path(name).suffix in OF_A_MODEL}
    wanted = [file for file in sorted(base.iterdir()) if file.suffix in OF_A_MODEL]
    return {file.name: artifacts.digest_file(file) for file in wanted if file.is_file()}


def versions() -> dict[str, str]:
    """Of everything installed; `edge-appliance` is this code's, however it came here."""
    found = {each.metadata["Name"]: each.version for each in importlib.metadata.distributions() if each.metadata["Name"]}
    return {**found, "edge-appliance": __version__, "python": platform.python_version()}


def code_digest() -> str:
    """sha256 over the appliance's own source files: an image has no commit, and a checkout may have changes."""
    root = Path(appliance.__file__).parent
    digest = hashlib.sha256()
    for file in sorted(root.rglob("*.py")):
        digest.update(file.relative_to(root).as_posix().encode() + b"\0" + file.read_bytes() + b"\0")
    return digest.hexdigest()


def machine() -> dict[str, Any]:
    """What the last bits of a result depend on beside the code: kind of processor or card, threads, processes."""
    import torch

    from appliance.training import model as models

    name = torch.cuda.get_device_name() if models.has_gpu() else "cpu"
    threads = max(1, device.usable_cores() // processes.local_count())
    return {"device": name, "architecture": platform.machine(), "threads": threads, "processes": processes.count()}
