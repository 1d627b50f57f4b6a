"""Which model to serve: a .gguf file, an artifact's folder or name, or the promoted one. Loads nothing."""

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from appliance import artifacts, promotion
from appliance.artifacts import Artifact
from appliance.errors import ArtifactError, ModelFileError

SUFFIX = ".gguf"


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class ServedModel:
    """A model file with the name clients know it by; `serve` holds the serving settings its recipe asked for."""

    name: str
    path: Path
    sha256: str
    serve: Mapping[str, Any]
    is_foreign: bool  # no manifest: nothing says where it came from


def find(model: str | None, root: Path) -> ServedModel:
    """The model named on the command line, or the promoted one of `root`. Every file's sha256 is checked.

    Raises `ArtifactError`, or `ModelFileError` for a file that is missing.
    """
    if model is None:
        promoted = promotion.current(root)
        if promoted is None:
            raise ArtifactError(
                f"No model is promoted in {root}; make one with `appliance run RECIPE`, or name one with --model."
            )
        return _from_artifact(promoted, promotion.serve_settings(promoted, root))
    path = Path(model)
    if path.is_dir():
        return _from_artifact(artifacts.load(path.resolve()))
    if path.suffix == SUFFIX or path.is_file():
        return _from_file(path)
    return _from_artifact(_named(model, root))


def _named(name: str, root: Path) -> Artifact:
    """The artifact `name` or `name-digest`; the newest when several share the name."""
    manifests = sorted((root / "gguf").glob(f"*/{artifacts.MANIFEST}"))
    known = [artifacts.load(manifest.parent) for manifest in manifests]
    fitting = [each for each in known if name in (each.manifest["name"], each.path.name)]
    if not fitting:
        names = ", ".join(sorted({each.manifest["name"] for each in known})) or "none"
        raise ArtifactError(f"No model {name!r} in {root / 'gguf'}; there: {names}. A file's name ends in {SUFFIX}.")
    return max(fitting, key=lambda each: str(each.manifest["made_at"]))


def _from_artifact(artifact: Artifact, serve: Mapping[str, Any] | None = None) -> ServedModel:
    files = sorted(name for name in artifact.manifest["files"] if name.endswith(SUFFIX))
    if len(files) != 1:
        raise ArtifactError(f"{artifact.path} holds {len(files)} {SUFFIX} files; a served artifact holds one.")
    artifacts.check_files(artifact)
    return ServedModel(
        name=artifact.manifest["name"],
        path=artifact.path / files[0],
        sha256=artifact.manifest["files"][files[0]]["sha256"],
        serve=serve or {},
        is_foreign=False,
    )


def _from_file(path: Path) -> ServedModel:
    if (path.parent / artifacts.MANIFEST).is_file():
        artifact = artifacts.load(path.parent)
        if path.name in artifact.manifest["files"]:
            return _from_artifact(artifact)
    if not path.is_file():
        raise ModelFileError(f"{path} does not exist; `appliance models list` shows what there is.")
    return ServedModel(name=path.stem, path=path, sha256=artifacts.digest_file(path), serve={}, is_foreign=True)
