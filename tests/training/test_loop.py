"""The loss curve and the choice of the checkpoint to resume from."""

import json
from pathlib import Path

import pytest

from appliance.artifacts import Plan
from appliance.errors import ArtifactError, TrainingFailed
from appliance.training import loop

PLAN = Plan(kind="adapter", name="a", inputs={})


def checkpoint(root: Path, step: int, *, is_complete: bool = True) -> Path:
    folder = PLAN.partial(root) / loop.CHECKPOINTS / f"checkpoint-{step}"
    folder.mkdir(parents=True)
    if is_complete:
        (folder / loop.COMPLETE).touch()
    return folder


def test_nothing_to_resume(root: Path) -> None:
    for resume in (False, True):
        assert loop.resume_point(PLAN, root, resume=resume, restart=False) is None
    checkpoint(root, 3, is_complete=False)
    assert loop.resume_point(PLAN, root, resume=True, restart=False) is None


def test_newest_complete_checkpoint_by_number(root: Path) -> None:
    for step in (5, 10, 100, 20):
        checkpoint(root, step)
    checkpoint(root, 1000, is_complete=False)
    newest = loop.resume_point(PLAN, root, resume=True, restart=False)
    assert newest is not None
    assert newest.name == "checkpoint-100"
    assert loop.resume_point(PLAN, root, resume=True, restart=True) is None
    with pytest.raises(ArtifactError, match=r"stopped after step 100 .*pass --resume, or --restart"):
        loop.resume_point(PLAN, root, resume=False, restart=False)


def test_loss_curve_drops_what_will_be_written_again(tmp_path: Path) -> None:
    path = tmp_path / loop.LOSS
    path.write_text("".join(json.dumps({"step": step, "loss": 1.0}) + "\n" for step in range(1, 8)))
    loop._keep_steps(path, 5)
    assert [json.loads(line)["step"] for line in path.read_text().splitlines()] == [1, 2, 3, 4, 5]
    loop._keep_steps(path, 0)
    assert path.read_text() == ""
    loop._keep_steps(tmp_path / "new.jsonl", 0)
    assert (tmp_path / "new.jsonl").read_text() == ""


def test_loss_curve_survives_a_line_that_was_cut_off(tmp_path: Path) -> None:
    path = tmp_path / loop.LOSS
    path.write_text('{"step": 1, "loss": 1.0}\n{"step": 2, "lo')
    loop._keep_steps(path, 1)
    assert path.read_text() == '{"step": 1, "loss": 1.0}\n'


def test_loss_curve_is_whole_at_any_moment(tmp_path: Path) -> None:
    """Whoever has it open reads the old one to its end, and a crash in between would find that one."""
    path = tmp_path / loop.LOSS
    whole = "".join(json.dumps({"step": step, "loss": 1.0}) + "\n" for step in range(1, 8))
    path.write_text(whole)
    with path.open() as before:
        loop._keep_steps(path, 2)
        assert before.read() == whole
    (tmp_path / f".{loop.LOSS}.123").write_text("{")  # of a run that was killed while it wrote
    loop._clear_after(tmp_path, 2)
    assert [each.name for each in tmp_path.iterdir()] == [loop.LOSS]


def test_removal_that_was_cut_off_leaves_nothing_to_resume_from(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    newest = checkpoint(root, 10)
    (newest / "optimizer.pt").touch()

    def cut_off(folder: Path) -> None:
        next(folder.rglob("optimizer.pt")).unlink()
        raise KeyboardInterrupt

    monkeypatch.setattr(loop.shutil, "rmtree", cut_off)
    with pytest.raises(KeyboardInterrupt):
        loop.finish(PLAN.partial(root))
    assert loop.resume_point(PLAN, root, resume=True, restart=False) is None


def test_divergence_is_an_error(tmp_path: Path) -> None:
    from types import SimpleNamespace

    watch = loop._callback(tmp_path, "sft", 0)
    state = SimpleNamespace(global_step=4, max_steps=5)
    watch.on_train_begin(None, state, None)
    watch.on_log(None, state, None, logs={"loss": 1.0})
    for loss in (float("nan"), float("inf")):
        with pytest.raises(TrainingFailed, match="sft diverged at step 4"):
            watch.on_log(None, state, None, logs={"loss": loss})
    point = json.loads((tmp_path / loop.LOSS).read_text())
    assert point.items() >= {"step": 4, "loss": 1.0}.items()
