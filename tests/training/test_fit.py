"""What the ladder counts: weights to the byte, a step as it is, rungs that shrink, and the sizes that small cards have."""

from typing import Any

import pytest
import torch

from appliance import recipe as recipes
from appliance.errors import EnvironmentIncomplete, RecipeError
from appliance.recipe import Recipe
from appliance.training import (
    adapters,
    blocks,
    choice,
    divergence_head,
    fit,
    learned_head,
    passages,
    rungs,
    simulation,
    skeletons,
)
from appliance.training.fit import Device, Work
from appliance.training.model import Base
from appliance.training.rungs import Rung
from appliance.training.simulation import Setting, Shape
from benchmarks import checkpoints
from tests import tiny_recipe

GIB = 1 << 30
SMALL = {"hidden_size": 128, "intermediate_size": 384, "num_attention_heads": 4, "num_key_value_heads": 2} | {
    "num_hidden_layers": 6,
    "head_dim": 32,
    "vocab_size": 640,
    "pad_token_id": 0,
}


def config(kind: str, **sizes: Any) -> Any:
    from transformers import AutoConfig

    return AutoConfig.for_model(kind, **sizes)


@pytest.fixture
def recipe(tmp_path: Any) -> Recipe:
    return recipes.load(tiny_recipe.write(tmp_path / "recipe"), ["lora.rank=16", "lora.alpha=32", "lora.dropout=0"])


def card(available: int = 80 * GIB) -> Device:
    return Device(
        on_card=True,
        weights="bfloat16",
        available_bytes=available,
        available_memory_bytes=16 * GIB,
        context_bytes=fit.CONTEXT_BYTES,
    )


def cpu(available: int = 80 * GIB) -> Device:
    return Device(
        on_card=False, weights="float32", available_bytes=available, available_memory_bytes=available, kept_share=0.5
    )


def work(rows: int = 1, tokens: int = 1024, *, has_reference: bool = False) -> Work:
    return Work(shape=Shape(rows, tokens, rows * tokens), accumulates=True, has_reference=has_reference)


@pytest.mark.parametrize(
    ("name", "task", "limit_gib"),
    [
        ("4B", work(1, 1024), 3.4),
        ("4B", work(2, 1024, has_reference=True), 3.4),
        ("Qwen2.5-7B", work(1, 2048), 5.5),
    ],
    ids=["4B SFT", "4B DPO", "7B SFT"],
)
def test_streamed_is_planned_below_what_small_cards_have(recipe: Recipe, name: str, task: Work, limit_gib: float) -> None:
    found = fit.Model(recipe, checkpoints.config(name), card()).fit(rungs.CARD[-1], task)
    assert found.needed_bytes < limit_gib * GIB
    assert found.memory_bytes < 8 * GIB


def test_each_rung_of_a_card_needs_less_than_the_one_before(recipe: Recipe) -> None:
    model = fit.Model(recipe, checkpoints.config("4B"), card())
    needed = [model.fit(rung, work()).needed_bytes for rung in rungs.CARD]
    assert needed == sorted(needed, reverse=True)
    assert needed[-1] < needed[0] / 4


@pytest.mark.parametrize("kind", ["qwen3", "llama", "gemma3_text"])
@pytest.mark.parametrize("rung", rungs.CPU[:2], ids=lambda rung: rung.name)
@pytest.mark.parametrize("keeps_gradients", [False, True])
@pytest.mark.parametrize("shape", [Shape(1, 320, 100), Shape(2, 160, 315)], ids=["one row", "rows of two lengths"])
@pytest.mark.parametrize("weights", ["float32", "bfloat16"])
def test_simulated_step_holds_what_the_real_one_holds(
    recipe: Recipe, kind: str, rung: Rung, keeps_gradients: bool, shape: Shape, weights: str
) -> None:
    chosen = config(kind, **SMALL)
    setting = Setting(
        rung=rung,
        dtype=getattr(torch, weights),
        adapt=lambda model: adapters.add(model, recipe.lora, is_skeleton=True),
        on_card=False,
        keeps_gradients=keeps_gradients,
    )
    predicted = simulation.step(chosen, shape, setting).most_bytes(SMALL["num_hidden_layers"])
    assert predicted == pytest.approx(_really_held(chosen, shape, rung, recipe, keeps_gradients, weights), rel=0.05)


@pytest.mark.parametrize("rung", rungs.CPU[:2], ids=lambda rung: rung.name)
@pytest.mark.parametrize("shape", [Shape(1, 320, 100), Shape(2, 200, 80)], ids=["one row", "two rows"])
def test_simulated_distillation_holds_what_the_real_one_holds(recipe: Recipe, rung: Rung, shape: Shape) -> None:
    """Teacher and student as the phase has them, with documents apart."""
    from transformers import AutoModelForCausalLM

    chosen = config("qwen3", **SMALL)
    setting = Setting(
        rung=rung,
        dtype=torch.float32,
        adapt=lambda model: adapters.add(model, recipe.lora, is_skeleton=True),
        on_card=False,
        is_distilled=True,
    )
    predicted = simulation.step(chosen, shape, setting).most_bytes(SMALL["num_hidden_layers"])
    model = adapters.add(AutoModelForCausalLM.from_config(chosen, dtype=torch.float32), recipe.lora).train()
    adapters.copy_as_reference(model)
    divergence_head.install(model)
    if rung.recomputes:
        model.gradient_checkpointing_enable({"use_reentrant": False})
        model.enable_input_require_grads()
    tokens = torch.arange(shape.rows * shape.tokens).reshape(shape.rows, shape.tokens) % SMALL["vocab_size"]
    labels = tokens.clone()
    labels[:, : shape.tokens - shape.learned_tokens // shape.rows] = -100
    numbers = torch.tensor([blocks.of_row(shape.tokens, [10, 60, 100])] * shape.rows)
    batch = {"input_ids": tokens, "labels": labels, passages.BLOCKS: numbers}
    with simulation.Held([*model.parameters(), *model.buffers()]) as held:
        passages.distil(model, model, batch)[0].sum().backward()
    assert predicted == pytest.approx(held.most, rel=0.05)


def _really_held(chosen: Any, shape: Shape, rung: Rung, recipe: Recipe, keeps_gradients: bool, weights: str) -> int:
    from transformers import AutoModelForCausalLM

    model = adapters.add(AutoModelForCausalLM.from_config(chosen, dtype=getattr(torch, weights)), recipe.lora).train()
    learned_head.install(model)
    if rung.recomputes:
        model.gradient_checkpointing_enable({"use_reentrant": False})
        model.enable_input_require_grads()
    tokens = torch.arange(shape.rows * shape.tokens).reshape(shape.rows, shape.tokens) % SMALL["vocab_size"]
    labels = tokens.clone()
    labels.view(-1)[: shape.rows * shape.tokens - shape.learned_tokens] = -100
    batch = {"input_ids": tokens, "labels": labels, "attention_mask": torch.ones_like(tokens), "fused_lm_head": True}
    if shape.rows > 1:
        batch["attention_mask"][0, -3:] = 0

    def step() -> None:
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=weights == "bfloat16"):
            loss = model(**batch).loss
        loss.backward()

    if keeps_gradients:
        step()
    with simulation.Held([*model.parameters(), *model.buffers()]) as held:
        for parameter in model.parameters():
            if parameter.grad is not None:
                held.see(parameter.grad.untyped_storage())
        step()
    return held.most


def test_weights_in_four_bits_are_counted_to_the_byte() -> None:
    from bitsandbytes.nn import Params4bit

    for shape in ((256, 384), (96, 64), (640, 1000)):
        weight = Params4bit(torch.randn(shape), quant_type="nf4", compress_statistics=True, requires_grad=False).to("cpu")
        state = weight.quant_state
        tensors = (weight.data, state.absmax, state.code, state.offset, state.state2.absmax, state.state2.code)
        held = sum(each.numel() * each.dtype.itemsize for each in tensors)
        assert fit.nf4_bytes(shape[0] * shape[1]) == held


def test_weights_are_those_of_the_model(recipe: Recipe) -> None:
    from transformers import AutoModelForCausalLM

    chosen = config("qwen3", **SMALL)
    real = AutoModelForCausalLM.from_config(chosen, dtype=torch.float32)
    held = sum(each.numel() * 4 for each in (*real.parameters(), *real.buffers()))
    parts = fit.Model(recipe, chosen, cpu()).fit(rungs.CPU[0], work(1, 64)).parts
    assert parts["weights"] == pytest.approx(held, rel=1e-3)
    trained = sum(each.numel() for each in adapters.add(real, recipe.lora).parameters() if each.requires_grad)
    assert parts["adapter"] == 4 * trained
    assert parts["optimizer"] == 8 * trained


def test_first_rung_that_fits_is_chosen(recipe: Recipe, tmp_path: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    chosen = config("qwen3", **SMALL | {"vocab_size": 64000})
    chosen.save_pretrained(tmp_path)
    base, task = Base(tmp_path, "base"), work(2, 256)
    model = fit.Model(recipe, chosen, cpu())
    needed = [model.fit(rung, task).needed_bytes for rung in rungs.CPU]
    names = [rung.name for rung in rungs.CPU]
    for free, name in zip([needed[0], *(each - 1 for each in needed)], names, strict=False):
        monkeypatch.setattr(choice, "now", lambda _, free=free: cpu(free))
        assert choice.choose(recipe, base, task, None).name == name
    monkeypatch.setattr(choice, "now", lambda _: cpu(needed[-1] - 1))
    with pytest.raises(
        EnvironmentIncomplete, match=r"qlora-tight needs .* that are free.*It would with a batch of 1 of 2 rows"
    ):
        choice.choose(recipe, base, task, None)
    monkeypatch.setattr(choice, "now", lambda _: cpu(1 << 20))
    with pytest.raises(EnvironmentIncomplete, match="take a smaller base, or free memory"):
        choice.choose(recipe, base, task, None)


def test_rung_of_another_device_is_refused(tmp_path: Any) -> None:
    path = tiny_recipe.write(tmp_path / "recipe")
    asked = recipes.load(path, ["memory.rung=streamed"])
    config("qwen3", **SMALL).save_pretrained(tmp_path)
    with pytest.raises(RecipeError, match=r"memory.rung: 'streamed' is none of this device's: lora, lora-recomputed, qlora"):
        choice.choose(asked, Base(tmp_path, "base"), work(), None)


def test_layers_that_alternate_keep_their_pattern() -> None:
    chosen = config("gemma3_text", **SMALL | {"num_hidden_layers": 12})
    few = skeletons.make(chosen, layers=3)
    assert few.config.layer_types == chosen.layer_types[:3]
    assert len(few.model.layers) == 3
