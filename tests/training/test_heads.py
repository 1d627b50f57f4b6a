"""Our heads give what TRL's gives: log-probabilities, what is reported beside them, gradients, text."""

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch

from appliance.errors import ModelFileError
from appliance.training import fused_head, learned_head, samples, streamed_head

CPU = torch.device("cpu")
Install = Callable[[Any], None]


def in_parts_of_words(model: Any) -> None:
    streamed_head.install(model, CPU)


HEADS = pytest.mark.parametrize("install", [in_parts_of_words, learned_head.install], ids=["streamed", "learned"])


@pytest.fixture(autouse=True)
def parts_are_small(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(streamed_head, "PART_ROWS", 40)  # of 96
    monkeypatch.setattr(streamed_head, "PART_TOKENS", 7)
    monkeypatch.setattr(learned_head, "PART_BYTES", 0)
    monkeypatch.setattr(learned_head, "FEWEST", 3)


def model(kind: str, **more: Any) -> Any:
    from transformers import AutoConfig, AutoModelForCausalLM

    torch.manual_seed(5)
    sizes: dict[str, Any] = {"hidden_size": 64, "intermediate_size": 128, "num_attention_heads": 4, "num_key_value_heads": 2}
    sizes |= {"num_hidden_layers": 2, "head_dim": 16, "vocab_size": 96, "pad_token_id": 0}
    return AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, **sizes, **more), dtype=torch.float32)


def batch() -> dict[str, torch.Tensor]:
    tokens = torch.randint(0, 96, (2, 11), generator=torch.Generator().manual_seed(1))
    labels = tokens.clone()
    labels[0, :6] = labels[1, 9:] = fused_head.IGNORED
    return {"input_ids": tokens, "labels": labels}


@HEADS
@pytest.mark.parametrize(
    ("kind", "more"),
    [("qwen3", {"tie_word_embeddings": True}), ("llama", {}), ("gemma3_text", {"final_logit_softcapping": 3.0})],
)
def test_gives_what_the_whole_head_gives(kind: str, more: dict[str, Any], install: Install) -> None:
    from trl.trainer.utils import add_fused_lm_head

    fields = ("log_probs", "entropy", "mean_logits", "is_top1")
    whole = model(kind, **more)
    whole.get_output_embeddings().weight.requires_grad = False  # the head is frozen
    parts = copy.deepcopy(whole)
    add_fused_lm_head(whole, outputs=fields)
    install(parts)
    found = []
    for each in (whole, parts):
        output = each(**batch(), fused_lm_head=True)
        (output.loss + (output.log_probs**2).sum()).backward()
        found.append(output)
    for name in ("loss", *fields, "label_mask"):
        torch.testing.assert_close(found[1][name].float(), found[0][name].float(), rtol=1e-4, atol=1e-5)
    gradients = [
        {name: value.grad for name, value in each.named_parameters() if "layers" in name} for each in (whole, parts)
    ]
    for name, gradient in gradients[0].items():
        torch.testing.assert_close(gradients[1][name], gradient, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_samples_are_written_with_the_head_in_parts(kind: str) -> None:
    head = (plain := model(kind)).get_output_embeddings()
    hidden = torch.randn(1, 3, head.in_features)
    whole, forward = head(hidden), head.forward
    with samples._head_in_parts(plain):
        assert head.forward != forward
        torch.testing.assert_close(head(hidden), whole)
    assert head.forward == forward


def test_samples_leave_a_head_to_itself_that_comes_to_a_card_in_parts() -> None:
    """Its weights stay in memory, and what it is given lies on the card."""
    head = (plain := model("llama")).get_output_embeddings()
    head.forward = lambda hidden: hidden + 1
    on_card = torch.zeros(1, 3, 64, device="meta")
    with samples._head_in_parts(plain):
        assert head(on_card).shape == on_card.shape


def test_writes_the_same_text() -> None:
    whole = model("llama")
    parts = copy.deepcopy(whole)
    streamed_head.install(parts, CPU)
    texts = [each.generate(batch()["input_ids"], max_new_tokens=8, do_sample=False).tolist() for each in (whole, parts)]
    assert texts[0] == texts[1]


@HEADS
def test_nothing_to_learn_gives_a_gradient_of_nothing(install: Install) -> None:
    parts = model("llama")
    parts.get_output_embeddings().weight.requires_grad = False
    install(parts)
    tokens = batch()["input_ids"]
    loss = parts(input_ids=tokens, labels=torch.full_like(tokens, fused_head.IGNORED), fused_lm_head=True).loss
    loss.backward()
    assert loss.item() == 0


@HEADS
def test_measured_without_gradients(install: Install) -> None:
    parts = model("llama").requires_grad_(False)
    install(parts)
    with torch.no_grad():
        measured = parts(**batch(), fused_lm_head=True).log_probs
    parts.model.embed_tokens.weight.requires_grad = True
    assert torch.equal(parts(**batch(), fused_lm_head=True).log_probs, measured)


def test_bfloat16_is_summed_up_in_32_bits() -> None:
    whole = model("llama").requires_grad_(False)
    half = copy.deepcopy(whole).to(torch.bfloat16)
    for each in (whole, half):
        each.model.norm.weight.requires_grad = True
        learned_head.install(each)
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=each is half):
            output = each(**batch(), fused_lm_head=True)
        assert output.log_probs.dtype == torch.float32
        output.loss.backward()
    torch.testing.assert_close(half.model.norm.weight.grad.float(), whole.model.norm.weight.grad, rtol=0.1, atol=2e-3)


@pytest.mark.parametrize("more", [{"logit_scale": 0.5}, {"output_router_logits": True}], ids=lambda more: next(iter(more)))
def test_what_needs_more_of_a_head_keeps_the_trainers(more: dict[str, Any]) -> None:
    peculiar = model("cohere" if "logit_scale" in more else "mixtral", **more).requires_grad_(False)
    learned_head.install(peculiar)
    assert "forward" not in vars(peculiar)


def test_head_that_is_trained_keeps_the_trainers() -> None:
    trained = model("llama")
    learned_head.install(trained)
    assert "forward" not in vars(trained)


def test_scaled_logits_are_refused() -> None:
    with pytest.raises(ModelFileError, match="sets logit_scale; a head"):
        streamed_head.install(model("cohere", logit_scale=0.5), CPU)
