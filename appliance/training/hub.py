"""Downloads a model from the Hugging Face hub into a `base` artifact: checked disk, resumed files, verified hashes.

Only configuration, tokenizer and safetensors files are fetched: other weight formats can carry code. The only file that
imports huggingface_hub, and translates its errors. A gated model needs `HF_TOKEN`, read by that library.
"""

import fnmatch
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from appliance import artifacts
from appliance.artifacts import Artifact, Plan
from appliance.console import Progress
from appliance.errors import EnvironmentIncomplete, ModelFileError, RecipeError

WANTED = ("*.safetensors", "*.json", "*.jinja", "*.txt", "tokenizer.model", "LICENSE*", "README.md", "1_Pooling/*.json")
SPARE_BYTES = 100_000_000


@dataclass(frozen=True, slots=True)
class HubFile:
    """One file of a repository; `sha256` is known for large files only."""

    name: str
    size_bytes: int
    sha256: str | None


@dataclass(frozen=True, slots=True)
class HubModel:
    """A repository at one commit."""

    id: str
    asked_revision: str
    revision: str
    files: tuple[HubFile, ...]

    @property
    def size_bytes(self) -> int:
        return sum(file.size_bytes for file in self.files)


def resolve(name: str) -> HubModel:
    """Asks the hub what `id[@revision]` is; raises `RecipeError`, `EnvironmentIncomplete` or `ModelFileError`."""
    from huggingface_hub import HfApi
    from huggingface_hub.errors import HFValidationError

    identifier, _, revision = name.partition("@")
    try:
        info = _translated(lambda: HfApi().model_info(identifier, revision=revision or None, files_metadata=True), name)
    except HFValidationError as error:
        raise RecipeError(f"{name!r} is no Hugging Face id like organisation/model: {error}") from error
    files = tuple(
        HubFile(each.rfilename, each.size or 0, each.lfs.sha256 if each.lfs else None)
        for each in info.siblings or []
        if any(_matches(each.rfilename, pattern) for pattern in WANTED)
    )
    if not any(file.name.endswith(".safetensors") for file in files):
        raise ModelFileError(f"{name} offers no .safetensors weights; other formats can run code and are not fetched.")
    return HubModel(identifier, revision, str(info.sha), files)


def _matches(name: str, pattern: str) -> bool:
    """Each part by itself: `*.json` names no file of a subfolder."""
    parts, patterns = name.split("/"), pattern.split("/")
    return len(parts) == len(patterns) and all(map(fnmatch.fnmatch, parts, patterns))


def plan(model: HubModel) -> Plan:
    inputs = {"id": model.id, "revision": model.revision, "asked_revision": model.asked_revision}
    return Plan(kind="base", name=model.id.replace("/", "--"), inputs=inputs)


def fetch(model: HubModel, identity: Plan, root: Path) -> Artifact:
    """Downloads every file; an interrupted download continues where it stopped."""
    partial = identity.partial(root)
    have = sum(file.stat().st_size for file in partial.rglob("*") if file.is_file()) if partial.exists() else 0
    artifacts.require_space(root, max(0, model.size_bytes - have) + SPARE_BYTES, f"Pulling {model.id}")
    with artifacts.create(identity, root, keep_partial=True, is_resumable=True) as draft:
        progress = Progress("pull", len(model.files))
        for position, file in enumerate(model.files, 1):
            _fetch_file(model, file, draft.path)
            progress.update(position, file.name)
        _clear_download_state(draft.path)
        draft.results.update(size_bytes=model.size_bytes)
    return artifacts.load(identity.location(root))


def _fetch_file(model: HubModel, file: HubFile, folder: Path) -> None:
    from huggingface_hub import hf_hub_download

    path = folder / file.name
    if not (path.is_file() and path.stat().st_size == file.size_bytes):
        _translated(
            lambda: hf_hub_download(model.id, file.name, revision=model.revision, local_dir=folder),
            model.id,
        )
    if file.sha256 is not None and (found := artifacts.digest_file(path)) != file.sha256:
        path.unlink()
        raise ModelFileError(f"{file.name} of {model.id} arrived damaged (sha256 {found[:12]}…); pull it again.")


def _clear_download_state(folder: Path) -> None:
    import shutil

    shutil.rmtree(folder / ".cache", ignore_errors=True)


def _translated(call: Any, name: str) -> Any:
    from httpx2 import HTTPError
    from huggingface_hub.errors import (
        GatedRepoError,
        OfflineModeIsEnabled,
        RepositoryNotFoundError,
        RevisionNotFoundError,
    )

    reasons: Mapping[type[Exception], str] = {
        GatedRepoError: "its owner wants terms accepted first: do so on its page, then set HF_TOKEN to your token",
        RepositoryNotFoundError: "there is no such model, or it is private and HF_TOKEN is not set",
        RevisionNotFoundError: "it has no such revision",
        OfflineModeIsEnabled: "HF_HUB_OFFLINE is set; unset it to download",
    }
    try:
        return call()
    except tuple(reasons) as error:
        reason = next(text for kind, text in reasons.items() if isinstance(error, kind))
        raise EnvironmentIncomplete(f"{name} cannot be pulled: {reason}.") from error
    except (HTTPError, ConnectionError) as error:
        raise EnvironmentIncomplete(f"{name} cannot be pulled, the hub cannot be reached: {error}") from error
