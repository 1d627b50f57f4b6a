"""The adapter that a recipe asks for is the one that is trained, merged and continued."""

import json
from pathlib import Path
from typing import Any

import pytest

from appliance import recipe as recipes
from appliance.errors import RecipeError
from appliance.training import adapters
from appliance.training import model as models
from appliance.training_settings import Lora
from tests.running import Trained, call

QWEN = [
    f"model.layers.{layer}.{name}"
    for layer in range(2)
    for name in (
        *(f"self_attn.{each}_proj" for each in "qkvo"),
        *(f"mlp.{each}_proj" for each in ("gate", "up", "down")),
    )
]
GPT2 = [
    "transformer.h.0.attn.c_attn",
    "transformer.h.0.attn.c_proj",
    "transformer.h.0.mlp.c_fc",
    "transformer.h.0.mlp.c_proj",
]


@pytest.mark.parametrize(
    ("layers", "asked", "expected"),
    [
        (QWEN, "all-linear", "all-linear"),
        (QWEN, ("all-linear", "q_proj"), "all-linear"),
        (QWEN, "mlp", ["mlp.down_proj", "mlp.gate_proj", "mlp.up_proj"]),
        (QWEN, "attention", [f"self_attn.{each}_proj" for each in "koqv"]),
        (QWEN, ("attention", "up_proj"), [*(f"self_attn.{each}_proj" for each in "koqv"), "up_proj"]),
        (QWEN, ("q_proj", "layers.1.mlp.up_proj"), ["layers.1.mlp.up_proj", "q_proj"]),
        (GPT2, "attention", ["attn.c_attn", "attn.c_proj"]),
        (GPT2, "mlp", ["mlp.c_fc", "mlp.c_proj"]),
    ],
)
def test_targets(layers: list[str], asked: Any, expected: Any) -> None:
    assert adapters.targets(layers, Lora(targets=asked)) == expected


@pytest.mark.parametrize("asked", ["proj", "lm_head", "attn", ("q_proj", "query"), "layers.7.mlp.up_proj"])
def test_target_that_names_nothing(asked: Any) -> None:
    with pytest.raises(
        RecipeError, match=r"no linear layer .*; it has down_proj, gate_proj, k_proj, .*'attention' or 'mlp'"
    ):
        adapters.targets(QWEN, Lora(targets=asked))


def test_unknown_target_is_said_before_weights_load(trained: Trained, root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    trained.copy(root, "data", "base")
    monkeypatch.setattr(models, "load_model", lambda _: pytest.fail("weights were loaded"))
    result = call("train", trained.recipe, "--phase", "sft", "--set", 'lora.targets=["q_proj", "c_attn"]')
    assert result.exit_code == 2, result.stderr
    assert "'c_attn' names no linear layer" in result.stderr
    assert "q_proj, up_proj, v_proj" in result.stderr
    assert not list(root.glob("adapter/*"))


def test_targets_of_a_recipe(trained: Trained) -> None:
    assert recipes.load(trained.recipe).lora.targets == "all-linear"
    assert recipes.load(trained.recipe, ["lora.targets=mlp"]).lora.targets == "mlp"
    assert recipes.load(trained.recipe, ['lora.targets=["q_proj"]']).lora.targets == ("q_proj",)
    for wrong, said in (("[]", "must name at least one"), ("3", "expected str"), ("[3]", r"targets\[0\]: expected str")):
        with pytest.raises(RecipeError, match=said):
            recipes.load(trained.recipe, [f"lora.targets={wrong}"])


@pytest.mark.parametrize(
    ("sets", "settings", "per_layer"),
    [
        ((), {"use_rslora": False, "use_dora": False, "lora_alpha": 16, "r": 8}, 7),
        (("lora.rslora=true",), {"use_rslora": True}, 7),
        (("lora.dora=true", "lora.targets=attention"), {"use_dora": True}, 4),
        (("lora.targets=mlp", "lora.dropout=0.1"), {"lora_dropout": 0.1}, 3),
    ],
    ids=["plain", "rslora", "dora", "mlp"],
)
def test_each_kind_is_trained_continued_and_merged(
    trained: Trained, root: Path, sets: tuple[str, ...], settings: dict[str, Any], per_layer: int
) -> None:
    """What is merged computes what PEFT computes with the adapter of DPO."""
    import torch
    from peft import PeftModel
    from safetensors.torch import load_file

    trained.copy(root, "data", "base")
    base = root / "base" / trained.made["base"].name
    flags = [flag for each in ("sft.epochs=2", "dpo.epochs=1", *sets) for flag in ("--set", each)]
    made = {}
    for phase in ("sft", "dpo"):
        result = call("train", trained.recipe, "--phase", phase, *flags, "--json")
        assert result.exit_code == 0, result.stderr
        made[phase] = Path(json.loads(result.stdout)["artifact"])
        written = json.loads((made[phase] / "adapter_config.json").read_text())
        assert written.items() >= settings.items()
        weights = load_file(made[phase] / "adapter_model.safetensors")
        assert sum(name.endswith("lora_A.weight") for name in weights) == 2 * per_layer
        assert any(name.endswith("lora_magnitude_vector") for name in weights) == written["use_dora"]
    before, after = (load_file(made[phase] / "adapter_model.safetensors") for phase in ("sft", "dpo"))
    assert before.keys() == after.keys()
    assert all((after[name] != before[name]).any() for name in after if "lora_B" in name)
    merged = call("convert", "merge", made["dpo"], "--base", base, "--json")
    assert merged.exit_code == 0, merged.stderr
    ids = torch.arange(40)[None]
    live = PeftModel.from_pretrained(models.load_model(base), made["dpo"]).eval()
    with torch.inference_mode():
        expected = live(input_ids=ids).logits
        found = models.load_model(Path(json.loads(merged.stdout)["artifact"])).eval()(input_ids=ids).logits
    assert (found - expected).abs().max() < 1e-4
