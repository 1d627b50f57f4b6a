"""Rows in one sequence learn what padded rows learn; where they would see each other, that is refused."""

import contextlib
import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from appliance import artifacts
from appliance import recipe as recipes
from appliance.errors import RecipeError
from appliance.training import adapters, labels, loop, packing, rungs, sft
from appliance.training import model as models
from tests import tiny_recipe
from tests.running import Trained, call


def trainer(trained: Trained, root: Path, *sets: str, attention: str = "sdpa") -> Any:
    import torch

    recipe = recipes.load(trained.recipe, ["sft.batch_rows=3", *sets])
    base = trained.made["base"]
    tokenizer = models.load_tokenizer(base)
    rows = [{"line": i, "messages": tiny_recipe.messages(turns)} for i, turns in enumerate(tiny_recipe.CONVERSATIONS)]
    labelled = labels.label_conversations(tokenizer, rows, models.marked_template(base, tokenizer))
    loop.prepare()
    model = models.load_model(base)
    model.set_attn_implementation(attention)
    torch.manual_seed(1)
    adapted = adapters.add(model, recipe.lora)
    with torch.no_grad():
        for name, value in adapted.named_parameters():
            if "lora_B" in name:
                value.normal_(std=0.02)
    return sft._trainer(adapted, tokenizer, labelled, recipe, root, rungs.CPU[0])


def gradients(made: Any) -> tuple[int, float, dict[str, Any]]:
    """Of a batch of rows of different lengths: tokens computed, the loss and every factor's gradient."""
    rows = [made.train_dataset[i] for i in (0, 4, 5)]
    batch = made.data_collator(rows)
    loss = made.compute_loss(made.model, batch)
    loss.backward()
    return (
        batch["input_ids"].numel(),
        float(loss.detach()),
        {n: p.grad for n, p in made.model.named_parameters() if p.requires_grad},
    )


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_gradients_of_packed_rows_are_those_of_padded_ones(trained: Trained, root: Path, attention: str) -> None:
    padded_tokens, padded_loss, padded = gradients(trainer(trained, root, attention=attention))
    tokens, loss, packed = gradients(trainer(trained, root, "sft.packing=true", attention=attention))
    assert tokens < padded_tokens
    assert loss == pytest.approx(padded_loss, rel=1e-6)
    assert packed.keys() == padded.keys()
    for name, value in packed.items():
        assert (value - padded[name]).abs().max() <= 1e-5 * padded[name].abs().max(), name


def test_run_with_packing_is_the_run_without(trained: Trained, root: Path) -> None:
    trained.copy(root, "data", "base")
    folders = []
    for sets in (("sft.epochs=3",), ("sft.epochs=3", "sft.packing=true")):
        flags = [flag for each in sets for flag in ("--set", each)]
        result = call("train", trained.recipe, "--phase", "sft", *flags, "--json")
        assert result.exit_code == 0, result.stderr
        folders.append(Path(json.loads(result.stdout)["artifact"]))
    padded, packed = ([json.loads(line) for line in (each / loop.LOSS).read_text().splitlines()] for each in folders)
    assert [point["rows"] for point in packed] == [point["rows"] for point in padded]
    assert [point["loss"] for point in packed] == pytest.approx([point["loss"] for point in padded], rel=1e-4)
    tokens = artifacts.load(folders[1]).results["tokens"]
    assert packed[-1]["num_tokens"] == 3 * tokens


def test_attention_that_lets_rows_see_each_other_is_refused(
    trained: Trained, root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As it would be without transformers' mask in blocks."""
    monkeypatch.setattr("transformers.masking_utils.find_packed_sequence_indices", lambda *_, **__: None)
    with pytest.raises(RecipeError, match=r"\('qwen3'\) rows in one sequence see each other.*set sft.packing = false"):
        trainer(trained, root, "sft.packing=true")


def test_base_without_attention_is_refused() -> None:
    from transformers import MambaConfig, MambaForCausalLM
    from trl.trainer.sft_trainer import DataCollatorForLanguageModeling

    model = MambaForCausalLM(MambaConfig(vocab_size=64, hidden_size=32, num_hidden_layers=1, state_size=4))

    made = SimpleNamespace(
        model=model,
        data_collator=DataCollatorForLanguageModeling(pad_token_id=0, padding_free=True),
        _prepare_inputs=lambda batch: batch,
        compute_loss_context_manager=contextlib.nullcontext,
    )
    with pytest.raises(RecipeError, match=r"sft.packing: "):
        packing.require_apart(made)
