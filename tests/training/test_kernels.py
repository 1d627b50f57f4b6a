"""Optimizers and kernels: the chosen one is used, and what this machine cannot run is said before training."""

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from appliance import recipe as recipes
from appliance.errors import EnvironmentIncomplete
from appliance.training import adapters, kernels, loop, rungs, sft
from appliance.training import model as models
from appliance.training.labels import LabelledRow
from appliance.training_settings import Grpo, Phase, Sft
from tests import tiny_recipe
from tests.running import Trained, call


def refused(section: str, settings: Phase) -> str:
    with pytest.raises(EnvironmentIncomplete) as caught:
        kernels.require(section, settings)
    return str(caught.value)


@pytest.fixture
def card(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Makes torch find a card of this compute capability."""

    def find(*capability: int) -> None:
        monkeypatch.setattr("torch.cuda.is_available", lambda: True)
        monkeypatch.setattr("torch.cuda.get_device_capability", lambda *_: capability)

    return find


def test_what_is_left_at_its_default_needs_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernels, "_step", lambda **_: pytest.fail("bitsandbytes was asked"))
    kernels.require("sft", Sft())
    kernels.require("grpo", Grpo(optimizer="adafactor"))


def test_eight_bits_are_tried(monkeypatch: pytest.MonkeyPatch) -> None:
    kernels.require("sft", Sft(optimizer="adamw_8bit"))

    def fail(*_: Any, **__: Any) -> None:
        raise RuntimeError("no kernel image is available\nand more")

    monkeypatch.setattr("bitsandbytes.optim.AdamW8bit.step", fail)
    said = refused("dpo", Sft(optimizer="adamw_8bit"))
    assert "dpo.optimizer = 'adamw_8bit' cannot be used here" in said
    assert "(no kernel image is available)" in said
    assert "'adamw' or 'adafactor'" in said


def test_paging_needs_a_card() -> None:
    assert "would quietly not page; take 'adamw_8bit'" in refused("sft", Sft(optimizer="paged_adamw_8bit"))


def test_liger_needs_a_recent_card_and_its_package(card: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    assert "sft.liger = true needs a card" in refused("sft", Sft(liger=True))
    card(6, 0)
    assert "compute capability 7.0 or more, for Triton; this one has 6.0" in refused("sft", Sft(liger=True))
    card(7, 5)
    monkeypatch.setattr("importlib.util.find_spec", lambda _: None)
    assert "needs the package liger-kernel" in refused("sft", Sft(liger=True))
    monkeypatch.setattr("importlib.util.find_spec", lambda _: SimpleNamespace())
    kernels.require("sft", Sft(liger=True))


def test_triton_is_not_for_old_cards_though_it_is_installed(card: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    assert not kernels.has_triton()  # no card
    monkeypatch.setattr("importlib.util.find_spec", lambda _: SimpleNamespace())
    card(6, 0)
    assert not kernels.has_triton()  # a P100
    card(8, 6)
    assert kernels.has_triton()
    monkeypatch.setattr("importlib.util.find_spec", lambda _: None)
    assert not kernels.has_triton()


@pytest.mark.parametrize("sets", ["dpo.optimizer=paged_adamw_8bit", "dpo.liger=true"])
def test_refusal_comes_before_the_first_phase(root: Path, tmp_path: Path, sets: str) -> None:
    path = tiny_recipe.write(tmp_path / "recipe")
    result = call("train", path, "--set", sets)
    assert result.exit_code == 3, result.stderr
    assert sets.partition("=")[0] in result.stderr
    assert not root.exists()
    assert call("train", path, "--set", sets, "--dry-run").exit_code == 0


@pytest.mark.parametrize(
    ("optimizer", "module"),
    [("adamw", "torch.optim.adamw"), ("adamw_8bit", "bitsandbytes.optim.adamw"), ("adafactor", "transformers.optimization")],
)
def test_optimizer_is_the_one_asked_for(trained: Trained, root: Path, optimizer: str, module: str) -> None:
    recipe = recipes.load(trained.recipe, [f"sft.optimizer={optimizer}"])
    loop.prepare()
    model = adapters.add(models.load_model(trained.made["base"]), recipe.lora)
    rows = [LabelledRow(1, [5, 6], [5, 6])]
    trainer = sft._trainer(model, models.load_tokenizer(trained.made["base"]), rows, recipe, root, rungs.CPU[0])
    trainer.create_optimizer()
    assert type(trainer.optimizer).__module__ == module
    if optimizer == "adamw_8bit":
        assert trainer.optimizer.args.optim_bits == 8


@pytest.mark.parametrize(
    ("scheduler", "warmup", "expected"),
    [
        ("constant", 0.0, [1.0] * 6),
        ("linear", 0.0, [1.0, 5 / 6, 4 / 6, 3 / 6, 2 / 6, 1 / 6]),
        ("linear", 0.5, [0.0, 1 / 3, 2 / 3, 1.0, 2 / 3, 1 / 3]),
        ("cosine", 0.0, [1.0, 0.933, 0.75, 0.5, 0.25, 0.067]),
    ],
)
def test_learning_rate_takes_its_course(
    trained: Trained, root: Path, scheduler: str, warmup: float, expected: list[float]
) -> None:
    trained.copy(root, "data", "base")
    sets = ("sft.epochs=2", "sft.learning_rate=1e-3", f"sft.scheduler={scheduler}", f"sft.warmup_ratio={warmup}")
    flags = [flag for each in (*sets, "sft.optimizer=adafactor") for flag in ("--set", each)]
    result = call("train", trained.recipe, "--phase", "sft", *flags, "--json")
    assert result.exit_code == 0, result.stderr
    folder = Path(json.loads(result.stdout)["artifact"])
    rates = [json.loads(line)["learning_rate"] for line in (folder / loop.LOSS).read_text().splitlines()]
    assert rates == pytest.approx([1e-3 * each for each in expected], abs=1e-6)


@pytest.mark.parametrize("norm", [0.0, 1e-6, 1.0])
def test_gradients_are_shortened_to_the_norm_asked_for(trained: Trained, root: Path, norm: float) -> None:
    recipe = recipes.load(trained.recipe, [f"grpo.max_gradient_norm={norm}", "grpo.answers=2"])
    assert loop.arguments(root, recipe.grpo, 1)["max_grad_norm"] == norm
