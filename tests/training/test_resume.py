"""A run that was cut off and resumed ends with the same bytes as one that was not; nothing half-written is used."""

import json
import random
import shutil
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from appliance import artifacts
from appliance.training import loop, run_files, samples
from tests.running import Trained, call, kill_when, run, start

NEEDED = {"base": ("data",), "sft": ("data", "base"), "dpo": ("data", "base", "sft")}
WEIGHTS = {"base": "model.safetensors", "sft": "adapter_model.safetensors", "dpo": "adapter_model.safetensors"}
# adapter_config.json names the base's folder, and PEFT writes its modules in the order of a set.
WITH_PATHS_AND_TIMES = {artifacts.MANIFEST, run_files.REPORT, "loss.jsonl", "adapter_config.json"}
SLOW = [pytest.param("base", marks=pytest.mark.slow), "sft", pytest.param("dpo", marks=pytest.mark.slow)]


def partial(trained: Trained, phase: str, root: Path) -> Path:
    made = trained.made[phase]
    return root / made.parent.name / f"{made.name}{artifacts.PARTIAL}"


def complete_checkpoints(folder: Path) -> list[str]:
    return sorted(each.parent.name for each in folder.glob(f"{loop.CHECKPOINTS}/*/{loop.COMPLETE}"))


def assert_same_as_uninterrupted(trained: Trained, phase: str, root: Path) -> None:
    again, whole = root / trained.made[phase].relative_to(trained.root), trained.made[phase]
    files = [each.name for each in whole.iterdir() if each.name not in WITH_PATHS_AND_TIMES]
    assert WEIGHTS[phase] in files
    for name in files:
        assert (again / name).read_bytes() == (whole / name).read_bytes(), name
    losses = [[json.loads(line) for line in (folder / loop.LOSS).read_text().splitlines()] for folder in (again, whole)]
    kept = ("step", "loss", "grad_norm", "learning_rate", "rows", "validation_loss")
    figures = [[{key: point.get(key) for key in kept} for point in points] for points in losses]
    assert figures[0] == figures[1]
    assert artifacts.load(again).results == trained.manifest(phase)["results"]
    assert not partial(trained, phase, root).exists()


@pytest.fixture
def interrupt(monkeypatch: pytest.MonkeyPatch) -> Callable[[int], None]:
    """Makes the first run end as by Ctrl-C right after the checkpoint of a step; later runs are left alone."""
    real = loop._callback

    def at(step: int) -> None:
        def stopping(*arguments: Any) -> Any:
            watch = real(*arguments)
            save = watch.on_save

            def on_save(args: Any, state: Any, control: Any, **others: Any) -> None:
                save(args, state, control, **others)
                if state.global_step == step:
                    monkeypatch.setattr(loop, "_callback", real)
                    raise KeyboardInterrupt

            watch.on_save = on_save
            return watch

        monkeypatch.setattr(loop, "_callback", stopping)

    return at


@pytest.mark.parametrize(("phase", "step"), [("base", 20), ("sft", 10), ("dpo", 3)])
def test_resumed_equals_uninterrupted(
    trained: Trained, root: Path, phase: str, step: int, interrupt: Callable[[int], None]
) -> None:
    trained.copy(root, *NEEDED[phase])
    interrupt(step)
    first = call("train", trained.recipe, "--phase", phase)
    assert first.exit_code == 130
    folder = partial(trained, phase, root)
    assert f"checkpoint-{step}" in complete_checkpoints(folder)
    half = folder / loop.CHECKPOINTS / "checkpoint-9999"  # a save that was cut off
    shutil.copytree(folder / loop.CHECKPOINTS / f"checkpoint-{step}", half)
    (half / loop.COMPLETE).unlink()
    (half / "trainer_state.json").write_text("{")
    second = call("train", trained.recipe, "--phase", phase, "--resume")
    assert second.exit_code == 0, second.stderr
    assert f"continuing after step {step}" in second.stderr
    assert_same_as_uninterrupted(trained, phase, root)


@pytest.mark.parametrize(
    ("phase", "step", "sets"),
    [
        ("sft", 5, ("sft.epochs=3", "sft.optimizer=adamw_8bit", "sft.packing=true", "lora.dora=true", "lora.dropout=0.1")),
        ("sft", 5, ("sft.epochs=3", "sft.optimizer=adafactor", "sft.scheduler=linear", "lora.targets=mlp")),
        ("kto", 2, ("kto.epochs=4", "kto.accumulate=1", "kto.checkpoint_steps=2")),
        ("orpo", 2, ("orpo.epochs=4", "orpo.accumulate=1", "orpo.checkpoint_steps=2")),
    ],
    ids=["8 bits, packed, DoRA", "adafactor", "kto", "orpo"],
)
def test_resumed_equals_uninterrupted_with_other_settings(
    trained: Trained,
    root: Path,
    phase: str,
    step: int,
    sets: tuple[str, ...],
    interrupt: Callable[[int], None],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    phases = () if phase == "sft" else (f'phases=["sft", "{phase}"]', f"{phase}.max_tokens=256")
    flags = ["--phase", phase, *(flag for each in (*phases, *sets) for flag in ("--set", each))]
    made = []
    for name in ("whole", "again"):
        folder = root / name
        trained.copy(folder, "base", *(("sft",) if phase != "sft" else ()))
        monkeypatch.setenv("APPLIANCE_ARTIFACTS", str(folder))
        if name == "again":
            interrupt(step)
            assert call("train", trained.recipe, *flags).exit_code == 130
        result = call("train", trained.recipe, *flags, "--resume", "--json")
        assert result.exit_code == 0, result.stderr
        assert (f"continuing after step {step}" in result.stderr) == (name == "again")
        made.append(Path(json.loads(result.stdout)["artifact"]))
    whole, again = made
    assert (again / WEIGHTS["sft"]).read_bytes() == (whole / WEIGHTS["sft"]).read_bytes()
    assert artifacts.load(again).results == artifacts.load(whole).results


@pytest.mark.parametrize("phase", SLOW)
def test_killed_and_resumed_equals_uninterrupted(trained: Trained, root: Path, phase: str) -> None:
    trained.copy(root, *NEEDED[phase])
    folder = partial(trained, phase, root)
    process = start(root, "train", trained.recipe, "--phase", phase)
    assert kill_when(process, lambda: bool(complete_checkpoints(folder)), signal.SIGKILL) == -signal.SIGKILL
    assert not (folder / artifacts.MANIFEST).exists()

    refused = call("train", trained.recipe, "--phase", phase)
    assert refused.exit_code == 1
    assert "An interrupted run stopped after step" in refused.stderr
    assert "pass --resume, or --restart" in refused.stderr
    assert complete_checkpoints(folder)

    resumed = run(root, "train", trained.recipe, "--phase", phase, "--resume")
    assert resumed.returncode == 0, resumed.stderr
    assert "continuing after step" in resumed.stderr
    assert_same_as_uninterrupted(trained, phase, root)


def kill_at_random(root: Path, folder: Path, steps: int, *arguments: str | Path) -> list[tuple[int, float]]:
    """Three times, each at a step of its own and some way into what comes after it: a save, as likely as a step."""
    chance = random.Random()
    moments = [(chance.randrange(1, steps), chance.random() * 0.3) for _ in range(3)]
    for step, seconds in moments:
        process = start(root, "train", *arguments, "--resume")

        def is_there(step: int = step, seconds: float = seconds) -> bool:
            curve = folder / loop.LOSS
            if not curve.exists() or len(curve.read_text().splitlines()) < step:
                return False
            time.sleep(seconds)
            return True

        assert kill_when(process, is_there, signal.SIGKILL) == -signal.SIGKILL, moments
    return moments


@pytest.mark.slow
@pytest.mark.parametrize("phase", ["sft", "dpo"])
def test_killed_at_random_moments_and_resumed_equals_uninterrupted(trained: Trained, root: Path, phase: str) -> None:
    trained.copy(root, *NEEDED[phase])
    arguments, steps = (trained.recipe, "--phase", phase), trained.manifest(phase)["results"]["steps"]
    moments = kill_at_random(root, partial(trained, phase, root), steps, *arguments)
    resumed = run(root, "train", *arguments, "--resume")
    assert resumed.returncode == 0, (moments, resumed.stderr)
    assert_same_as_uninterrupted(trained, phase, root)


def test_restart_discards_what_was_left(trained: Trained, root: Path, interrupt: Callable[[int], None]) -> None:
    trained.copy(root, *NEEDED["sft"])
    interrupt(10)
    assert call("train", trained.recipe, "--phase", "sft").exit_code == 130
    restarted = call("train", trained.recipe, "--phase", "sft", "--restart")
    assert restarted.exit_code == 0, restarted.stderr
    assert "continuing" not in restarted.stderr
    assert_same_as_uninterrupted(trained, "sft", root)


def test_half_written_checkpoint_alone_means_a_fresh_start(
    trained: Trained, root: Path, interrupt: Callable[[int], None]
) -> None:
    trained.copy(root, *NEEDED["sft"])
    interrupt(5)
    assert call("train", trained.recipe, "--phase", "sft").exit_code == 130
    for mark in partial(trained, "sft", root).rglob(loop.COMPLETE):
        mark.unlink()
    again = call("train", trained.recipe, "--phase", "sft")  # nothing to resume, so nothing to ask
    assert again.exit_code == 0, again.stderr
    assert_same_as_uninterrupted(trained, "sft", root)


def test_run_cut_off_after_its_last_step_resumes(trained: Trained, root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    trained.copy(root, *NEEDED["sft"])

    def cut_off(*_: Any) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(samples, "write", cut_off)
        assert call("train", trained.recipe, "--phase", "sft").exit_code == 130
    resumed = call("train", trained.recipe, "--phase", "sft", "--resume")
    assert resumed.exit_code == 0, resumed.stderr
    assert "continuing after step 30" in resumed.stderr
    assert_same_as_uninterrupted(trained, "sft", root)


def test_a_finished_phase_is_left_alone(trained: Trained, root: Path) -> None:
    trained.copy(root, *NEEDED["dpo"])
    manifest = root / trained.made["sft"].relative_to(trained.root) / artifacts.MANIFEST
    before = manifest.stat().st_mtime_ns
    for flags in ((), ("--resume",), ("--restart",)):
        result = call("train", trained.recipe, "--phase", "sft", *flags)
        assert result.exit_code == 0
        assert "(unchanged)" in result.stdout
    assert manifest.stat().st_mtime_ns == before


def test_another_setting_is_another_adapter(trained: Trained, root: Path) -> None:
    trained.copy(root, *NEEDED["sft"])
    result = call("train", trained.recipe, "--phase", "sft", "--set", "starter.epochs=6", "--dry-run", "--json")
    assert json.loads(result.stdout)["artifact"].endswith(trained.made["sft"].name)
    result = call("train", trained.recipe, "--phase", "sft", "--set", "sft.epochs=11", "--dry-run", "--json")
    assert json.loads(result.stdout)["state"] == "to make"
