"""Bundles: a model in one file, carried on a stick to a machine without a network. `export` writes one, `take_in` reads it.

A bundle is a plain tar archive. Its first member, `bundle.json`, names every other member with size and sha256, so that the
sha256 of `bundle.json`, the bundle's fingerprint, stands for all of it; `bundle.sig` may follow, a signature of that file.
Then come the artifacts, a model and the report that verifies it, with their manifests. The same model gives the same bytes.
What is in a bundle is in `bundle_index.py`.
"""

import contextlib
import dataclasses
import errno
import hashlib
import io
import os
import shutil
import tarfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import IO, Any

from appliance import artifacts, bundle_index, promotion, signatures
from appliance.artifacts import Artifact
from appliance.bundle_index import Index, Member
from appliance.errors import ArtifactError, VerificationFailed
from appliance.recipe import build_serve

SUFFIX = ".appliance"
INDEX, SIGNATURE = "bundle.json", "bundle.sig"
LARGEST_HEAD_BYTES = 1 << 20  # of index and signature
CHUNK_BYTES = 1 << 20


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Exported:
    path: Path
    fingerprint: str
    size_bytes: int
    left_out: Sequence[str]  # serving settings that name files of this machine


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class TakenIn:
    """`is_new` is False when both artifacts were here already."""

    model: Artifact
    report: Artifact
    serve: Mapping[str, Any]
    fingerprint: str
    is_signed: bool
    is_new: bool


def export(
    model: Artifact,
    root: Path,
    path: Path,
    private_key: Path | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> Exported:
    """Writes `model`, its report and its serving settings to `path`, which appears when it is whole and on the disk.

    `progress` gets bytes, written and in all. Raises `ArtifactError` when `path` exists, when a file is not what its
    manifest says, or when the file system cannot hold it; `VerificationFailed` when no report verifies the model, and when
    none did so in a way that another machine would promote it with.
    """
    if path.exists():
        raise ArtifactError(f"{path} exists already; remove it, or name another file with --to.")
    if model.path.resolve() != (root / model.id).resolve():
        raise ArtifactError(f"{model.path} does not lie in {root / 'gguf'}; only a model of this folder can be exported.")
    report = promotion.report_on(model, root)
    if (problem := promotion.ungated(report, model)) is not None and not promotion.is_from_before_gates(report):
        raise VerificationFailed(f"{problem} Without it no machine would promote the bundle.")
    settings = promotion.serve_settings(model, root)
    index = bundle_index.of(model, report, settings)
    content = bundle_index.to_bytes(index)
    heads = {INDEX: content} | ({} if private_key is None else {SIGNATURE: signatures.sign(content, private_key)})
    artifacts.require_space(path.parent, index.size_bytes + LARGEST_HEAD_BYTES, str(path))
    with (
        _appearing(path, index.size_bytes) as stream,
        tarfile.open(fileobj=stream, mode="w", format=tarfile.PAX_FORMAT) as tar,
    ):
        for name, head in heads.items():
            tar.addfile(_entry(name, len(head)), io.BytesIO(head))
        done = 0
        for member in index.members:
            _add(tar, member, root / member.name)
            done += member.size_bytes
            if progress is not None:
                progress(done, index.size_bytes)
    left_out = [name for name in bundle_index.FILE_SETTINGS if settings.get(name)]
    return Exported(path=path, fingerprint=_sha256(content), size_bytes=path.stat().st_size, left_out=left_out)


def take_in(path: Path, root: Path, public_key: Path | None = None, fingerprint: str | None = None) -> TakenIn:
    """Puts the artifacts of a bundle into `root`, each whole or not at all; promotes nothing.

    With `public_key` a bundle that it did not sign is refused, with `fingerprint` any other bundle. Raises
    `VerificationFailed` for those and for what does not have the sha256 that it should, `ArtifactError` for a file that is
    no whole bundle and for an artifact that is here with other content, `RecipeError` for settings that this version does
    not know.
    """
    with _opened(path) as bundle:
        content = bundle.head(INDEX)
        if content is None:
            raise ArtifactError(f"{path} is no bundle: it does not begin with {INDEX}; `appliance models export` makes one.")
        found = _sha256(content)
        if fingerprint is not None and fingerprint != found:
            raise VerificationFailed(f"{path} has the fingerprint {found}, not {fingerprint}; it is another bundle.")
        signature = bundle.head(SIGNATURE)
        if public_key is not None and signature is None:
            raise VerificationFailed(f"{path} is not signed; export it with --sign, or import it without a public key.")
        if public_key is not None and signature is not None:
            signatures.check(content, signature, public_key)
        index = bundle_index.parse(content, path)
        build_serve(index.serve, str(path))
        artifacts.require_space(root, index.size_bytes, f"The content of {path}")
        is_new = [_take_in_artifact(bundle, artifact_id, index, root) for artifact_id in (index.model, index.report)]
        bundle.require_end()
    return TakenIn(
        model=artifacts.load(root / index.model),
        report=artifacts.load(root / index.report),
        serve=index.serve,
        fingerprint=found,
        is_signed=signature is not None,
        is_new=any(is_new),
    )


def _take_in_artifact(bundle: "_Bundle", artifact_id: str, index: Index, root: Path) -> bool:
    """False when it is here already, and then only compared."""
    members = index.members_of(artifact_id)
    if (root / artifact_id / artifacts.MANIFEST).exists():
        present = artifacts.load(root / artifact_id)
        bundle_index.require_same(present, members)
        artifacts.check_files(present)
        for member in members:
            bundle.copy(member, Path(os.devnull))
        return False
    with artifacts.take_in(artifact_id, root) as folder:
        for member in members:
            target = folder / member.file
            target.parent.mkdir(parents=True, exist_ok=True)
            bundle.copy(member, target)
        bundle_index.require_same(artifacts.load(folder), members, artifact_id)
    return True


class _Bundle:
    """A bundle's members, read in the order in which they must come."""

    def __init__(self, tar: tarfile.TarFile, path: Path) -> None:
        self._tar, self._path = tar, path
        self._entry = tar.next()

    def head(self, name: str) -> bytes | None:
        """A small member; None when another comes next."""
        if self._entry is None or self._entry.name != name:
            return None
        if self._entry.size > LARGEST_HEAD_BYTES:
            raise ArtifactError(f"{self._path}: {name} has {self._entry.size} bytes, at most {LARGEST_HEAD_BYTES} are read.")
        content = self._content().read()
        self._entry = self._tar.next()
        return content

    def copy(self, member: Member, target: Path) -> None:
        found = None if self._entry is None else (self._entry.name, self._entry.size)
        if found != (member.name, member.size_bytes):
            what = "and it ends" if found is None else f"not {found[0]!r} of {found[1]} bytes"
            raise VerificationFailed(
                f"{self._path}: {member.name!r} of {member.size_bytes} bytes should follow, {what}; copy or export it again."
            )
        source = _Hashed(self._content())
        with target.open("wb") as stream:
            shutil.copyfileobj(source, stream, CHUNK_BYTES)
        if source.sha256 != member.sha256:
            raise VerificationFailed(
                f"{self._path}: {member.name} has the sha256 {source.sha256[:12]}…, its index says {member.sha256[:12]}…; "
                "it is damaged or was tampered with. Copy or export it again."
            )
        self._entry = self._tar.next()

    def require_end(self) -> None:
        if self._entry is not None:
            raise VerificationFailed(f"{self._path} holds {self._entry.name!r} too, of which its index does not know.")

    def _content(self) -> IO[bytes]:
        assert self._entry is not None
        content = self._tar.extractfile(self._entry) if self._entry.type == tarfile.REGTYPE else None
        if content is None:
            raise VerificationFailed(f"{self._path}: {self._entry.name!r} is no ordinary file.")
        return content


class _Hashed:
    """A stream whose sha256 is known once it was read."""

    def __init__(self, stream: IO[bytes]) -> None:
        self._stream, self._hash = stream, hashlib.sha256()

    def read(self, size: int = -1) -> bytes:
        data = self._stream.read(size)
        self._hash.update(data)
        return data

    @property
    def sha256(self) -> str:
        return self._hash.hexdigest()


def _add(tar: tarfile.TarFile, member: Member, file: Path) -> None:
    with file.open("rb") as stream:
        source = _Hashed(stream)
        if os.fstat(stream.fileno()).st_size == member.size_bytes:
            tar.addfile(_entry(member.name, member.size_bytes), source)
    if source.sha256 != member.sha256:
        raise ArtifactError(f"{file} has changed since it was made; remove {file.parent} and repeat the step that made it.")


def _entry(name: str, size_bytes: int) -> tarfile.TarInfo:
    entry = tarfile.TarInfo(name)
    entry.size = size_bytes
    return entry


@contextlib.contextmanager
def _appearing(path: Path, size_bytes: int) -> Iterator[IO[bytes]]:
    """A file that has its name once it is whole and on the disk."""
    partial = path.with_name(path.name + artifacts.PARTIAL)
    try:
        with partial.open("wb") as stream:
            yield stream
            stream.flush()
            os.fsync(stream.fileno())
        partial.replace(path)
        artifacts.flush(path.parent)
    except OSError as error:
        if error.errno != errno.EFBIG:
            raise
        raise ArtifactError(
            f"The file system of {path.parent} cannot hold a file of {size_bytes / 1e9:.1f} GB (FAT32 ends at 4.3 GB); "
            "format the stick as exFAT or ext4."
        ) from error
    finally:
        partial.unlink(missing_ok=True)


@contextlib.contextmanager
def _opened(path: Path) -> Iterator[_Bundle]:
    try:
        with tarfile.open(path, mode="r:") as tar:
            yield _Bundle(tar, path)
    except (tarfile.TarError, EOFError) as error:
        raise ArtifactError(f"{path} is no whole bundle ({error}); copy or export it again.") from error


def _sha256(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()
