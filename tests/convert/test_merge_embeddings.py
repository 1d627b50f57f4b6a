"""Trained embeddings and heads, tied or not: merged as PEFT computes them, or refused with another way."""

from pathlib import Path
from typing import Any

import pytest

from appliance import artifacts
from tests.convert import small_merge
from tests.convert.small_merge import copied_untied, edit_json, load, logits, make_adapter, merged
from tests.running import call


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return small_merge.write_base(tmp_path_factory.mktemp("models") / "base")


def test_trained_embeddings_and_added_tokens_survive(base: Path, root: Path, tmp_path: Path) -> None:
    """As PEFT saves them: whole tensors of other shapes, beside a tokenizer that has the new tokens."""
    import torch
    from peft import LoraConfig, get_peft_model
    from transformers import AutoTokenizer

    untied = copied_untied(base, tmp_path / "untied")
    tokenizer = AutoTokenizer.from_pretrained(untied)
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|bed|>", "<|meal|>"]})
    torch.manual_seed(5)
    model = load(untied)
    model.resize_token_embeddings(len(tokenizer))
    options = {"r": 4, "target_modules": ["q_proj"], "modules_to_save": ["embed_tokens", "lm_head"]}
    adapted = get_peft_model(model, LoraConfig(task_type="CAUSAL_LM", **options))
    for name, value in adapted.named_parameters():
        if value.requires_grad:
            torch.nn.init.normal_(value, std=0.1)
            assert name
    adapted.save_pretrained(tmp_path / "adapter")
    tokenizer.save_pretrained(tmp_path / "adapter")
    folder = merged(root, tmp_path / "adapter", untied)
    found = load(folder)
    assert found.config.vocab_size == len(tokenizer)
    assert (logits(found) - logits(adapted.eval())).abs().max() < 1e-5
    assert AutoTokenizer.from_pretrained(folder).convert_tokens_to_ids("<|meal|>") == len(tokenizer) - 1
    results = artifacts.load(folder).results
    assert (results["merged_weights"], results["replaced_weights"]) == (2, 2)


@pytest.mark.parametrize("more", [0, 3], ids=["trained", "added tokens"])
def test_tied_embeddings_that_stay_tied_are_merged(base: Path, root: Path, tmp_path: Path, more: int) -> None:
    """PEFT saves such a matrix twice, under the name of the head too."""
    import torch
    from peft import LoraConfig, get_peft_model

    torch.manual_seed(6)
    model = load(base)
    if more:
        model.resize_token_embeddings(model.config.vocab_size + more)
    options = {"r": 4, "target_modules": ["q_proj"], "modules_to_save": ["embed_tokens"], "ensure_weight_tying": True}
    adapted = get_peft_model(model, LoraConfig(task_type="CAUSAL_LM", **options))
    trained = [value for value in adapted.parameters() if value.requires_grad]
    for value in trained:
        torch.nn.init.normal_(value, std=0.1)
    adapted.save_pretrained(tmp_path / "adapter")
    found = load(merged(root, tmp_path / "adapter", base))
    assert found.lm_head.weight is found.model.embed_tokens.weight
    assert (logits(found) - logits(adapted.eval())).abs().max() < 1e-5


@pytest.mark.parametrize("more", [0, 3], ids=["trained", "added tokens"])
def test_lora_of_embeddings_and_head_is_merged(base: Path, root: Path, tmp_path: Path, more: int) -> None:
    """PEFT saves what is below such LoRA too: it is added to that, and does not go lost behind it."""
    import torch
    from peft import LoraConfig, get_peft_model

    untied = copied_untied(base, tmp_path / "untied")
    torch.manual_seed(8)
    model = load(untied)
    model.resize_token_embeddings(model.config.vocab_size + more)
    options = {"r": 4, "lora_alpha": 6, "target_modules": ["q_proj", "embed_tokens", "lm_head"]}
    adapted = get_peft_model(model, LoraConfig(task_type="CAUSAL_LM", **options))
    for value in adapted.parameters():
        if value.requires_grad:
            torch.nn.init.normal_(value, std=0.3)
    adapted.save_pretrained(tmp_path / "adapter")
    found = load(merged(root, tmp_path / "adapter", untied))
    expected = logits(adapted.eval())
    assert (logits(found) - expected).abs().max() < 1e-4
    with adapted.disable_adapter():
        assert (logits(adapted) - expected).abs().max() > 0.1


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"trainable_token_indices": {"embed_tokens": [1, 2]}}, "it trains the embeddings of single tokens"),
        ({"target_modules": ["embed_tokens"], "use_dora": True}, "DoRA of embeddings cannot be merged here"),
    ],
    ids=["single tokens", "DoRA"],
)
def test_other_trained_embeddings_are_refused_with_another_way(
    base: Path, root: Path, tmp_path: Path, settings: dict[str, Any], said: str
) -> None:
    untied = copied_untied(base, tmp_path / "untied")
    make_adapter(untied, tmp_path / "adapter", **settings)
    result = call("convert", "merge", tmp_path / "adapter", "--base", untied)
    assert result.exit_code == 1
    assert said in result.stderr
    assert "merge_and_unload" in result.stderr
    assert not list(root.rglob("*.safetensors"))


@pytest.mark.parametrize("target", ["lm_head", "embed_tokens"])
def test_what_is_tied_cannot_be_changed_on_one_side(base: Path, root: Path, tmp_path: Path, target: str) -> None:
    make_adapter(base, tmp_path / "adapter", target_modules=["q_proj"], modules_to_save=[target])
    result = call("convert", "merge", tmp_path / "adapter", "--base", base)
    assert result.exit_code == 1
    assert "tie_word_embeddings" in result.stderr
    assert not list(root.rglob("*.safetensors"))


@pytest.mark.parametrize("target", ["lm_head", "embed_tokens"])
def test_tied_base_that_has_a_head_too_is_tied(base: Path, root: Path, tmp_path: Path, target: str) -> None:
    """Converters drop such a head."""
    stored = copied_untied(base, tmp_path / "stored")
    edit_json(stored / "config.json", tie_word_embeddings=True)
    make_adapter(copied_untied(base, tmp_path / "untied"), tmp_path / "adapter", target_modules=["q_proj", target])
    result = call("convert", "merge", tmp_path / "adapter", "--base", stored)
    assert result.exit_code == 1
    assert "tie_word_embeddings" in result.stderr
    assert not list(root.rglob("*.safetensors"))


def test_embeddings_that_stay_tied_go_to_a_stored_head_too(base: Path, root: Path, tmp_path: Path) -> None:
    import torch
    from safetensors.torch import load_file

    stored = copied_untied(base, tmp_path / "stored")
    edit_json(stored / "config.json", tie_word_embeddings=True)
    options = {"target_modules": ["q_proj"], "modules_to_save": ["embed_tokens"], "ensure_weight_tying": True}
    make_adapter(base, tmp_path / "adapter", **options)
    tensors = load_file(merged(root, tmp_path / "adapter", stored) / "model.safetensors")
    assert torch.equal(tensors["lm_head.weight"], tensors["model.embed_tokens.weight"])


@pytest.mark.parametrize("way", ["target_modules", "modules_to_save"])
def test_tied_embeddings_of_any_name_are_refused(
    root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, way: str
) -> None:
    """Mamba's are "backbone.embeddings.weight"; LoRA of embeddings is known by its factors, too."""
    from transformers import MambaConfig, MambaForCausalLM

    shape = {"vocab_size": 64, "hidden_size": 32, "state_size": 4, "num_hidden_layers": 1, "time_step_rank": 4}
    MambaForCausalLM(MambaConfig(**shape)).save_pretrained(tmp_path / "base")
    if way == "target_modules":
        monkeypatch.setattr("convert.merge.EMBEDDINGS", ())
    options: dict[str, Any] = {"target_modules": ["x_proj"]}
    make_adapter(tmp_path / "base", tmp_path / "adapter", **{**options, way: ["embeddings"]})
    result = call("convert", "merge", tmp_path / "adapter", "--base", tmp_path / "base")
    assert result.exit_code == 1
    assert "trains the embeddings" in result.stderr
    assert "tie_word_embeddings" in result.stderr
    assert not list(root.rglob("*.safetensors"))
