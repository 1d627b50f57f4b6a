"""Divergence and its gradient in parts are those of whole logits, for one head, a bound, and a share of likelihood."""

import copy
from typing import Any

import pytest
import torch

from appliance.errors import RecipeError
from appliance.training import divergence_head, learned_head
from tests.training.test_heads import batch, model


@pytest.fixture(autouse=True)
def parts_are_small(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(learned_head, "PART_BYTES", 0)
    monkeypatch.setattr(learned_head, "FEWEST", 3)


def asked_of(labels: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    asked = torch.zeros_like(labels, dtype=torch.bool)
    asked[:, :-1] = labels[:, 1:] != -100
    return asked, labels[:, 1:][asked[:, :-1]]


@pytest.mark.parametrize("sft_weight", [0.0, 0.3])
@pytest.mark.parametrize(
    ("kind", "more"),
    [("qwen3", {"tie_word_embeddings": False}), ("llama", {}), ("gemma3_text", {"final_logit_softcapping": 3.0})],
)
def test_is_that_of_whole_logits(kind: str, more: dict[str, Any], sft_weight: float) -> None:
    teacher, student = model(kind, **more), model(kind, **more)
    with torch.no_grad():
        for weight in student.base_model.parameters():
            weight += 0.05 * torch.randn(weight.shape, generator=torch.Generator().manual_seed(2))
    for each in (teacher, student):
        each.get_output_embeddings().weight.requires_grad = False
    student.get_output_embeddings().weight.data.copy_(teacher.get_output_embeddings().weight)  # one head, as with adapters
    whole = copy.deepcopy(student)
    given = batch()
    ids, (asked, targets) = given["input_ids"], asked_of(given["labels"])
    for each in (teacher, student):
        divergence_head.install(each)
    with torch.no_grad():
        taught = teacher(input_ids=ids, asked=asked)
    found = student(input_ids=ids, asked=asked, taught=taught, targets=targets, sft_weight=sft_weight)
    loss, divergence, surprise, agrees = found
    loss.sum().backward()

    with torch.no_grad():
        wanted = torch.log_softmax(teacher(input_ids=ids).logits[asked], -1)
    likely = torch.log_softmax(whole(input_ids=ids).logits[asked], -1)
    expected = (wanted.exp() * (wanted - likely)).sum(-1)
    missed = -likely.gather(1, targets[:, None])[:, 0]
    (expected + sft_weight * missed).sum().backward()
    torch.testing.assert_close(divergence, expected.detach(), rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(surprise, missed.detach(), rtol=1e-4, atol=1e-5)
    assert agrees.tolist() == (wanted.argmax(-1) == likely.argmax(-1)).tolist()
    others = dict(whole.named_parameters())
    for name, weight in student.named_parameters():
        if weight.requires_grad:
            torch.testing.assert_close(weight.grad, others[name].grad, rtol=1e-3, atol=1e-5)
    assert divergence.min() >= 0
    assert divergence.max() > 1e-3


def test_the_model_is_left_as_it_is_for_others() -> None:
    plain = model("llama").requires_grad_(False)
    expected = plain(**batch()).logits
    learned_head.install(plain)
    divergence_head.install(plain)
    torch.testing.assert_close(plain(**batch()).logits, expected)
    assert plain(**batch(), fused_lm_head=True).log_probs.shape == (2, 10)
    assert plain.generate(batch()["input_ids"], max_new_tokens=2, do_sample=False).shape == (2, 13)


def test_scaled_logits_are_refused() -> None:
    with pytest.raises(RecipeError, match="sets logit_scale, which this phase does not compute"):
        divergence_head.install(model("cohere", logit_scale=0.5))
