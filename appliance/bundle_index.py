"""What a bundle says of itself: `of` and `to_bytes` write it, `parse` reads what may have been tampered with."""

import dataclasses
import json
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from appliance import artifacts
from appliance.artifacts import Artifact
from appliance.errors import ArtifactError, VerificationFailed

SCHEMA = 1
FORMAT = "edge-appliance bundle"
SHA256 = re.compile(r"[0-9a-f]{64}")
MODEL_ID = re.compile(r"gguf/[A-Za-z0-9][A-Za-z0-9._-]*-[0-9a-f]{12}")
REPORT_ID = re.compile(r"report/[A-Za-z0-9][A-Za-z0-9._-]*-[0-9a-f]{12}")
FILE_PART = re.compile(r"(?!\.{1,2}$)[^/\\\x00-\x1f]+")
# Serving settings that are about a machine, and stay there; the first ones name files.
FILE_SETTINGS = ("models", "adapters", "document_folder")
MACHINE_SETTINGS = (
    *FILE_SETTINGS,
    *("host", "port", "allowed_hosts", "requests_per_minute"),
    *("threads", "prefill_threads", "gpu_layers", "kv_type", "mmap", "repack", "memory_mib", "snapshot_mib"),
)


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Member:
    """A file of an artifact; its name in the bundle is `<artifact id>/<file>`."""

    artifact_id: str
    file: str
    sha256: str
    size_bytes: int

    @property
    def name(self) -> str:
        return f"{self.artifact_id}/{self.file}"


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Index:
    """`model` and `report` are artifact ids, `serve` those serving settings of the model's recipe that go with it."""

    model: str
    report: str
    serve: Mapping[str, Any]
    members: Sequence[Member]

    @property
    def size_bytes(self) -> int:
        return sum(member.size_bytes for member in self.members)

    def members_of(self, artifact_id: str) -> Sequence[Member]:
        return [member for member in self.members if member.artifact_id == artifact_id]


def of(model: Artifact, report: Artifact, settings: Mapping[str, Any]) -> Index:
    serve = {name: value for name, value in settings.items() if name not in MACHINE_SETTINGS}
    return Index(model=model.id, report=report.id, serve=serve, members=[*_members(model), *_members(report)])


def to_bytes(index: Index) -> bytes:
    """The same for the same index."""
    files: dict[str, dict[str, Any]] = {}
    for member in index.members:
        entry = {"sha256": member.sha256, "size_bytes": member.size_bytes}
        files.setdefault(member.artifact_id, {})[member.file] = entry
    plain = {
        "format": FORMAT,
        "schema": SCHEMA,
        "model": index.model,
        "report": index.report,
        "serve": index.serve,
        "artifacts": files,
    }
    return json.dumps(plain, indent=1, ensure_ascii=False).encode() + b"\n"


def parse(content: bytes, path: Path) -> Index:
    """Raises `ArtifactError` naming `path` for what this version does not know or nobody could have exported."""
    try:
        plain = json.loads(content)
        if plain["format"] != FORMAT or plain["schema"] != SCHEMA:
            raise ArtifactError(f"{path} is a bundle of schema {plain['schema']!r}, this version reads {SCHEMA}; update it.")
        members = list(_parse_members(plain["artifacts"]))
        index = Index(model=plain["model"], report=plain["report"], serve=plain["serve"], members=members)
        _require_sound(index, list(plain["artifacts"]))
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise ArtifactError(f"{path}: its index is damaged ({error!r}); copy or export it again.") from error
    return index


def require_same(present: Artifact, members: Sequence[Member], artifact_id: str | None = None) -> None:
    """Raises `ArtifactError` unless the artifact has just these files; what made it, and when, may differ.

    One that was taken in just now must also be the one that `artifact_id` names.
    """
    manifest = present.manifest
    expected = {member.file: member.sha256 for member in members if member.file != artifacts.MANIFEST}
    if {name: entry["sha256"] for name, entry in manifest["files"].items()} != expected:
        raise ArtifactError(
            f"{present.path} has other files than the bundle says; `appliance models remove` it if the bundle's is wanted."
        )
    if artifact_id is not None and f"{manifest['kind']}/{manifest['name']}-{manifest['digest'][:12]}" != artifact_id:
        raise VerificationFailed(f"The bundle calls an artifact {artifact_id} whose manifest names another.")


def _members(artifact: Artifact) -> Iterator[Member]:
    """The manifest comes last, as it does where the artifact is made."""
    for file, entry in sorted(artifact.manifest["files"].items()):
        yield Member(artifact_id=artifact.id, file=file, sha256=entry["sha256"], size_bytes=entry["size_bytes"])
    manifest = artifact.path / artifacts.MANIFEST
    size = manifest.stat().st_size
    yield Member(artifact_id=artifact.id, file=manifest.name, sha256=artifacts.digest_file(manifest), size_bytes=size)


def _parse_members(files: Mapping[str, Mapping[str, Any]]) -> Iterator[Member]:
    for artifact_id, entries in files.items():
        for file, entry in entries.items():
            sha256, size = entry["sha256"], entry["size_bytes"]
            if not SHA256.fullmatch(sha256) or type(size) is not int or size < 0:
                raise ValueError(f"{file}: {entry}")
            if not all(FILE_PART.fullmatch(part) for part in file.split("/")):
                raise ValueError(f"the file name {file!r}")
            yield Member(artifact_id=artifact_id, file=file, sha256=sha256, size_bytes=size)


def _require_sound(index: Index, named: Sequence[str]) -> None:
    """Raises `ValueError`."""
    if not MODEL_ID.fullmatch(index.model) or not REPORT_ID.fullmatch(index.report):
        raise ValueError(f"the artifacts {index.model!r} and {index.report!r}")
    if named != [index.model, index.report]:
        raise ValueError(f"files of {named}")
    for artifact_id in named:
        if artifacts.MANIFEST not in [member.file for member in index.members_of(artifact_id)]:
            raise ValueError(f"no manifest in {artifact_id}")
    if not isinstance(index.serve, dict) or not index.serve.keys().isdisjoint(MACHINE_SETTINGS):
        raise ValueError(f"the serving settings {index.serve!r}")
