"""Models laid out on each rung are trained alike: to the bit where only memory differs, in four bits nearly."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from appliance import allocator, artifacts
from appliance import recipe as recipes
from appliance.errors import ArtifactError
from appliance.training import adapters, layout, loop, rungs, sft
from appliance.training import model as models
from appliance.training.labels import LabelledRow
from tests.running import Trained, call

STREAMED = rungs.CARD[-1]
QLORA, TIGHT = rungs.CPU[-2:]


def made(root: Path) -> dict[str, Any]:
    (folder,) = (each for each in root.glob("adapter/*") if (each / artifacts.MANIFEST).is_file())
    losses = [json.loads(line)["loss"] for line in (folder / loop.LOSS).read_text().splitlines()]
    return {"losses": losses, **artifacts.load(folder).results}


def train(trained: Trained, root: Path, rung: str) -> dict[str, Any]:
    chosen = (f"base={trained.made['base']}", f"memory.rung={rung}", "sft.epochs=3")
    flags = [flag for each in chosen for flag in ("--set", each)]
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("APPLIANCE_ARTIFACTS", str(root))
        result = call("train", trained.recipe, "--phase", "sft", *flags)
    assert result.exit_code == 0, result.stderr
    return made(root)


def test_rungs_of_a_cpu_learn_alike(trained: Trained, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    given_back: list[bool] = []
    monkeypatch.setattr(allocator, "give_back", lambda: given_back.append(True))  # of this process, for good
    found = {rung.name: train(trained, tmp_path / rung.name, rung.name) for rung in rungs.CPU}
    assert found["lora"]["losses"] == pytest.approx(found["lora-recomputed"]["losses"], rel=1e-5)
    assert found["qlora"]["losses"] == pytest.approx(found["lora"]["losses"], rel=0.2)
    assert found["qlora"]["losses"] != found["lora"]["losses"]
    assert [found[rung.name]["trained_on"] for rung in rungs.CPU] == ["16-bit", "16-bit", "nf4", "nf4"]
    assert found[TIGHT.name]["losses"] == found[QLORA.name]["losses"]
    assert given_back == [True]


def losses(trained: Trained, folder: Path, rung: rungs.Rung) -> list[float]:
    """Of a short run, as the trainer logs them, and of an answer after it."""
    recipe = recipes.load(trained.recipe, ["sft.epochs=2", "sft.accumulate=1"])
    base = trained.made["base"]
    rows = [
        LabelledRow(line, ids, [-100] * 3 + ids[3:])
        for line, ids in enumerate([[5 + (3 * start + step) % 90 for step in range(20)] for start in range(6)], 1)
    ]
    torch.manual_seed(recipe.seed)
    model = adapters.add(layout.load(base, rung), recipe.lora)
    trainer = sft._trainer(model, models.load_tokenizer(base), rows, recipe, folder, rung)
    layout.settle(trainer, rung)
    trainer.train()
    model.eval()
    with torch.no_grad():
        after = model(input_ids=torch.tensor([rows[0].input_ids])).logits.float().std().item()
    return [*(entry["loss"] for entry in trainer.state.log_history if "loss" in entry), after]


@pytest.mark.parametrize("rung", [rungs.CARD[3], STREAMED], ids=lambda rung: rung.name)
def test_what_lies_in_memory_learns_what_lies_on_the_device(trained: Trained, tmp_path: Path, rung: rungs.Rung) -> None:
    """The card's rungs, on the CPU, where bringing layers and parts of the head moves them from memory to memory."""
    fields = {name: getattr(rung, name) for name in rung.__slots__}
    without = rungs.Rung(**{**fields, "inputs_in_memory": rung.streams})  # TRL moves inputs from cards only
    found = losses(trained, tmp_path / "there", without)
    assert found == pytest.approx(losses(trained, tmp_path / "here", QLORA), rel=1e-3)


def test_trained_weights_are_in_32_bits_whatever_the_base(trained: Trained, tmp_path: Path) -> None:
    recipe = recipes.load(trained.recipe)
    model = adapters.add(layout.load(trained.made["base"], QLORA), recipe.lora)
    row = LabelledRow(1, [5, 6, 7, 8], [-100, 6, 7, 8])
    trainer = sft._trainer(model, models.load_tokenizer(trained.made["base"]), [row], recipe, tmp_path, QLORA)
    layout.settle(trainer, QLORA)
    assert {each.dtype for each in model.parameters() if each.requires_grad} == {torch.float32}


def test_run_goes_on_as_it_was_begun(tmp_path: Path) -> None:
    layout.remember(tmp_path, QLORA)
    assert layout.remembered(tmp_path) == QLORA
    layout.remember(tmp_path, STREAMED)
    with pytest.raises(ArtifactError, match="was begun as 'streamed' in float32, on another device"):
        layout.remembered(tmp_path)


def test_answering_does_not_change_weights_in_four_bits(trained: Trained) -> None:
    model = layout.load(trained.made["base"], QLORA).eval()
    before = {name: each.clone() for name, each in model.named_parameters()}
    with torch.no_grad():
        model(input_ids=torch.tensor([[5, 6, 7]]))
    assert all(torch.equal(each, before[name]) for name, each in model.named_parameters())
