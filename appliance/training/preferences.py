"""Preference pairs as tokens, and how often a model prefers the chosen answer, before and after training."""

from collections.abc import Mapping, Sequence
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
    is_chosen_shorter: bool

    @property
    def longest_tokens(self) -> int:
        return len(self.prompt) + max(len(self.chosen), len(self.rejected))


@dataclass(frozen=True, slots=True)
class Score:
    """Log-probability of both answers of one pair, summed over their tokens (nats)."""

    chosen: float
    rejected: float


@dataclass(frozen=True, slots=True)
class Triplets:
    """What DPO, ORPO and KTO learn from: rows, and the same as tokens."""

    rows: Sequence[dict[str, Any]]
    pairs: Sequence[Pair]

    @property
    def longest_tokens(self) -> int:
        return max(pair.longest_tokens for pair in self.pairs)

    def score(self, model: Any) -> list[Score]:
        return score(model, self.pairs)

    def compare(self, before: Sequence[Score], after: Sequence[Score]) -> dict[str, float]:
        return compare(self.pairs, before, after)

    def said(self, results: Mapping[str, float]) -> str:
        """The figures in a line or two."""
        shorter = (
            f"; where the chosen one is shorter {results['accuracy_shorter_before']:.0%} before,"
            f" {results['accuracy_shorter_after']:.0%} after"
            if "accuracy_shorter_after" in results
            else ""
        )
        return (
            f"chosen answer preferred in {results['accuracy_before']:.0%} of {len(self.rows)} rows before,"
            f" {results['accuracy_after']:.0%} after (length alone: {results['accuracy_by_length']:.0%}){shorter}"
        )


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
        chosen, rejected = len(row["chosen"]), len(row["rejected"])
        pairs.append(Pair(row["line"], prompt, answers["chosen"], answers["rejected"], chosen > rejected, chosen < rejected))
    return pairs


def read_checked(tokenizer: Any, dataset: Path, recipe: Recipe, phase: str) -> Triplets:
    """The recipe's triplets; raises `DataError` naming every one that is longer than `max_tokens` of the phase."""
    rows = read_rows(dataset, "dpo")
    pairs = tokenize(tokenizer, rows)
    file = recipe.data.dpo.name if recipe.data.dpo else "dpo"
    lengths = [(pair.line, pair.longest_tokens) for pair in pairs]
    require_lengths(lengths, getattr(recipe, phase).max_tokens, f"{phase}.max_tokens", file)
    return Triplets(rows, pairs)


def score(model: Any, pairs: Sequence[Pair]) -> list[Score]:
    """Runs every answer through the model once."""
    model.eval()
    return [Score(*(log_probability(model, pair.prompt, each) for each in (pair.chosen, pair.rejected))) for pair in pairs]


def compare(pairs: Sequence[Pair], before: Sequence[Score], after: Sequence[Score]) -> dict[str, float]:
    """How much likelier the chosen answers are, before and after.

    Accuracy is the share (0 to 1) of pairs whose chosen answer is likelier per token, since sums would favour the shorter
    one; margin the mean of that difference (nats a token); reward accuracy the share of pairs whose chosen answer gained on
    the rejected one since before, which is what DPO optimizes. Accuracy by length is that of "the longer one", or of "the
    shorter one" if that is better; what a model has learned beside length shows where the chosen answer is the shorter one.
    """

    def margins(scores: Sequence[Score]) -> list[float]:
        return [s.chosen / len(p.chosen) - s.rejected / len(p.rejected) for p, s in zip(pairs, scores, strict=True)]

    first, last = margins(before), margins(after)
    longer, shorter = (
        sum(getattr(pair, name) for pair in pairs) / len(pairs) for name in ("is_chosen_longer", "is_chosen_shorter")
    )
    gains = [(a.chosen - b.chosen) - (a.rejected - b.rejected) for a, b in zip(after, before, strict=True)]
    return {
        "accuracy_before": sum(margin > 0 for margin in first) / len(first),
        "accuracy_after": sum(margin > 0 for margin in last) / len(last),
        "margin_before_nats": sum(first) / len(first),
        "margin_after_nats": sum(last) / len(last),
        "reward_accuracy": sum(gain > 0 for gain in gains) / len(gains),
        "chosen_longer": longer,
        "accuracy_by_length": max(longer, shorter),
        **_where_shorter(pairs, first, last),
    }


def _where_shorter(pairs: Sequence[Pair], before: Sequence[float], after: Sequence[float]) -> dict[str, float]:
    """The accuracies by margins, where the chosen answer is the shorter one; nothing where it never is."""
    wanted = [index for index, pair in enumerate(pairs) if pair.is_chosen_shorter]
    named = {"accuracy_shorter_before": before, "accuracy_shorter_after": after} if wanted else {}
    return {name: sum(margins[index] > 0 for index in wanted) / len(wanted) for name, margins in named.items()}


def log_probability(model: Any, prompt: Sequence[int], answer: Sequence[int]) -> float:
    import torch

    ids = torch.tensor([[*prompt, *answer]], device=model.device)
    with torch.inference_mode():
        logits = model(input_ids=ids).logits[0, len(prompt) - 1 : -1].float()  # (answer tokens, vocabulary)
    chosen = torch.log_softmax(logits, dim=-1).gather(1, ids[0, len(prompt) :, None])
    return float(chosen.sum())
