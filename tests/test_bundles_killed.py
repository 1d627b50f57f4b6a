"""Bundles and promotion under `kill -9`: what is killed leaves nothing half, and serves the old model or the new one."""

import shutil
import tarfile
from pathlib import Path

import pytest

from appliance import artifacts, bundles, promotion
from appliance.artifacts import Artifact
from tests import killed
from tests.running import call
from tests.small_bundles import CARRIED, exported, made, promoted


def test_export_killed_at_any_moment_leaves_no_half_file(tmp_path: Path) -> None:
    there, stick = tmp_path / "there", tmp_path / "stick"
    model = promoted(there)
    stick.mkdir()
    whole = bundles.export(model, there, tmp_path / "whole").path.read_bytes()
    path = stick / "tiny.appliance"
    deaths = 0
    for _ in killed.moments(stick, lambda: bundles.export(model, there, path)):
        deaths += 1
        assert not path.exists() or path.read_bytes() == whole
        path.unlink(missing_ok=True)
    assert deaths >= 2
    assert [each.name for each in stick.iterdir()] == [path.name]
    assert path.read_bytes() == whole


def test_export_killed_while_it_copies_leaves_no_half_file(tmp_path: Path) -> None:
    """After each file's content, and in the middle of it: there the folder of the target is not touched."""
    there, stick = tmp_path / "there", tmp_path / "stick"
    model, _ = made(there, content=bytes(10 * tarfile.RECORDSIZE))
    stick.mkdir()
    path = stick / "tiny.appliance"
    told: list[int] = []
    whole = bundles.export(model, there, tmp_path / "whole", progress=lambda done, _: told.append(done)).path.read_bytes()
    assert len(told) == 4
    for moment in told:
        assert killed.dies(export_killed_after, moment, model, there, path)
        assert not path.exists()
    for reads in (1, 4, 7):
        assert killed.dies(export_killed_at_read, reads, model, there, path)
        assert not path.exists()
        assert path.with_name(path.name + artifacts.PARTIAL).exists()
    bundles.export(model, there, path)
    assert [each.name for each in stick.iterdir()] == [path.name]
    assert path.read_bytes() == whole


def export_killed_after(size_bytes: int, model: Artifact, root: Path, path: Path) -> None:
    bundles.export(model, root, path, progress=lambda done, _: killed.now(done == size_bytes))


def export_killed_at_read(number: int, model: Artifact, root: Path, path: Path) -> None:
    left = iter(range(number))

    class Dying(bundles._Hashed):
        def read(self, size: int = -1) -> bytes:
            killed.now(next(left, None) is None)
            return super().read(size)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(bundles, "_Hashed", Dying)
        bundles.export(model, root, path)


def test_update_killed_at_any_moment_serves_the_old_model_or_the_new_one(root: Path, tmp_path: Path) -> None:
    bundle = exported(tmp_path)
    old = promoted(root, "old", slots=7)
    before = tmp_path / "before"
    shutil.copytree(root, before, symlinks=True)
    deaths = 0
    for _ in killed.moments(root, lambda: call("models", "import", bundle, "--promote")):
        deaths += 1
        served = promotion.current(root)
        assert served is not None
        artifacts.check_files(served)
        assert promotion.serve_settings(served, root) == ({"slots": 7} if served.id == old.id else CARRIED)
        if deaths % 2:  # what is half done is no hindrance to who tries again, nor to the next
            shutil.rmtree(root)
            shutil.copytree(before, root, symlinks=True)
    assert deaths > 20
    served = promotion.current(root)
    assert served is not None
    assert served.id != old.id
    assert not list(root.rglob("*.partial"))


def test_rollback_killed_at_any_moment_serves_either_model(root: Path) -> None:
    promoted(root, "old", slots=7)
    new = promoted(root, "new", slots=8)
    deaths = 0
    for _ in killed.moments(root, lambda: promotion.rollback(root)):
        deaths += 1
        served = promotion.current(root)
        assert served is not None
        assert promotion.serve_settings(served, root) == {"slots": 8 if served.id == new.id else 7}
        promotion.promote(new, promotion.report_on(new, root), {"slots": 8}, root)
    assert deaths > 5
    served = promotion.current(root)
    assert served is not None
    assert served.manifest["name"] == "old"
