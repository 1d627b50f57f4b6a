"""What is said while training: each finding once, also after an interruption; and trackers that a person names."""

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from appliance.errors import EnvironmentIncomplete, RecipeError
from appliance.training import curve, trackers
from appliance.training.recorder import Recorder
from tests.training.test_diagnose import diverged, spiked


def record(recorder: Recorder, points: list[curve.Point]) -> None:
    for point in points:
        logs = {"loss": point.loss, "grad_norm": point.gradient_norm, "learning_rate": point.learning_rate}
        recorder.write(point.step, logs, list(point.rows))


def test_finding_is_said_once(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    record(Recorder(tmp_path, "sft", 300), spiked(0))
    said = capsys.readouterr().err
    assert said.count("sft: notice: The loss jumped to") == said.count("\n") == 1
    assert "rows 17, 203" in said


def test_finding_is_not_repeated_by_a_resumed_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    points = diverged(0)
    record(Recorder(tmp_path, "sft", 300), points[:260])
    assert "Training diverged" in capsys.readouterr().err
    record(Recorder(tmp_path, "sft", 300), points[260:])
    assert "Training diverged" not in capsys.readouterr().err


def test_what_was_written_can_be_read(tmp_path: Path) -> None:
    points = spiked(1)[:30]
    record(Recorder(tmp_path, "sft", 30), points)
    again = curve.read(tmp_path)
    for old, new in zip(points, again, strict=True):
        assert (old.step, old.loss, old.gradient_norm, old.rows) == (new.step, new.loss, new.gradient_norm, new.rows)
    written = json.loads((tmp_path / curve.LOSS).read_text().splitlines()[3])
    assert set(written) >= {"grad_norm", "learning_rate", "memory_bytes"}


def test_tracker_that_nobody_knows_is_refused() -> None:
    with (
        pytest.raises(RecipeError, match=r"--report-to nosuch: transformers knows .*tensorboard"),
        trackers.reported_to(["nosuch"]),
    ):
        pass


def test_named_tracker_is_added_to_the_trainer(monkeypatch: pytest.MonkeyPatch) -> None:
    from transformers import TrainerCallback
    from transformers.integrations import integration_utils

    class Tracker(TrainerCallback):  # type: ignore[misc]
        pass

    class Missing(TrainerCallback):  # type: ignore[misc]
        def __init__(self) -> None:
            raise RuntimeError("It requires missing to be installed.")

    monkeypatch.setitem(integration_utils.INTEGRATION_TO_CALLBACK, "mine", Tracker)
    monkeypatch.setitem(integration_utils.INTEGRATION_TO_CALLBACK, "missing", Missing)
    added: list[Any] = []
    trainer = SimpleNamespace(add_callback=added.append)
    with trackers.reported_to(["none"]):
        trackers.add(trainer)
    with trackers.reported_to(["mine"]):
        trackers.add(trainer)
    trackers.add(trainer)  # after the block there is none again
    assert added == [Tracker]
    trainer = SimpleNamespace(add_callback=lambda kind: kind())  # as the trainer makes it
    with trackers.reported_to(["missing"]), pytest.raises(EnvironmentIncomplete, match="requires missing to be installed"):
        trackers.add(trainer)
