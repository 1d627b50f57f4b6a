"""Preference pairs as tokens, and how often a model prefers the chosen answer, before and after training."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from appliance.data.check import read_rows
from appliance.recipe import Recipe
from appliance.training.labels import render_ids, require_lengths, require_plain_text


@dataclass(frozen=True, slots=True)
class Pair:
    """Token ids of one triplet; the answers include the end-of-turn token."""

    line: int
    prompt: list[int]
    chosen: list[int]
    rejected: list[int]
    is_chosen_longer: bool  # in characters, as a reader would count

    @property
    def longest_tokens(self) -> int:
        return len(self.prompt) + max(len(self.chosen), len(self.rejected))


@dataclass(frozen=True, slots=True)
class Score:
    """Log-probability of both answers of one pair, summed over their tokens (nats)."""

    chosen: float
    rejected: float


def conversational(row: dict[str, Any]) -> dict[str, Any]:
    """The triplet as messages, so that the chat template is applied to plain strings too."""
    answers = {key: [{"role": "assistant", "content": row[key]}] for key in ("chosen", "rejected")}
    return {"prompt": row["prompt"], **answers}


def tokenize(tokenizer: Any, rows: Sequence[dict[str, Any]]) -> list[Pair]:
    texts = [(row["line"], [*(each["content"] for each in row["prompt"]), row["chosen"], row["rejected"]]) for row in rows]
    require_plain_text(tokenizer, texts)
    pairs = []
    for row in rows:
        messages = conversational(row)
        prompt = render_ids(tokenizer, messages["prompt"], add_generation_prompt=True)
        answers = {}
        for key in ("chosen", "rejected"):
            whole = render_ids(tokenizer, [*messages["prompt"], *messages[key]], add_generation_prompt=False)
            answers[key] = whole[len(prompt) :]
        is_longer = len(row["chosen"]) > len(row["rejected"])
        pairs.append(Pair(row["line"], prompt, answers["chosen"], answers["rejected"], is_longer))
    return pairs


def tokenize_checked(tokenizer: Any, dataset: Path, recipe: Recipe) -> list[Pair]:
    """The recipe's triplets; raises `DataError` naming every one that is longer than `dpo.max_tokens`."""
    pairs = tokenize(tokenizer, read_rows(dataset, "dpo"))
    file = recipe.data.dpo.name if recipe.data.dpo else "dpo"
    require_lengths([(pair.line, pair.longest_tokens) for pair in pairs], recipe.dpo.max_tokens, "dpo.max_tokens", file)
    return pairs


def score(model: Any, pairs: Sequence[Pair]) -> list[Score]:
    """Runs every answer through the model once."""
    model.eval()
    return [Score(*(_log_probability(model, pair.prompt, each) for each in (pair.chosen, pair.rejected))) for pair in pairs]


def compare(pairs: Sequence[Pair], before: Sequence[Score], after: Sequence[Score]) -> dict[str, float]:
    """How much likelier the chosen answers are, before and after.

    Accuracy is the share (0 to 1) of pairs whose chosen answer is likelier per token, since sums would favour the shorter
    one; margin the mean of that difference (nats a token); reward accuracy the share of pairs whose chosen answer gained on
    the rejected one since before, which is what DPO optimizes.
    """

    def margins(scores: Sequence[Score]) -> list[float]:
        return [s.chosen / len(p.chosen) - s.rejected / len(p.rejected) for p, s in zip(pairs, scores, strict=True)]

    first, last = margins(before), margins(after)
    gains = [(a.chosen - b.chosen) - (a.rejected - b.rejected) for a, b in zip(after, before, strict=True)]
    return {
        "accuracy_before": sum(margin > 0 for margin in first) / len(first),
        "accuracy_after": sum(margin > 0 for margin in last) / len(last),
        "margin_before_nats": sum(first) / len(first),
        "margin_after_nats": sum(last) / len(last),
        "reward_accuracy": sum(gain > 0 for gain in gains) / len(gains),
        "chosen_longer": sum(pair.is_chosen_longer for pair in pairs) / len(pairs),
    }


def _log_probability(model: Any, prompt: Sequence[int], answer: Sequence[int]) -> float:
    import torch

    ids = torch.tensor([[*prompt, *answer]], device=model.device)
    with torch.inference_mode():
        logits = model(input_ids=ids).logits[0, len(prompt) - 1 : -1].float()  # (answer tokens, vocabulary)
    chosen = torch.log_softmax(logits, dim=-1).gather(1, ids[0, len(prompt) :, None])
    return float(chosen.sum())
