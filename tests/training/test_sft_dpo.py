"""SFT learns, DPO continues SFT's adapter with its frozen copy as reference, and what is kept is what a person needs."""

import json
import math
import shutil
from pathlib import Path
from typing import Any

import pytest

from appliance import recipe as recipes
from appliance.artifacts import digest_of
from appliance.data.check import read_rows
from appliance.training import adapters, dpo, loop, preferences, rungs
from appliance.training import model as models
from appliance.training.model import Base
from tests import tiny_recipe
from tests.running import Trained, call


def curve(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / loop.LOSS).read_text().splitlines()]


def adapter_weights(model: Any, name: str) -> dict[str, str]:
    """The hash of every LoRA factor of the adapter `name`."""
    suffix = f".{name}.weight"
    return {
        key.removesuffix(suffix): digest_of(value.detach().tolist())
        for key, value in model.named_parameters()
        if key.endswith(suffix)
    }


def continued(trained: Trained) -> Any:
    return adapters.continued(Base(trained.made["base"], ""), trained.made["sft"], rungs.CPU[0])


@pytest.mark.parametrize(("step", "first", "final"), [("base", 4.0, 0.5), ("sft", 1.0, 0.5), ("dpo", 0.69, 0.55)])
def test_loss_goes_down(trained: Trained, step: str, first: float, final: float) -> None:
    results = trained.manifest(step)["results"]
    points = curve(trained.made[step])
    assert [point["step"] for point in points] == list(range(1, results["steps"] + 1))
    assert points[0]["loss"] == results["first_loss"] > first
    assert results["final_loss"] < final
    assert (trained.made[step] / "loss.png").read_bytes().startswith(b"\x89PNG")


def test_only_assistant_tokens_are_counted_as_learned(trained: Trained) -> None:
    results = trained.manifest("sft")["results"]
    assert 0 < results["learned_tokens"] < results["tokens"] / 2


@pytest.mark.parametrize("step", ["sft", "dpo"])
def test_adapter_artifact_holds_one_adapter_and_no_checkpoint(trained: Trained, step: str) -> None:
    names = {each.name for each in trained.made[step].iterdir()}
    assert names == {
        *("adapter_config.json", "adapter_model.safetensors", "README.md", "manifest.json"),
        *("loss.jsonl", "loss.png", "samples.json", "run.html", "run.lock.json"),
        *(("learned.json",) if step == "sft" else ()),
    }


def test_samples_show_what_training_changed(trained: Trained) -> None:
    samples = json.loads((trained.made["dpo"] / "samples.json").read_text())
    assert [sample["language"] for sample in samples] == ["nl", "en"]
    for sample in samples:
        assert sample["adapter"] == sample["trained_for"] != sample["base"]


def test_manifest_says_where_it_came_from(trained: Trained) -> None:
    ids = {step: f"{path.parent.name}/{path.name}" for step, path in trained.made.items()}
    assert trained.manifest("sft")["parents"] == [ids["data"], ids["base"]]
    assert trained.manifest("dpo")["parents"] == [ids["data"], ids["base"], ids["sft"]]
    assert trained.manifest("sft")["config"]["sft"]["epochs"] == 10
    assert trained.manifest("sft")["config"]["seed"] == 3407


def test_dpo_starts_from_the_adapter_of_sft(trained: Trained) -> None:
    from safetensors.torch import load_file

    saved = load_file(trained.made["sft"] / "adapter_model.safetensors")
    expected = {key.removesuffix(".weight"): digest_of(value.tolist()) for key, value in saved.items()}
    model = continued(trained)
    assert adapter_weights(model, "default") == expected
    assert all(value.requires_grad == ("lora_" in key) for key, value in model.named_parameters())
    assert expected != {
        key.removesuffix(".weight"): digest_of(value.tolist())
        for key, value in load_file(trained.made["dpo"] / "adapter_model.safetensors").items()
    }


def test_reference_is_the_frozen_copy_of_that_adapter(trained: Trained, root: Path) -> None:
    model = continued(trained)
    before = adapter_weights(model, "default")
    recipe = recipes.load(trained.recipe)
    tokenizer = models.load_tokenizer(trained.made["base"])
    loop.prepare()
    trainer = dpo.trainer(
        model,
        tokenizer,
        preferences.read_checked(tokenizer, trained.made["data"], recipe, "dpo"),
        recipe,
        root,
        rungs.CPU[0],
    )
    assert adapter_weights(model, adapters.REFERENCE) == before
    trainer.train()
    assert adapter_weights(model, adapters.REFERENCE) == before
    assert adapter_weights(model, "default") != before
    assert not any(value.requires_grad for key, value in model.named_parameters() if f".{adapters.REFERENCE}." in key)


def test_first_loss_of_dpo_is_that_of_two_equal_models(trained: Trained) -> None:
    assert trained.manifest("dpo")["results"]["first_loss"] == pytest.approx(math.log(2), abs=1e-3)


def test_preferences_improve(trained: Trained) -> None:
    results = trained.manifest("dpo")["results"]
    assert results["reward_accuracy"] == 1.0
    assert results["margin_after_nats"] > results["margin_before_nats"] > 0
    assert results["accuracy_after"] >= results["accuracy_before"]
    margins = [point["rewards/margins"] for point in curve(trained.made["dpo"])]
    assert margins[0] == pytest.approx(0, abs=1e-4)
    assert margins[-1] > 0.1


def test_measured_margins_are_those_of_the_models(trained: Trained) -> None:
    """The manifest's figure, computed again from the two adapters on disk."""
    base = models.load_model(trained.made["base"])
    from peft import PeftModel

    model = PeftModel.from_pretrained(base, trained.made["sft"], adapter_name="sft")
    model.load_adapter(trained.made["dpo"], adapter_name="dpo")
    pairs = preferences.tokenize(models.load_tokenizer(trained.made["base"]), read_rows(trained.made["data"], "dpo"))
    scores = {}
    for name in ("sft", "dpo"):
        model.set_adapter(name)
        scores[name] = preferences.score(model, pairs)
    again = preferences.compare(pairs, scores["sft"], scores["dpo"])
    results = trained.manifest("dpo")["results"]
    assert again == pytest.approx({key: results[key] for key in again}, abs=1e-3)


@pytest.mark.parametrize(("phase", "steps"), [("sft", 6), ("dpo", 4)])
def test_eight_rows_one_by_one_are_a_step_of_eight(
    trained: Trained, root: Path, tmp_path: Path, phase: str, steps: int
) -> None:
    """Rows of different lengths: each token counts the same, whichever micro-batch it is in."""
    trained.copy(root, "data", "base", "sft")
    turns = [(*each[:1], each[1] * count) for count in (1, 2, 3) for each in tiny_recipe.CONVERSATIONS][:16]
    sft = tiny_recipe.write_lines(tmp_path / "sft.jsonl", [{"messages": tiny_recipe.messages(each)} for each in turns])
    base = f"base={trained.made['base']}"
    shared = (base, f"data.sft={sft}", 'phases=["sft"]', "sft.epochs=3") if phase == "sft" else ("dpo.epochs=4",)
    made = []
    for batch_rows, accumulate in ((1, 8), (8, 1)):
        sets = (*shared, f"{phase}.batch_rows={batch_rows}", f"{phase}.accumulate={accumulate}")
        arguments = [part for each in sets for part in ("--set", each)]
        result = call("train", trained.recipe, "--phase", phase, *arguments, "--json")
        assert result.exit_code == 0, result.stderr
        made.append(Path(json.loads(result.stdout)["artifact"]))
    assert_learned_the_same(*made)
    assert len(curve(made[0])) == steps


def assert_learned_the_same(made: Path, expected: Path) -> None:
    """But for the last bits, which another order of adding up changes."""
    from safetensors.torch import load_file

    for point, other in zip(curve(made), curve(expected), strict=True):
        assert point["loss"] == pytest.approx(other["loss"], rel=1e-5), point["step"]
    weights, others = (load_file(folder / "adapter_model.safetensors") for folder in (made, expected))
    assert weights.keys() == others.keys()
    for name, value in weights.items():
        assert (value - others[name]).abs().max() < 1e-4, name


def test_learning_rate_that_diverges_is_an_error(trained: Trained, root: Path) -> None:
    trained.copy(root, "data", "base")
    settings = ("--set", "sft.learning_rate=1e30", "--set", "sft.warmup_ratio=0.0")
    result = call("train", trained.recipe, "--phase", "sft", *settings)
    assert result.exit_code == 1
    assert "diverged" in result.stderr
    assert not list(root.glob("adapter/*/manifest.json"))


@pytest.mark.parametrize(
    ("arguments", "code", "said"),
    [
        (("--phase", "passages"), 2, "--phase passages: the recipe's phases are sft, dpo"),
        (("--phase", "grpo"), 2, "--phase grpo: the recipe's phases are sft, dpo"),
        (("--phase", "base", "--set", "base=/somewhere"), 2, "--phase base makes the starter only"),
        (("--phase", "dpo", "--set", 'phases=["sft"]'), 2, "the recipe's phases are sft"),
        (("--phase", "sft"), 1, "is not made yet; run `appliance train RECIPE --phase base` first"),
        (("--set", "base=some/model"), 3, "run `appliance pull some/model` first"),
        (("--set", "base=./nowhere"), 2, "is neither 'starter', nor a folder, nor an id"),
    ],
)
def test_what_cannot_be_trained(trained: Trained, arguments: tuple[str, ...], code: int, said: str) -> None:
    result = call("train", trained.recipe, *arguments)
    assert result.exit_code == code, result.stderr
    assert said in result.stderr


def test_dry_run_makes_nothing(trained: Trained, root: Path) -> None:
    result = call("train", trained.recipe, "--dry-run")
    assert result.exit_code == 0, result.stderr
    assert [line.partition(":")[0] for line in result.stdout.splitlines()] == ["base", "sft", "dpo"]
    assert result.stdout.count("(to make)") == 3
    assert not root.exists()


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"config.json": None}, "has no config.json"),
        ({"config.json": "{"}, "config.json"),
        ({"config.json": '{"model_type": "t5", "architectures": ["T5ForConditionalGeneration"]}'}, "is of type 't5'"),
        ({"tokenizer.json": None}, "has no tokenizer (tokenizer.json"),
        ({"model.safetensors": None}, "has no .safetensors file"),
        ({"model.safetensors": "garbage"}, "cannot be loaded"),
        ({"chat_template.jinja": None}, "has no chat template"),
    ],
)
def test_unusable_base_folder(trained: Trained, root: Path, tmp_path: Path, change: dict[str, Any], said: str) -> None:
    base = tmp_path / "base model"
    shutil.copytree(trained.made["base"], base, ignore=shutil.ignore_patterns("manifest.json"))
    for name, text in change.items():
        (base / name).unlink()
        if text is not None:
            (base / name).write_text(text)
    result = call("train", trained.recipe, "--phase", "sft", "--set", f"base={base}")
    assert result.exit_code == 1, result.stderr
    assert said in result.stderr
    assert not list(root.glob("adapter/*/*.safetensors"))


def test_tokenizer_of_another_model_is_refused(trained: Trained, root: Path, tmp_path: Path) -> None:
    base = tmp_path / "base model"
    shutil.copytree(trained.made["base"], base, ignore=shutil.ignore_patterns("manifest.json"))
    config = json.loads((base / "config.json").read_text())
    (base / "config.json").write_text(json.dumps({**config, "vocab_size": config["vocab_size"] - 1}))
    result = call("train", trained.recipe, "--phase", "sft", "--set", f"base={base}")
    assert result.exit_code == 1, result.stderr
    rows = config["vocab_size"] - 1
    assert f"gives token ids up to {rows}, the model has embeddings for {rows}" in " ".join(result.stderr.split())
    assert not list(root.glob("adapter/*/*.safetensors"))


def test_too_long_triplet_is_said_before_sft(trained: Trained, root: Path) -> None:
    trained.copy(root, "data", "base")
    result = call("train", trained.recipe, "--phase", "sft", "--set", "dpo.max_tokens=16", "--set", "sft.epochs=99")
    assert result.exit_code == 1
    assert "dpo.jsonl line 1: " in result.stderr
    assert "dpo.max_tokens = 16" in result.stderr
    assert not (root / "adapter").exists() or not list((root / "adapter").glob("*/manifest.json"))
