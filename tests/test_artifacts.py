"""Artifact directories: whole or not there at all, never changed, never made twice at once."""

import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from appliance import artifacts
from appliance.artifacts import MANIFEST, Plan
from appliance.errors import ArtifactError, EnvironmentIncomplete

PLAN = Plan(kind="gguf", name="tiny", inputs={"revision": 1}, parents=["merged/x"], config={"type": "Q8_0"})
MAKE_AND_WAIT = """
import sys
from pathlib import Path
from appliance import artifacts
plan = artifacts.Plan(kind="gguf", name="tiny", inputs={"revision": 1}, parents=["merged/x"], config={"type": "Q8_0"})
with artifacts.create(plan, Path(sys.argv[1])) as draft:
    (draft.path / "half").write_text("half")
    print("making", flush=True)
    sys.stdin.read()
"""


def make(root: Path, plan: Plan = PLAN, text: str = "weights") -> artifacts.Artifact:
    with artifacts.create(plan, root) as draft:
        (draft.path / "inner").mkdir()
        (draft.path / "inner" / "file").write_text(text)
        draft.results["size_bytes"] = len(text)
    return artifacts.load(plan.location(root))


def making(root: Path) -> "subprocess.Popen[str]":
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    process: subprocess.Popen[str] = subprocess.Popen([sys.executable, "-c", MAKE_AND_WAIT, str(root)], **pipes)  # type: ignore[call-overload]
    assert process.stdout is not None
    assert process.stdout.readline() == "making\n"
    return process


def test_made_whole(root: Path) -> None:
    assert PLAN.existing(root) is None
    artifact = make(root)
    assert artifact.id == f"gguf/tiny-{PLAN.digest[:12]}"
    assert artifact.results == {"size_bytes": 7}
    assert artifact.manifest["files"]["inner/file"]["size_bytes"] == 7
    assert artifact.manifest["parents"] == ["merged/x"]
    artifacts.check_files(artifact)
    assert {each.name for each in (root / "gguf").iterdir()} == {artifact.path.name, f"{artifact.path.name}.lock"}


@pytest.mark.parametrize("is_resumable", [False, True])
def test_failed_step_leaves_no_artifact(root: Path, is_resumable: bool) -> None:
    def fail() -> None:
        with artifacts.create(PLAN, root, is_resumable=is_resumable) as draft:
            (draft.path / "file").write_text("x")
            raise RuntimeError

    with pytest.raises(RuntimeError):
        fail()
    assert PLAN.existing(root) is None
    assert not PLAN.location(root).exists()
    assert PLAN.partial(root).exists() == is_resumable


def test_leftovers_are_cleared_unless_kept(root: Path) -> None:
    PLAN.partial(root).mkdir(parents=True)
    (PLAN.partial(root) / "garbage").write_text("x")
    with artifacts.create(PLAN, root, keep_partial=True) as draft:
        assert (draft.path / "garbage").exists()
        shutil.rmtree(draft.path)
        draft.path.mkdir()
    other = Plan(kind="gguf", name="other", inputs={})
    other.partial(root).mkdir(parents=True)
    (other.partial(root) / "garbage").write_text("x")
    assert "garbage" not in make(root, other).manifest["files"]


def test_folder_without_manifest_is_replaced(root: Path) -> None:
    PLAN.location(root).mkdir(parents=True)
    (PLAN.location(root) / "garbage").write_text("x")
    assert list(make(root).manifest["files"]) == ["inner/file"]


def test_second_process_is_refused_and_a_killed_one_leaves_no_lock(root: Path) -> None:
    with making(root) as process:
        with pytest.raises(ArtifactError, match="Another process is making"):
            make(root)
        process.send_signal(signal.SIGKILL)
        process.wait()
    assert (PLAN.partial(root) / "half").exists()
    assert list(make(root).manifest["files"]) == ["inner/file"]


def test_artifact_made_meanwhile_is_not_replaced(root: Path) -> None:
    first = make(root)
    second = make(root, text="other")
    assert first.manifest == second.manifest
    assert not PLAN.partial(root).exists()


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=6,
)


@given(inputs=st.dictionaries(st.text(), JSON, max_size=3), config=st.dictionaries(st.text(), JSON, max_size=3))
def test_manifest_round_trip(tmp_path_factory: pytest.TempPathFactory, inputs: dict, config: dict) -> None:
    plan = Plan(kind="dataset", name="d", inputs=inputs, config=config)
    root = tmp_path_factory.mktemp("root")
    manifest = make(root, plan).manifest
    again = Plan(kind="dataset", name="d", inputs=manifest["inputs"], config=manifest["config"], parents=manifest["parents"])
    assert again.digest == manifest["digest"] == plan.digest
    changed = Plan(kind="dataset", name="d", inputs={**inputs, "one more": 1}, config=config)
    assert changed.digest != plan.digest


def test_identity(root: Path, tmp_path: Path) -> None:
    artifact = make(root)
    assert artifacts.identity(artifact.path) == artifact.id
    (root / "current").symlink_to(Path("gguf") / artifact.path.name)
    assert artifacts.identity(root / "current") == artifact.id
    foreign = tmp_path / "model"
    foreign.mkdir()
    (foreign / "config.json").write_text("{}")
    (foreign / "model.safetensors").write_bytes(b"1")
    before = artifacts.identity(foreign)
    assert before.startswith("model@")
    (foreign / "config.json").write_text("{ }")
    changed = artifacts.identity(foreign)
    assert changed != before
    os.utime(foreign / "model.safetensors", ns=(1, 1))
    assert artifacts.identity(foreign) != changed
    with pytest.raises(ArtifactError, match="does not exist"):
        artifacts.identity(tmp_path / "no")


def test_changed_and_missing_files_are_found(root: Path) -> None:
    artifact = make(root)
    (artifact.path / "inner/file").write_text("Weights")
    with pytest.raises(ArtifactError, match="has changed since it was made"):
        artifacts.check_files(artifact)
    (artifact.path / "inner/file").unlink()
    with pytest.raises(ArtifactError, match="is missing"):
        artifacts.check_files(artifact)


def test_unreadable_manifests(root: Path) -> None:
    artifact = make(root)
    for text, said in (("{", "cannot be read"), ('{"schema": 99}', "is no manifest of schema 1"), ("[]", "is no manifest")):
        (artifact.path / MANIFEST).write_text(text)
        with pytest.raises(ArtifactError, match=said):
            artifacts.load(artifact.path)
    (artifact.path / MANIFEST).unlink()
    with pytest.raises(ArtifactError, match="is no artifact"):
        artifacts.load(artifact.path)


def test_full_disk_is_said_first(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=1_000_000))
    artifacts.require_space(root, 999_999, "This")
    with pytest.raises(EnvironmentIncomplete, match=r"This needs 2 MB in .*, 1 MB are free"):
        artifacts.require_space(root, 2_000_000, "This")


def test_removed_at_once(root: Path) -> None:
    artifact = make(root)
    artifacts.remove(artifact)
    assert PLAN.existing(root) is None
    assert [each.name for each in (root / "gguf").iterdir()] == [f"{artifact.path.name}.lock"]
    assert make(root).id == artifact.id
