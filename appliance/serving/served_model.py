"""Which models to serve: a .gguf file, an artifact's folder or name, or the promoted one, with adapters. Loads nothing.

Whatever is wrong with a file is found here as far as its header and its sha256 tell.
"""

import dataclasses
import re
from collections.abc import Mapping, Sequence
from datetime import datetime
from pathlib import Path
from typing import Any

from appliance import artifacts, promotion
from appliance.artifacts import Artifact
from appliance.errors import ArtifactError, ModelFileError, RecipeError
from appliance.serving import gguf_file
from appliance.serving.digests import Digests
from appliance.serving.events import ModelKind
from appliance.serving.gguf_file import GgufHeader

SUFFIX = ".gguf"
ADAPTER_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class ServedModel:
    """A model file with the name clients know it by; `serve` holds the serving settings its recipe asked for.

    `proven_reread_tokens` is what a proof allows: see `promotion.proven_reread_tokens`.
    """

    name: str
    path: Path
    sha256: str
    made_at: int  # seconds since the epoch
    header: GgufHeader
    serve: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    proven_reread_tokens: int | None = None
    is_foreign: bool  # no manifest: nothing says where it came from
    adapters: Mapping[str, Path] = dataclasses.field(default_factory=dict)

    @property
    def foreign_adapters(self) -> Sequence[Path]:
        return [path for path in self.adapters.values() if not (path.parent / artifacts.MANIFEST).is_file()]

    @property
    def kind(self) -> ModelKind:
        pooling = self.header.pooling_type
        if pooling == "rank":
            return "rerank"
        is_causal = self.header.values.get(f"{self.header.architecture}.attention.causal") is not False
        return "chat" if is_causal and pooling in (None, "none") else "embedding"


def find(model: str | None, root: Path, digests: Digests | None = None) -> ServedModel:
    """The model named on the command line, or the promoted one of `root`. Every file's sha256 is checked.

    Raises `ArtifactError`, or `ModelFileError` for a file that is missing or no model.
    """
    digests = digests or Digests(root, is_trusted=False)
    if model is None:
        promoted = promotion.current(root)
        if promoted is None:
            raise ArtifactError(
                f"No model is promoted in {root}; make one with `appliance run RECIPE`, or name one with --model."
            )
        return _from_artifact(promoted, root, digests, promotion.serve_settings(promoted, root))
    path = Path(model)
    if path.is_dir():
        return _from_artifact(artifacts.load(path.resolve()), root, digests)
    if path.suffix == SUFFIX or path.is_file():
        return _from_file(path, root, digests)
    return _from_artifact(_named(model, root), root, digests)


def promotion_mark(root: Path) -> tuple[int, ...] | None:
    """Something that changes with each promotion; None when nothing is promoted."""
    try:
        status = (root / promotion.CURRENT).lstat()
    except OSError:
        return None
    return (status.st_dev, status.st_ino, status.st_mtime_ns)


def with_adapters(model: ServedModel, named: Sequence[str]) -> ServedModel:
    """`model` with the LoRA adapters of `name=file.gguf` entries, each of which is checked.

    Raises `RecipeError` for what is written wrongly, `ModelFileError` for a file that is no adapter of this model.
    """
    adapters: dict[str, Path] = {}
    for entry in named:
        name, separator, file = entry.partition("=")
        if not separator or not file or not ADAPTER_NAME.fullmatch(name):
            raise RecipeError(
                f"serve.adapters: {entry!r} must read name=file{SUFFIX}; a name has letters, digits, '.', '_' and '-'."
            )
        if name in adapters:
            raise RecipeError(f"serve.adapters: {name!r} is named twice; give each adapter a name of its own.")
        adapters[name] = Path(file).absolute()
        header = gguf_file.read_metadata(Path(file))
        artifacts.check_input(Path(file))
        if not header.is_adapter:
            raise ModelFileError(
                f"{file} is no LoRA adapter but a {header.kind}; make one with `appliance convert adapter`."
            )
        if header.architecture != model.header.architecture:
            raise ModelFileError(
                f"{file} is an adapter for {header.architecture}, and {model.path} is {model.header.architecture}; "
                "name an adapter that was trained on this model."
            )
    return dataclasses.replace(model, adapters=adapters)


def _named(name: str, root: Path) -> Artifact:
    """The artifact `name` or `name-digest`; the newest when several share the name."""
    manifests = sorted((root / "gguf").glob(f"*/{artifacts.MANIFEST}"))
    known = [artifacts.load(manifest.parent) for manifest in manifests]
    fitting = [each for each in known if name in (each.manifest["name"], each.path.name)]
    if not fitting:
        names = ", ".join(sorted({each.manifest["name"] for each in known})) or "none"
        raise ArtifactError(f"No model {name!r} in {root / 'gguf'}; there: {names}. A file's name ends in {SUFFIX}.")
    return max(fitting, key=lambda each: str(each.manifest["made_at"]))


def _from_artifact(artifact: Artifact, root: Path, digests: Digests, serve: Mapping[str, Any] | None = None) -> ServedModel:
    files = sorted(name for name in artifact.manifest["files"] if name.endswith(SUFFIX))
    if len(files) != 1:
        raise ArtifactError(f"{artifact.path} holds {len(files)} {SUFFIX} files; a served artifact holds one.")
    path = artifact.path / files[0]
    header = gguf_file.check(path)
    artifacts.check_files(artifact, digests.of)
    return ServedModel(
        name=artifact.manifest["name"],
        path=path,
        sha256=artifact.manifest["files"][files[0]]["sha256"],
        made_at=int(datetime.fromisoformat(artifact.manifest["made_at"]).timestamp()),
        header=header,
        serve=serve or {},
        proven_reread_tokens=promotion.proven_reread_tokens(artifact, root),
        is_foreign=False,
    )


def _from_file(path: Path, root: Path, digests: Digests) -> ServedModel:
    if (path.parent / artifacts.MANIFEST).is_file():
        artifact = artifacts.load(path.parent)
        if path.name in artifact.manifest["files"]:
            return _from_artifact(artifact, root, digests)
    header = gguf_file.check(path)
    return ServedModel(
        name=path.stem,
        path=path.absolute(),
        sha256=digests.of(path),
        made_at=int(path.stat().st_mtime),
        header=header,
        is_foreign=True,
    )
