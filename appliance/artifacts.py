"""Artifact directories: `artifacts/<kind>/<name>-<first 12 of digest>/` with a `manifest.json` that is written last.

An artifact's identity is the digest of its inputs, known before any work is done; that is how a step knows that it
has nothing to do. Work happens in a `.partial` directory, renamed into place once its manifest is written, so that an
existing manifest means a whole artifact. Artifacts are never changed afterwards.
"""

import contextlib
import dataclasses
import fcntl
import hashlib
import importlib.metadata
import json
import os
import re
import shutil
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from appliance import __version__
from appliance.errors import ArtifactError, EnvironmentIncomplete

SCHEMA = 1
MANIFEST = "manifest.json"
TUNED = ".tuned.json"  # behind a model's file name: its tuned settings (serving/tuning_file.py)
KINDS = ("base", "dataset", "adapter", "merged", "gguf", "encoder", "report")
PARTIAL = ".partial"
FULL_BYTES = 1 << 20  # where less is free, a disk is full
REQUIRED = {"kind", "name", "digest", "parents", "inputs", "config", "results", "files", "made_at", "seconds"}
NAME_WITH_DIGEST = re.compile(r".+-[0-9a-f]{12}")


@dataclasses.dataclass(frozen=True, slots=True)
class Artifact:
    """A whole artifact on disk."""

    path: Path
    manifest: Mapping[str, Any]

    @property
    def id(self) -> str:
        """`kind/name-digest12`, as it appears in the `parents` of others."""
        return f"{self.manifest['kind']}/{self.path.name}"

    @property
    def results(self) -> Mapping[str, Any]:
        """What the step that made it measured."""
        results: Mapping[str, Any] = self.manifest["results"]
        return results


@dataclasses.dataclass(slots=True)
class Draft:
    """An artifact being made; files go into `path`, measurements into `results`."""

    path: Path
    results: dict[str, Any] = dataclasses.field(default_factory=dict)


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """What an artifact will be: enough to say where it lies and whether it exists."""

    kind: str
    name: str
    inputs: Mapping[str, Any]
    parents: Sequence[str] = ()
    config: Mapping[str, Any] = dataclasses.field(default_factory=dict)

    @property
    def digest(self) -> str:
        """sha256 over kind, parents, inputs and resolved configuration."""
        return digest_of({"kind": self.kind, "parents": self.parents, "inputs": self.inputs, "config": self.config})

    def location(self, root: Path) -> Path:
        return root / self.kind / f"{self.name}-{self.digest[:12]}"

    def partial(self, root: Path) -> Path:
        location = self.location(root)
        return location.with_name(location.name + PARTIAL)

    def existing(self, root: Path) -> Artifact | None:
        location = self.location(root)
        return load(location) if (location / MANIFEST).exists() else None


def digest_of(value: Any) -> str:
    """sha256 of the canonical JSON form."""
    canonical = json.dumps(value, sort_keys=True, ensure_ascii=False, separators=(",", ":"), default=list)
    return hashlib.sha256(canonical.encode()).hexdigest()


def digest_file(path: Path) -> str:
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def load(path: Path) -> Artifact:
    """Reads an artifact; raises `ArtifactError` when its manifest is missing, unreadable or of another schema."""
    manifest_path = path / MANIFEST
    try:
        manifest = json.loads(manifest_path.read_text())
    except FileNotFoundError:
        raise ArtifactError(f"{path} is no artifact: it has no {MANIFEST}; make it again with its command.") from None
    except NotADirectoryError:
        raise ArtifactError(f"{path} is a file; name the artifact's folder, {path.parent}.") from None
    except (OSError, ValueError) as error:
        raise ArtifactError(f"{manifest_path} cannot be read ({error}); remove the folder and repeat.") from error
    if not isinstance(manifest, dict) or manifest.get("schema") != SCHEMA or not manifest.keys() >= REQUIRED:
        raise ArtifactError(
            f"{manifest_path} is no manifest of schema {SCHEMA}; remove {path} and repeat the step that made it."
        )
    return Artifact(path, manifest)


def identity(path: Path) -> str:
    """How another artifact names `path` as its parent: its artifact id, or for a foreign folder or file a digest of it.

    Weights of foreign folders count by size and time of change; everything else by content.
    """
    if path.name == "current" and path.is_symlink():
        path = path.resolve()
    if is_location(path):
        return f"{path.parent.name}/{path.name}"
    if not path.exists():
        raise ArtifactError(f"{path} does not exist.")
    files = sorted(path.iterdir()) if path.is_dir() else [path]
    heavy = {".safetensors", ".gguf", ".bin"}
    entries: list[list[Any]] = []
    for file in files:
        if file.is_file():
            stat = file.stat()
            mark = [stat.st_size, stat.st_mtime_ns] if file.suffix in heavy else digest_file(file)
            entries.append([file.name, mark])
    return f"{path.name}@{digest_of(entries)[:12]}"


def is_location(path: Path) -> bool:
    """Whether an artifact lies there, or will lie there once it is made."""
    return path.parent.name in KINDS and NAME_WITH_DIGEST.fullmatch(path.name) is not None


def origin(file: Path) -> Path:
    """What another artifact names as the origin of a file: the artifact that holds it, or the file itself."""
    return file.parent if is_location(file.parent) or (file.parent / MANIFEST).exists() else file


def check_input(path: Path) -> None:
    """Compares an artifact that is about to be read with its manifest; a foreign folder or file has none and passes."""
    folder = path if path.is_dir() else path.parent
    if (folder / MANIFEST).exists():
        check_files(load(folder))


def check_files(artifact: Artifact, digest: Callable[[Path], str] = digest_file) -> None:
    """Compares every file with the sha256 in the manifest; raises `ArtifactError` naming the first that differs."""
    for name, expected in artifact.manifest["files"].items():
        file = artifact.path / name
        if not file.is_file():
            raise ArtifactError(f"{file} is missing; remove {artifact.path} and repeat the step that made it.")
        if (actual := digest(file)) != expected["sha256"]:
            raise ArtifactError(
                f"{file} has changed since it was made: sha256 {actual[:12]}…, manifest {expected['sha256'][:12]}…;"
                f" remove {artifact.path} and repeat the step that made it."
            )


@contextlib.contextmanager
def create(plan: Plan, root: Path, *, keep_partial: bool = False, is_resumable: bool = False) -> Iterator[Draft]:
    """A draft that becomes the artifact when the block ends without an exception.

    `keep_partial` leaves what an interrupted run wrote (training resumes from it); otherwise it is cleared first. What a
    failure leaves is removed, unless the step `is_resumable`. Raises `ArtifactError` when another process is making the
    same artifact.
    """
    started = time.time()
    with _drafting(plan.location(root), keep_partial=keep_partial, is_resumable=is_resumable) as draft:
        yield draft
        _write_manifest(plan, draft, started)


@contextlib.contextmanager
def take_in(artifact_id: str, root: Path) -> Iterator[Path]:
    """A folder for all files of an artifact that was made elsewhere; in its place once the block ends.

    The manifest goes into it last. Nothing is left after a failure. Raises `ArtifactError` as `create` does.
    """
    with _drafting(root / artifact_id, keep_partial=False, is_resumable=False) as draft:
        yield draft.path


def remove(artifact: Artifact) -> None:
    """Deletes an artifact: at once for whoever looks, file by file afterwards."""
    doomed = artifact.path.with_name(artifact.path.name + PARTIAL)
    with _locked(doomed.with_suffix(".lock"), doomed):
        if doomed.exists():
            shutil.rmtree(doomed)
        artifact.path.rename(doomed)
        shutil.rmtree(doomed)


@contextlib.contextmanager
def _drafting(location: Path, *, keep_partial: bool, is_resumable: bool) -> Iterator[Draft]:
    partial = location.with_name(location.name + PARTIAL)
    partial.parent.mkdir(parents=True, exist_ok=True)
    with _locked(partial.with_suffix(".lock"), partial):
        if partial.exists() and not keep_partial:
            shutil.rmtree(partial)
        partial.mkdir(exist_ok=True)
        try:
            yield Draft(partial)
        except Exception:
            if not is_resumable:
                shutil.rmtree(partial)
            raise
        _settle(partial, location)


def _settle(partial: Path, location: Path) -> None:
    if (location / MANIFEST).exists():  # another process made the same meanwhile; artifacts are never changed
        shutil.rmtree(partial)
        return
    if location.exists():  # a folder without a manifest: not whole, so nothing of value
        shutil.rmtree(location)
    for path in (*partial.rglob("*"), partial):
        flush(path)
    partial.rename(location)
    flush(location.parent)


def _write_manifest(plan: Plan, draft: Draft, started: float) -> None:
    files = {}
    for file in sorted(draft.path.rglob("*")):
        if file.is_file():
            name = file.relative_to(draft.path).as_posix()
            files[name] = {"sha256": digest_file(file), "size_bytes": file.stat().st_size}
    manifest = {
        "schema": SCHEMA,
        "kind": plan.kind,
        "name": plan.name,
        "digest": plan.digest,
        "parents": list(plan.parents),
        "inputs": plan.inputs,
        "config": plan.config,
        "results": draft.results,
        "files": files,
        "versions": _versions(),
        "made_at": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        "seconds": round(time.time() - started, 3),
    }
    write_atomically(draft.path / MANIFEST, json.dumps(manifest, indent=2, ensure_ascii=False, default=str) + "\n")


def _versions() -> dict[str, str]:
    """The appliance's version and those of the packages that decide what comes out, where they are installed."""
    found = {"edge-appliance": __version__}
    for package in ("torch", "transformers", "tokenizers", "peft", "trl", "llama-cpp-python"):
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            found[package] = importlib.metadata.version(package)
    return found


def write_atomically(path: Path, text: str) -> None:
    """Writes beside the target, flushes to disk and renames: a reader sees the old file or the new one."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        with temporary.open("w", encoding="utf-8") as stream:
            stream.write(text)
            stream.flush()
            os.fsync(stream.fileno())
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def flush(path: Path) -> None:
    """Waits until a file, or the names in a folder, are on the disk, where a power cut leaves them."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def require_space(folder: Path, needed_bytes: int, purpose: str) -> None:
    """Raises `EnvironmentIncomplete` when the file system of `folder` has less free than `needed_bytes`."""
    while not folder.exists():
        folder = folder.parent
    free = shutil.disk_usage(folder).free
    if free < needed_bytes:
        raise EnvironmentIncomplete(
            f"{purpose} needs {needed_bytes / 1e6:.0f} MB in {folder}, {free / 1e6:.0f} MB are free; free some and repeat."
        )


def require_not_full(file: Path) -> None:
    """Raises `EnvironmentIncomplete` when nothing fits beside `file`: asked where a program failed to write it."""
    if shutil.disk_usage(file.parent).free < FULL_BYTES:
        raise EnvironmentIncomplete(f"No space left on the device while writing {file}; free some and repeat.")


@contextlib.contextmanager
def _locked(lock: Path, partial: Path) -> Iterator[None]:
    with lock.open("w") as stream:
        try:
            fcntl.flock(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise ArtifactError(f"Another process is making {partial} now; wait for it or end it.") from None
        yield  # the file stays: a process that waits on a removed one would not exclude the next
