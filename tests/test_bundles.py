"""Bundles: a model in one file. What is exported arrives as it was; what was tampered with, cut or killed leaves nothing."""

import io
import json
import resource
import shutil
import subprocess
import sys
import tarfile
from collections.abc import Mapping
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from appliance import artifacts, bundles, promotion
from appliance.commands import serve
from appliance.errors import ApplianceError, ArtifactError, RecipeError, VerificationFailed
from tests.running import call, environment
from tests.small_bundles import CARRIED, SERVE, exported, made, promoted


@pytest.fixture
def bundle(tmp_path: Path) -> Path:
    """Of a promoted model."""
    return exported(tmp_path)


def members(path: Path) -> dict[str, bytes]:
    with tarfile.open(path) as tar:
        return {entry.name: tar.extractfile(entry).read() for entry in tar}  # type: ignore[union-attr]


def packed(path: Path, contents: Mapping[str, bytes]) -> Path:
    with tarfile.open(path, "w") as tar:
        for name, content in contents.items():
            entry = tarfile.TarInfo(name)
            entry.size = len(content)
            tar.addfile(entry, io.BytesIO(content))
    return path


def files(root: Path) -> dict[str, bytes]:
    """All but locks."""
    found = (path for path in root.rglob("*") if path.is_file() and path.suffix != ".lock")
    return {path.relative_to(root).as_posix(): path.read_bytes() for path in found}


def key_pair(folder: Path, name: str = "key") -> tuple[Path, Path]:
    private, public = folder / f"{name}.pem", folder / f"{name}.pub"
    make = ["openssl", "ecparam", "-name", "prime256v1", "-genkey", "-noout", "-out", str(private)]
    subprocess.run(make, check=True, capture_output=True)
    subprocess.run(["openssl", "ec", "-in", str(private), "-pubout", "-out", str(public)], check=True, capture_output=True)
    return private, public


def test_model_arrives_as_it_left(root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    there = tmp_path / "there"
    model = promoted(there, **SERVE)
    monkeypatch.setenv("APPLIANCE_ARTIFACTS", str(there))
    stick = tmp_path / "stick"
    stick.mkdir()
    result = call("models", "export", "--to", stick, "--json")
    assert result.exit_code == 0, result.stderr
    assert "serve.adapters names files of this machine and was left out." in result.stderr
    exported = json.loads(result.stdout)
    monkeypatch.setenv("APPLIANCE_ARTIFACTS", str(root))
    result = call("models", "import", exported["file"], "--fingerprint", exported["fingerprint"], "--promote", "--json")
    assert result.exit_code == 0, result.stderr
    imported = json.loads(result.stdout)
    assert (imported["state"], imported["promoted"], imported["signature"]) == ("imported", True, "none")
    arrived = promotion.current(root)
    assert arrived is not None
    assert arrived.id == model.id
    assert files(arrived.path) == files(model.path)
    assert promotion.serve_settings(arrived, root) == CARRIED
    assert json.loads(call("models", "import", exported["file"], "--json").stdout)["state"] == "unchanged"


def test_same_model_gives_the_same_bytes(tmp_path: Path, bundle: Path) -> None:
    there = tmp_path / "there"
    model = promotion.current(there)
    assert model is not None
    again = bundles.export(model, there, tmp_path / "again")
    assert again.path.read_bytes() == bundle.read_bytes()
    with pytest.raises(ArtifactError, match="exists already"):
        bundles.export(model, there, tmp_path / "again")


def test_what_was_damaged_here_is_not_exported(tmp_path: Path) -> None:
    there = tmp_path / "there"
    model = promoted(there)
    file = model.path / "tiny.gguf"
    for content in (file.read_bytes()[:-1] + b"?", b"shorter"):
        file.write_bytes(content)
        with pytest.raises(ArtifactError, match="has changed since it was made"):
            bundles.export(model, there, tmp_path / "bundle")
        assert list(tmp_path.glob("bundle*")) == []


def test_model_without_a_report_is_not_exported(tmp_path: Path) -> None:
    model, report = made(tmp_path)
    assert promotion.report_on(model, tmp_path).id == report.id
    artifacts.remove(report)
    with pytest.raises(VerificationFailed, match="verifies gguf/tiny-"):
        bundles.export(model, tmp_path, tmp_path / "bundle")
    with pytest.raises(ArtifactError, match="does not lie in"):
        bundles.export(model, tmp_path / "other", tmp_path / "bundle")


def test_model_that_no_gate_let_through_is_not_exported(tmp_path: Path) -> None:
    model, _ = made(tmp_path, revision=promotion.GATED_SINCE)
    with pytest.raises(VerificationFailed, match="with --gate Q8_0"):
        bundles.export(model, tmp_path, tmp_path / "bundle")
    assert not (tmp_path / "bundle").exists()


@pytest.mark.parametrize("is_older", [True, False])
@pytest.mark.parametrize("way", ["import", "first model"])
def test_carried_model_without_a_gate(
    root: Path, tmp_path: Path, way: str, is_older: bool, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Who cannot verify again takes a report from before gates; one of this version needs its gate."""
    there, path = tmp_path / "there", tmp_path / "tiny.appliance"
    model, report = made(there, revision=promotion.GATED_SINCE - is_older)
    with monkeypatch.context() as patch:
        patch.setattr(promotion, "ungated", lambda _report, _model: None)  # as versions before did
        bundles.export(model, there, path)
    if way == "import":
        result = call("models", "import", path, "--promote")
        said = result.stderr
        assert result.exit_code == (0 if is_older else 4), said
    elif is_older:
        serve._import_first_model(path)
        said = capsys.readouterr().err
    else:
        with pytest.raises(VerificationFailed) as raised:
            serve._import_first_model(path)
        said = str(raised.value)
    assert f"{report.id} is from before" in said if is_older else "export it again" in said
    assert (promotion.current(root) is not None) == is_older
    if is_older:  # and goes on to the next machine
        bundles.export(artifacts.load(root / model.id), root, tmp_path / "again")


def test_stick_that_holds_no_large_files(tmp_path: Path) -> None:
    """FAT32 refuses with EFBIG, as a limit on the size of files does."""
    there = tmp_path / "there"
    promoted(there)
    command = [sys.executable, "-m", "appliance", "models", "export", "--to", str(tmp_path / "bundle")]
    result = subprocess.run(
        command,
        env=environment(there),
        capture_output=True,
        text=True,
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (4000, 4000)),
    )
    assert result.returncode == 1
    assert "FAT32 ends at 4.3 GB); format the stick as exFAT or ext4" in result.stderr
    assert list(tmp_path.glob("bundle*")) == []


@given(data=st.data())
def test_any_changed_byte_is_refused_or_changes_nothing(
    data: st.DataObject, tmp_path_factory: pytest.TempPathFactory
) -> None:
    folder = tmp_path_factory.mktemp("tampered")
    there, root = folder / "there", folder / "here"
    model = promoted(there)
    path = bundles.export(model, there, folder / "bundle").path
    content = bytearray(path.read_bytes())
    position = data.draw(st.integers(0, len(content) - 1))
    content[position] ^= data.draw(st.integers(1, 255))
    path.write_bytes(content)
    try:
        taken = bundles.take_in(path, root)
    except ApplianceError:
        assert all(name.startswith(model.id) for name in files(root)), "only a whole artifact before the damage may stay"
        for manifest in root.rglob(artifacts.MANIFEST):
            artifacts.check_files(artifacts.load(manifest.parent))
    else:
        assert files(taken.model.path) == files(model.path)  # padding, or a field of the archive that nobody reads
    shutil.rmtree(folder)


def test_truncated_bundle_is_refused(bundle: Path, root: Path) -> None:
    content = bundle.read_bytes()
    end = max(index for index in range(len(content)) if content[index])  # zeros follow
    for length in (*range(0, end, 211), 1, 511, 512, 513, end):
        bundle.write_bytes(content[:length])
        with pytest.raises((ArtifactError, VerificationFailed), match=r"tiny\.appliance"):
            bundles.take_in(bundle, root)


def test_other_content_under_the_same_name_is_refused(bundle: Path, root: Path) -> None:
    made(root, content=b"other")
    with pytest.raises(ArtifactError, match="has other files than the bundle says"):
        bundles.take_in(bundle, root)


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        (b'"format": "edge', b'"format": "other', "is a bundle of schema"),
        (b'"schema": 1', b'"schema": 2', "is a bundle of schema 2"),
        (b'"tiny.gguf"', b'"../../tiny.gguf"', "index is damaged"),
        (b'"tiny.gguf"', b'"/tiny.gguf"', "index is damaged"),
        (b'"tiny.gguf"', b'"a\\u0000b"', "index is damaged"),
        (b'"model": "gguf/', b'"model": "../', "index is damaged"),
        (b'"manifest.json"', b'"manifest.txt"', "index is damaged"),
        (b'"serve": {', b'"serve": {"host": "0.0.0.0", ', "index is damaged"),
        (b'"size_bytes": 700', b'"size_bytes": -1', "index is damaged"),
        (b'"size_bytes": 700', b'"size_bytes": 701', "should follow, not"),
        (b"{", b"[" * 100_000, "index is damaged"),
    ],
)
def test_index_that_nobody_exported_is_refused(bundle: Path, root: Path, old: bytes, new: bytes, message: str) -> None:
    contents = members(bundle)
    assert old in contents[bundles.INDEX]
    contents[bundles.INDEX] = contents[bundles.INDEX].replace(old, new)
    with pytest.raises((ArtifactError, VerificationFailed), match=message):
        bundles.take_in(packed(bundle, contents), root)
    assert files(root) == {}
    assert not (root.parent / "tiny.gguf").exists()


def test_settings_that_this_version_does_not_know_are_refused_before_anything_is_taken_in(bundle: Path, root: Path) -> None:
    contents = members(bundle)
    contents[bundles.INDEX] = contents[bundles.INDEX].replace(b'"serve": {', b'"serve": {"slotz": 3,')
    with pytest.raises(RecipeError, match=r"tiny\.appliance: serve\.slotz: unknown key; did you mean 'slots'"):
        bundles.take_in(packed(bundle, contents), root)
    assert files(root) == {}


def test_archives_that_are_no_bundles_are_refused(bundle: Path, root: Path, tmp_path: Path) -> None:
    contents = members(bundle)
    head = contents[bundles.INDEX]
    model = next(name for name in contents if name.endswith("tiny.gguf"))
    for changed, message in (
        ({**contents, "more": b""}, "holds 'more' too"),
        (dict(reversed(contents.items())), "does not begin with bundle.json"),
        ({bundles.INDEX: head}, "and it ends"),
        ({bundles.INDEX: b" " * (bundles.LARGEST_HEAD_BYTES + 1)}, "are read"),
        ({**contents, model: contents[model][:-1] + b"?"}, "tampered"),
    ):
        with pytest.raises((ArtifactError, VerificationFailed), match=message):
            bundles.take_in(packed(tmp_path / "changed", changed), root)
    with tarfile.open(tmp_path / "linked", "w") as tar:
        tar.addfile(entry_of(bundles.INDEX, len(head)), io.BytesIO(head))
        link = entry_of(model, len(contents[model]))
        link.type, link.linkname = tarfile.SYMTYPE, "/etc/passwd"
        tar.addfile(link)
    with pytest.raises((ArtifactError, VerificationFailed)):
        bundles.take_in(tmp_path / "linked", root)
    for content in (b"", b"no archive", b"\0" * 1024):
        (tmp_path / "changed").write_bytes(content)
        with pytest.raises(ArtifactError, match="is no"):
            bundles.take_in(tmp_path / "changed", root)
    assert call("models", "import", tmp_path / "missing").exit_code == 1


def entry_of(name: str, size: int) -> tarfile.TarInfo:
    entry = tarfile.TarInfo(name)
    entry.size = size
    return entry


def test_artifact_under_another_name_than_its_own_is_refused(bundle: Path, root: Path) -> None:
    renamed = {name.replace("gguf/tiny-", "gguf/other-"): content for name, content in members(bundle).items()}
    renamed[bundles.INDEX] = renamed[bundles.INDEX].replace(b"gguf/tiny-", b"gguf/other-")
    with pytest.raises(VerificationFailed, match="whose manifest names another"):
        bundles.take_in(packed(bundle, renamed), root)
    assert files(root) == {}


def test_signature_is_checked_by_whoever_has_the_key(tmp_path: Path, root: Path) -> None:
    there = tmp_path / "there"
    model = promoted(there)
    private, public = key_pair(tmp_path)
    _, other = key_pair(tmp_path, "other")
    path = bundles.export(model, there, tmp_path / "signed", private).path
    with pytest.raises(VerificationFailed, match="not one by"):
        bundles.take_in(path, root, other)
    changed = members(path)
    changed[bundles.INDEX] = changed[bundles.INDEX].replace(b'"serve": {', b'"serve": {"slots": 9')
    with pytest.raises(VerificationFailed, match="not one by"):
        bundles.take_in(packed(tmp_path / "changed", changed), root, public)
    for signature in (b"", b"{}", b"[]", b'{"mediaType": "x"}', b"\xff"):
        changed = {**members(path), bundles.SIGNATURE: signature}
        with pytest.raises(VerificationFailed, match="not one by"):
            bundles.take_in(packed(tmp_path / "changed", changed), root, public)
    assert files(root) == {}
    assert bundles.take_in(path, root, public).is_signed
    result = call("models", "import", path, "--json")
    assert "nobody said by whom" in result.stderr
    assert json.loads(result.stdout)["signature"] == "not checked"


def test_unsigned_bundle_is_refused_where_a_key_is_trusted(
    bundle: Path, root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    _, public = key_pair(tmp_path)
    monkeypatch.setenv("APPLIANCE_TRUSTED_KEY", str(public))
    result = call("models", "import", bundle)
    assert result.exit_code == 4
    assert "is not signed" in result.stderr
    assert files(root) == {}


def test_files_that_are_no_keys_are_named(bundle: Path, root: Path, tmp_path: Path) -> None:
    there = tmp_path / "there"
    model = promotion.current(there)
    assert model is not None
    encrypted, rsa = tmp_path / "encrypted.pem", tmp_path / "rsa.pem"
    private, _ = key_pair(tmp_path)
    hide = ["openssl", "ec", "-aes256", "-passout", "pass:x", "-in", str(private), "-out", str(encrypted)]
    subprocess.run(hide, check=True, capture_output=True)
    subprocess.run(["openssl", "genrsa", "-out", str(rsa), "2048"], check=True, capture_output=True)
    for key in (encrypted, rsa, bundle):
        with pytest.raises(RecipeError, match="no unencrypted elliptic curve key"):
            bundles.export(model, there, tmp_path / "new", key)
    signed = bundles.export(model, there, tmp_path / "signed", private).path
    for key in (rsa, bundle):
        with pytest.raises(RecipeError, match="no public elliptic curve key"):
            bundles.take_in(signed, root, key)
    with pytest.raises(RecipeError, match="does not exist"):
        bundles.take_in(signed, root, tmp_path / "missing")


def test_other_fingerprint_is_refused(bundle: Path, root: Path) -> None:
    with pytest.raises(VerificationFailed, match="it is another bundle"):
        bundles.take_in(bundle, root, fingerprint="0" * 64)
    assert files(root) == {}
