"""The mask of documents that are read apart is what serving computes: each as if it were alone, and moved to its place."""

from contextlib import nullcontext
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from appliance.errors import RecipeError
from appliance.training import blocks

BOUNDS = [5, 12, 21]  # two documents of 7 and 9 tokens, between 5 and 6 others
TOKENS = 27
CLOSE = {"rtol": 1e-4, "atol": 1e-5}


def model(kind: str = "qwen3", **more: Any) -> Any:
    from transformers import AutoConfig, AutoModelForCausalLM

    torch.manual_seed(5)
    sizes: dict[str, Any] = {"hidden_size": 64, "intermediate_size": 128, "num_attention_heads": 4, "num_key_value_heads": 2}
    sizes |= {"num_hidden_layers": 3, "head_dim": 16, "vocab_size": 96, "pad_token_id": 0, "initializer_range": 0.1}
    implementation = more.pop("attn_implementation", "sdpa")
    config = AutoConfig.for_model(kind, **{**sizes, **more})
    return AutoModelForCausalLM.from_config(config, dtype=torch.float32, attn_implementation=implementation).eval()


def tokens(seed: int = 1, count: int = TOKENS) -> torch.Tensor:
    return torch.randint(1, 96, (1, count), generator=torch.Generator().manual_seed(seed))


def added(*bounds: list[int], count: int = TOKENS) -> torch.Tensor:
    return blocks.mask(torch.tensor([blocks.of_row(count, each) for each in bounds]), torch.float32)


def states(base: Any, ids: torch.Tensor, **named: Any) -> list[torch.Tensor]:
    """Of every layer, the embeddings first."""
    with torch.no_grad():
        output = base(input_ids=ids, output_hidden_states=True, use_cache=False, **named)
    return [each[0] for each in output.hidden_states]


@given(st.lists(st.integers(0, 8), max_size=5), st.integers(0, 4), st.integers(1, 5))
def test_who_sees_whom(lengths: list[int], before: int, after: int) -> None:
    """Against the sentence that describes it, token by token."""
    bounds = [before + sum(lengths[:number]) for number in range(len(lengths) + 1)] if lengths else []
    count = before + sum(lengths) + after if lengths else before + after
    found = added(bounds, count=count)[0, 0] == 0
    for asks in range(count):
        follows = not bounds or asks >= bounds[-1]
        first = 0 if follows else max(start for start in (0, *bounds) if start <= asks)  # of its own block
        assert found[asks].tolist() == [first <= sees <= asks for sees in range(count)]


@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
def test_another_document_before_it_changes_nothing_in_a_document(implementation: str) -> None:
    base, ids = model(attn_implementation=implementation), tokens()
    other = ids.clone()
    other[0, : BOUNDS[1]] = tokens(2)[0, : BOUNDS[1]]  # what stands before, and the first document
    for one, another in zip(*(states(base, each, attention_mask=added(BOUNDS)) for each in (ids, other)), strict=True):
        assert torch.equal(one[BOUNDS[1] : BOUNDS[2]], another[BOUNDS[1] : BOUNDS[2]])
    assert not torch.allclose(one[BOUNDS[2] :], another[BOUNDS[2] :], **CLOSE)
    plain = [states(base, each)[-1][BOUNDS[1] : BOUNDS[2]] for each in (ids, other)]
    assert not torch.allclose(*plain, **CLOSE)


@pytest.mark.parametrize("kind", ["qwen3", "llama", "mistral"])
def test_a_document_is_what_it_is_alone_and_moved(kind: str) -> None:
    base, ids = model(kind), tokens()
    whole = states(base, ids, attention_mask=added(BOUNDS))
    for start, end in ((0, BOUNDS[0]), (BOUNDS[0], BOUNDS[1]), (BOUNDS[1], BOUNDS[2])):
        alone = states(base, ids[:, start:end])  # from position 0 on: rotations are relative
        for one, another in zip(whole, alone, strict=True):
            torch.testing.assert_close(one[start:end], another, **CLOSE)


def test_one_document_with_nothing_before_it_is_read_as_ever() -> None:
    base, ids = model(), tokens()
    torch.testing.assert_close(states(base, ids, attention_mask=added([0, 20]))[-1], states(base, ids)[-1], **CLOSE)
    torch.testing.assert_close(states(base, ids, attention_mask=added([]))[-1], states(base, ids)[-1], **CLOSE)


def test_rows_beside_each_other_are_as_each_by_itself() -> None:
    base, ids = model(), tokens()
    short = tokens(3, 14)
    batch = torch.zeros(2, TOKENS, dtype=torch.long)
    batch[0], batch[1, :14] = ids[0], short[0]
    numbers = torch.full((2, TOKENS), blocks.FOLLOWS)
    numbers[0] = torch.tensor(blocks.of_row(TOKENS, BOUNDS))
    numbers[1, :14] = torch.tensor(blocks.of_row(14, [2, 6, 9]))
    with torch.no_grad():
        found = base(input_ids=batch, attention_mask=blocks.mask(numbers, torch.float32)).logits
        one = base(input_ids=ids, attention_mask=added(BOUNDS)).logits
        other = base(input_ids=short, attention_mask=added([2, 6, 9], count=14)).logits
    torch.testing.assert_close(found[:1], one, **CLOSE)
    torch.testing.assert_close(found[1:, :14], other, **CLOSE)
    assert torch.isfinite(found).all()


def trainer_of(base: Any) -> Any:
    args = SimpleNamespace(device=torch.device("cpu"))
    return SimpleNamespace(model=base, args=args, compute_loss_context_manager=nullcontext)


@pytest.mark.parametrize(("kind", "more"), [("qwen3", {}), ("gemma3_text", {"sliding_window": 64}), ("mistral", {})])
def test_bases_that_read_documents_apart(kind: str, more: dict[str, Any]) -> None:
    blocks.require_apart(trainer_of(model(kind, **more)), 64)


@pytest.mark.parametrize(
    ("kind", "more", "said"),
    [
        ("mamba", {"attn_implementation": "eager"}, "cannot be given documents apart|does not read documents apart"),
        ("gemma3_text", {"sliding_window": 16}, "looks back 16 tokens in some layers, and the longest row has 64"),
        ("mistral", {"sliding_window": 63}, "looks back 63 tokens"),
    ],
)
def test_bases_that_do_not_are_refused(kind: str, more: dict[str, Any], said: str) -> None:
    with pytest.raises(RecipeError, match=said):
        blocks.require_apart(trainer_of(model(kind, **more)), 64)
