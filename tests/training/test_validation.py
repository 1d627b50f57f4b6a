"""Held-out rows while training: how often, which adapter is kept, when it stops; and the same after an interruption."""

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from appliance import artifacts, recipe
from appliance.training import curve, labels, loop, sft, validation
from appliance.training import model as models
from appliance.training.conversations import Conversations
from tests import tiny_recipe
from tests.running import Trained, call, run
from tests.training.test_resume import kill_at_random

HELDOUT = (
    ("Waar is de brug?", "De brug is naast de balie."),
    ("Where is the bridge?", "The bridge is next to the desk."),
    ("Mag mijn kat mee?", "Nee, helaas niet."),
)
ADAPTER = "adapter_model.safetensors"


@dataclass(frozen=True, slots=True)
class Validated:
    """SFT of the tiny recipe with rows held out, on the base that is there."""

    root: Path
    flags: tuple[str, ...]
    folder: Path
    stderr: str

    @property
    def results(self) -> Any:
        return artifacts.load(self.folder).results

    def measured(self) -> list[tuple[int, float]]:
        return [(line["step"], line["validation_loss"]) for line in lines(self.folder) if "validation_loss" in line]


def lines(folder: Path) -> list[dict[str, Any]]:
    return curve.read_lines(folder)


def flags(trained: Trained, folder: Path, *sets: str) -> tuple[str, ...]:
    rows = [{"messages": tiny_recipe.messages(turns)} for turns in HELDOUT]
    heldout = tiny_recipe.write_lines(folder / "heldout.jsonl", rows)
    all_sets = (f"base={trained.made['base']}", f"data.heldout={heldout}", 'phases=["sft"]', *sets)
    return ("--phase", "sft", *(flag for each in all_sets for flag in ("--set", each)))


def made(root: Path) -> Path:
    (manifest,) = root.glob(f"adapter/*/{artifacts.MANIFEST}")
    return manifest.parent


@pytest.fixture(scope="module")
def validated(trained: Trained, tmp_path_factory: pytest.TempPathFactory) -> Validated:
    folder = tmp_path_factory.mktemp("validated")
    chosen = flags(trained, folder)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("APPLIANCE_ARTIFACTS", str(folder / "artifacts"))
        result = call("train", trained.recipe, *chosen)
    assert result.exit_code == 0, result.stderr
    return Validated(folder / "artifacts", chosen, made(folder / "artifacts"), result.stderr)


@pytest.mark.parametrize(
    ("reading", "step", "steps"), [(100, 1000.0, 30), (8000, 500.0, 2000), (50_000, 100.0, 40), (1, 1.0, 1)]
)
def test_share_of_the_time_stays_under_a_fifth(reading: int, step: float, steps: int) -> None:
    interval = validation.every(reading, step, steps)
    assert validation.share(reading, step, interval) <= validation.AIMED_SHARE + 1e-9
    assert steps // interval <= validation.MOST_VALIDATIONS


def test_best_is_read_from_the_curve(tmp_path: Path) -> None:
    (tmp_path / curve.LOSS).write_text("")
    assert validation.best(tmp_path) is None
    figures = [(2, 1.5), (4, 1.1), (6, 1.1), (8, 1.3)]
    text = [json.dumps({"step": step, "loss": 1.0, "validation_loss": loss}) + "\n" for step, loss in figures]
    (tmp_path / curve.LOSS).write_text("".join([*text, '{"step": 9, "validation_loss": 0.1']))
    assert validation.best(tmp_path) == validation.Best(step=4, loss=1.1, later=2)


def test_validation_is_recorded_and_said(validated: Validated) -> None:
    measured = validated.measured()
    assert measured[-1][0] == 30
    assert len(measured) >= 3
    assert "validation: 3 of 3 held-out rows every" in validated.stderr
    assert "the adapter of the best step is kept" in validated.stderr


def test_every_step_says_its_rows_and_what_it_cost(validated: Validated) -> None:
    points = lines(validated.folder)
    assert all(len(point["rows"]) == 2 and point["seconds"] > 0 and point["memory_bytes"] > 1e6 for point in points)
    assert all(point["grad_norm"] > 0 and "learning_rate" in point for point in points)
    assert all("tokens_per_second" in point for point in points[1:])
    epoch = sorted(line for point in points[:3] for line in point["rows"])
    assert epoch == list(range(1, 7))


def test_kept_adapter_is_the_best_one(validated: Validated, trained: Trained) -> None:
    """Its loss on the held-out rows, computed again from the files by itself."""
    import torch
    from peft import PeftModel

    loss, step = min((loss, step) for step, loss in validated.measured())
    results = validated.results
    assert (results["kept_step"], results["best_step"], results["best_validation_loss"]) == (step, step, loss)
    assert step < 30, "the last step was the best, so that nothing is shown"
    tokenizer = models.load_tokenizer(trained.made["base"])
    rows = [{"line": 1, "messages": tiny_recipe.messages(turns)} for turns in HELDOUT]
    template = models.marked_template(trained.made["base"], tokenizer)
    model = PeftModel.from_pretrained(models.load_model(trained.made["base"]), validated.folder).eval()
    total = learned = 0.0
    for row in labels.label_conversations(tokenizer, rows, template):
        ids = torch.tensor([row.input_ids])
        with torch.no_grad():
            mean = model(input_ids=ids, labels=torch.tensor([row.labels])).loss
        count = sum(label != labels.IGNORED for label in row.labels)
        total, learned = total + float(mean) * count, learned + count
    assert total / learned == pytest.approx(loss, abs=1e-4)
    assert not (validated.folder / loop.CHECKPOINTS).exists()


@pytest.mark.parametrize("step", [5, 20])
def test_resumed_with_validation_equals_uninterrupted(
    validated: Validated, trained: Trained, root: Path, step: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(loop, "_callback", interrupted_at(step))
        assert call("train", trained.recipe, *validated.flags).exit_code == 130
    again = call("train", trained.recipe, *validated.flags, "--resume")
    assert again.exit_code == 0, again.stderr
    assert f"continuing after step {step}" in again.stderr
    folder = made(root)
    assert (folder / ADAPTER).read_bytes() == (validated.folder / ADAPTER).read_bytes()
    assert artifacts.load(folder).results == validated.results
    kept = ("step", "loss", "rows", "validation_loss")
    assert [[line.get(key) for key in kept] for line in lines(folder)] == [
        [line.get(key) for key in kept] for line in lines(validated.folder)
    ]


@pytest.mark.slow
def test_killed_at_random_moments_with_validation_equals_uninterrupted(
    validated: Validated, trained: Trained, root: Path
) -> None:
    """Also while the best adapter is kept, or one that is no longer the best is removed."""
    whole = validated.folder
    arguments = (trained.recipe, *validated.flags)
    moments = kill_at_random(root, root / "adapter" / f"{whole.name}{artifacts.PARTIAL}", 30, *arguments)
    resumed = run(root, "train", *arguments, "--resume")
    assert resumed.returncode == 0, (moments, resumed.stderr)
    assert (made(root) / ADAPTER).read_bytes() == (whole / ADAPTER).read_bytes(), moments
    assert artifacts.load(made(root)).results == validated.results


def interrupted_at(step: int) -> Callable[..., Any]:
    """A callback that ends the run as Ctrl-C does, two steps after the checkpoint of a step: what came since is lost."""
    real = loop._callback

    def stopping(*arguments: Any) -> Any:
        watch = real(*arguments)
        log = watch.on_log

        def on_log(args: Any, state: Any, control: Any, **others: Any) -> None:
            log(args, state, control, **others)
            if state.global_step == step + 2:
                raise KeyboardInterrupt

        watch.on_log = on_log
        return watch

    return stopping


def test_patience_stops_and_keeps_the_best(trained: Trained, root: Path, tmp_path: Path) -> None:
    """With epochs enough that the held-out loss turns, and stays up, long before the end."""
    result = call("train", trained.recipe, *flags(trained, tmp_path, "sft.patience=2", "sft.epochs=40"))
    assert result.exit_code == 0, result.stderr
    results = artifacts.load(made(root)).results
    assert results["stopped_early"] is True
    assert results["steps"] < 120
    measured = [line["step"] for line in lines(made(root)) if "validation_loss" in line]
    assert measured[-3] == results["kept_step"] == results["best_step"]
    assert measured[-1] == results["steps"]


def test_without_held_out_rows_nothing_is_measured(trained: Trained) -> None:
    assert not any("validation_loss" in line for line in lines(trained.made["sft"]))
    assert "best_step" not in trained.manifest("sft")["results"]
    tiny = recipe.load(trained.recipe)
    assert sft._validation(tiny, trained.made["data"], Conversations(None, [], [], [], 0)) is None


def test_held_out_row_that_is_too_long_is_said(trained: Trained, tmp_path: Path) -> None:
    chosen = flags(trained, tmp_path)
    row = {"messages": tiny_recipe.messages(("Where?", "desk " * 300))}
    tiny_recipe.write_lines(tmp_path / "heldout.jsonl", [row])
    result = call("train", trained.recipe, *chosen)
    assert result.exit_code == 1
    assert "heldout.jsonl line 1: " in result.stderr
