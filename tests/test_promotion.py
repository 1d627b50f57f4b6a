"""Which model is served: only a verified one, with its settings, and the one before it when it is rolled back."""

import json
import shutil
from collections.abc import Mapping
from pathlib import Path

import pytest

from appliance import artifacts, promotion
from appliance.artifacts import Artifact, Plan
from appliance.errors import ArtifactError, VerificationFailed
from tests import killed
from tests.running import call


def make(root: Path, name: str = "tiny", kind: str = "Q8_0", **results: object) -> Artifact:
    plan = Plan(kind="gguf", name=name, inputs={"revision": 1}, config={"type": kind})
    with artifacts.create(plan, root) as draft:
        (draft.path / "file").write_text("weights")
        draft.results.update(size_bytes=7, **results)
    return artifacts.load(plan.location(root))


def report_on(
    model: artifacts.Artifact,
    root: Path,
    gate: Mapping[str, object] | None = None,
    files: Mapping[str, object] | None = None,
    **config: object,
) -> artifacts.Artifact:
    inputs = {"what": "verify", "revision": promotion.GATED_SINCE}
    plan = Plan(kind="report", name="tiny-verify", inputs=inputs, parents=[model.id], config=config)
    with artifacts.create(plan, root) as draft:
        draft.results.update({name: each for name, each in (("gate", gate), ("files", files)) if each is not None})
    return artifacts.load(plan.location(root))


def promoted(root: Path, name: str, **serve: object) -> Artifact:
    model = make(root, name)
    promotion.promote(model, report_on(model, root), serve, root)
    return model


def served(root: Path) -> tuple[str, object]:
    """The name of the promoted model, and its settings."""
    model = promotion.current(root)
    assert model is not None
    return model.manifest["name"], promotion.serve_settings(model, root)


def test_promotion(root: Path) -> None:
    model = make(root)
    report = report_on(model, root)
    assert promotion.current(root) is None
    result = call("models", "promote", model.path, "--report", report.path, "--serve", '{"slots": 3}')
    assert result.exit_code == 0, result.stderr
    promoted = promotion.current(root)
    assert promoted is not None
    assert promoted.id == model.id
    assert promotion.serve_settings(promoted, root) == {"slots": 3}
    assert f"* {model.id}" in call("models", "list").stdout
    assert f'"id": "{model.id}"' in call("models", "show").stdout
    other = make(root, "other")
    assert promotion.serve_settings(other, root) == {}


def test_promotion_refuses(root: Path, tmp_path: Path) -> None:
    model = make(root)
    report = report_on(model, root)
    other = make(root, "other")
    with pytest.raises(VerificationFailed, match="does not verify"):
        promotion.promote(other, report, {}, root)
    measured = Plan(kind="report", name="tiny-run", inputs={}, parents=[model.id])
    with artifacts.create(measured, root):
        pass
    with pytest.raises(VerificationFailed, match="does not verify"):  # a report, but not one of verification
        promotion.promote(model, artifacts.load(measured.location(root)), {}, root)
    with pytest.raises(ArtifactError, match="only a gguf artifact can be served"):
        promotion.promote(report, report, {}, root)
    with pytest.raises(ArtifactError, match="does not lie in"):
        promotion.promote(model, report, {}, tmp_path / "another")
    (model.path / "file").write_text("changed")
    result = call("models", "promote", model.path, "--report", report.path)
    assert result.exit_code == 1
    assert "has changed since it was made" in result.stderr
    assert not (root / "current").exists()


@pytest.mark.parametrize(
    ("gate", "said"),
    [
        (None, "held no file to its limit of 0.1 nats"),
        ({"type": "Q4_K_M", "passed": True}, "held only Q4_K_M to its limit"),
        ({"type": "Q8_0", "passed": True, "model": "gguf/another"}, "held only gguf/another to its limit"),
        ({"type": "Q8_0", "passed": False}, "held no file to its limit"),
        ({"type": "Q8_0", "passed": True}, None),  # of an older version
        ({"type": "Q8_0", "passed": True, "model": "gguf/{name}"}, None),
        ({"type": "Q8_0 plain", "passed": True, "model": "gguf/{name}"}, None),
    ],
    ids=["no gate", "another type", "another file", "not passed", "by type", "by file", "by file, plain"],
)
def test_only_what_the_gate_let_through_is_promoted(root: Path, gate: dict[str, object] | None, said: str | None) -> None:
    model = make(root)
    if gate is not None and "model" in gate:
        gate = {**gate, "model": str(gate["model"]).format(name=model.path.name)}
    report = report_on(model, root, gate, kl_limit=0.1)
    result = call("models", "promote", model.path, "--report", report.path)
    if said is None:
        assert result.exit_code == 0, result.stderr
        assert promotion.current(root) is not None
        return
    assert result.exit_code == 4, result.stderr
    assert said in result.stderr
    assert "--gate Q8_0" in result.stderr
    assert promotion.current(root) is None


def test_a_report_that_let_it_through_comes_before_a_newer_one(root: Path) -> None:
    model = make(root)
    gated = report_on(model, root, {"type": "Q8_0", "passed": True}, kl_limit=0.1)
    newer = report_on(model, root, kl_limit=0.2)
    manifest = newer.path / artifacts.MANIFEST
    table = json.loads(manifest.read_text())
    manifest.write_text(json.dumps({**table, "made_at": "2999-01-01T00:00:00Z"}))
    assert promotion.report_on(model, root).id == gated.id


@pytest.mark.parametrize("kind", ["F16", "BF16", "F32"])
def test_sixteen_bits_are_called_as_verification_calls_them(root: Path, kind: str) -> None:
    model = make(root, kind=kind)
    refused = report_on(model, root, {"type": "Q8_0", "passed": True}, kl_limit=0.1)
    with pytest.raises(VerificationFailed, match="with --gate F16"):
        promotion.promote(model, refused, {}, root)
    promotion.promote(model, report_on(model, root, {"type": "F16", "passed": True}, kl_limit=0.2), {}, root)


@pytest.mark.parametrize(("let_through", "other"), [("Q8_0", "Q8_0 plain"), ("Q8_0 plain", "Q8_0")])
def test_older_gate_of_two_files_of_a_type(root: Path, let_through: str, other: str) -> None:
    """The one for which nothing was measured is plain."""
    models = {"Q8_0": make(root, "measured", imatrix={"tokens": 9}), "Q8_0 plain": make(root, "plain")}
    files: dict[str, object] = {name: {} for name in models}
    gate = {"type": let_through, "passed": True}
    found = {name: report_on(model, root, gate, files, kl_limit=0.1) for name, model in models.items()}
    with pytest.raises(VerificationFailed, match="to its limit"):
        promotion.promote(models[other], found[other], {}, root)
    promotion.promote(models[let_through], found[let_through], {}, root)


def test_a_newer_gated_report_comes_before_the_one_it_was_promoted_with(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = make(root)
    old = report_on(model, root, kl_limit=0.1)
    with monkeypatch.context() as patch:
        patch.setattr(promotion, "ungated", lambda _report, _model: None)  # as versions before did
        promotion.promote(model, old, {}, root)
    assert promotion.report_on(model, root).id == old.id
    gated = report_on(model, root, {"type": "Q8_0", "passed": True}, kl_limit=0.2)
    assert promotion.report_on(model, root).id == gated.id


def test_rollback_serves_the_one_before_with_its_settings(root: Path) -> None:
    for name, slots in (("a", 1), ("b", 2), ("c", 3)):
        promoted(root, name, slots=slots)
    result = call("models", "rollback", "--json")
    assert result.exit_code == 0, result.stderr
    assert json.loads(result.stdout)["state"] == "rolled back"
    assert served(root) == ("b", {"slots": 2})
    promoted(root, "d", slots=4)  # in the place of c
    for name, slots in (("b", 2), ("a", 1)):
        promotion.rollback(root)
        assert served(root) == (name, {"slots": slots})
    result = call("models", "rollback")
    assert result.exit_code == 1
    assert "nothing to go back to" in result.stderr


def test_model_that_is_promoted_again_counts_once(root: Path) -> None:
    promoted(root, "a", slots=1)
    promoted(root, "b", slots=2)
    promoted(root, "b", slots=3)
    assert served(root) == ("b", {"slots": 3})
    promoted(root, "a", slots=4)
    promotion.rollback(root)
    assert served(root) == ("b", {"slots": 3})
    with pytest.raises(ArtifactError, match="nothing to go back to"):
        promotion.rollback(root)


def test_promotion_of_an_older_model_killed_at_any_moment_loses_no_history(root: Path, tmp_path: Path) -> None:
    old = promoted(root, "a", slots=1)
    promoted(root, "b", slots=2)
    report = promotion.report_on(old, root)
    before = tmp_path / "before"
    shutil.copytree(root, before, symlinks=True)
    seen = []
    for _ in killed.moments(root, lambda: promotion.promote(old, report, {"slots": 3}, root)):
        found = served(root)
        assert found in (("b", {"slots": 2}), ("a", {"slots": 3}))
        promotion.rollback(root)
        assert served(root) == (("a", {"slots": 1}) if found[0] == "b" else ("b", {"slots": 2}))
        seen.append(found[0])
        shutil.rmtree(root)
        shutil.copytree(before, root, symlinks=True)
    assert len(seen) > 5
    assert set(seen) == {"a", "b"}
    assert served(root) == ("a", {"slots": 3})


def test_rollback_to_what_is_not_whole_changes_nothing(root: Path) -> None:
    before = promoted(root, "a")
    promoted(root, "b")
    (before.path / "file").write_text("changed")
    with pytest.raises(ArtifactError, match="has changed since it was made"):
        promotion.rollback(root)
    artifacts.remove(before)
    with pytest.raises(ArtifactError, match="is no artifact"):
        promotion.rollback(root)
    assert served(root) == ("b", {})


def test_record_of_one_promotion_is_read(root: Path) -> None:
    model = promoted(root, "a", slots=5)
    record = json.loads((root / promotion.RECORD).read_text())
    (root / promotion.RECORD).write_text(json.dumps({"schema": 1, **record["promotions"][0]}))
    assert served(root) == ("a", {"slots": 5})
    promoted(root, "b")
    assert promotion.rollback(root).id == model.id


@pytest.mark.parametrize("content", ["{", "[]", "{}", '{"schema": 3}', '{"schema": 2, "promotions": [{"model": "x"}]}'])
def test_damaged_record_is_named(root: Path, content: str) -> None:
    model = promoted(root, "a")
    (root / promotion.RECORD).write_text(content)
    with pytest.raises(ArtifactError, match=r"promoted\.json (is damaged|has schema 3)"):
        promotion.serve_settings(model, root)


def test_removal_frees_the_disk_and_spares_the_promoted(root: Path) -> None:
    old, new = promoted(root, "old"), promoted(root, "new")
    result = call("models", "remove", new.path.name)
    assert result.exit_code == 1
    assert "is the promoted model" in result.stderr
    result = call("models", "remove", promotion.report_on(old, root).path)
    assert result.exit_code == 1
    assert "only models (gguf)" in result.stderr
    result = call("models", "remove", old.id, "--json")
    assert json.loads(result.stdout)["freed_bytes"] == 7
    assert not old.path.exists()
    assert call("models", "remove", old.id).exit_code == 1
