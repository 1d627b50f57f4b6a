"""Single answers that are wanted or not, as tokens, and what training did to both kinds."""

import bisect
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from appliance.data.check import read_rows
from appliance.errors import DataError
from appliance.recipe import Recipe
from appliance.training import batches, preferences
from appliance.training.labels import render_ids, require_lengths, require_plain_text


@dataclass(frozen=True, slots=True)
class Judged:
    """What KTO learns from in place of triplets: rows, and each one's prompt and answer as tokens."""

    rows: Sequence[dict[str, Any]]
    tokens: Sequence[tuple[list[int], list[int]]]

    @property
    def longest_tokens(self) -> int:
        return max(len(prompt) + len(answer) for prompt, answer in self.tokens)

    def score(self, model: Any) -> list[float]:
        """The log-probability of each answer (nats a token)."""
        model.eval()
        return [preferences.log_probability(model, prompt, answer) / len(answer) for prompt, answer in self.tokens]

    def compare(self, before: Sequence[float], after: Sequence[float]) -> dict[str, float]:
        """How much likelier wanted and unwanted answers became (nats a token).

        Reward accuracy is the share of all pairs of a wanted and an unwanted answer of which the wanted one gained more: KTO
        moves them apart, and may move both.
        """
        judged = [(last - first, row["label"]) for first, last, row in zip(before, after, self.rows, strict=True)]
        good, bad = (sorted(gain for gain, label in judged if label == is_good) for is_good in (True, False))
        return {
            "good_gain_nats": sum(good) / len(good),
            "bad_gain_nats": sum(bad) / len(bad),
            "reward_accuracy": sum(bisect.bisect_left(bad, gain) for gain in good) / (len(good) * len(bad)),
        }

    def said(self, results: Mapping[str, float]) -> str:
        """The figures in a line."""
        return (
            f"wanted answers became likelier by {results['good_gain_nats']:+.3f} nats a token, unwanted ones by"
            f" {results['bad_gain_nats']:+.3f} (the wanted one gained more in {results['reward_accuracy']:.0%} of pairs)"
        )


def conversational(row: dict[str, Any]) -> dict[str, Any]:
    """The row as messages, as TRL takes it, with its line."""
    completion = [{"role": "assistant", "content": row["completion"]}]
    return {"prompt": row["prompt"], "completion": completion, "label": row["label"], batches.LINE: row["line"]}


def read_checked(tokenizer: Any, dataset: Path, recipe: Recipe) -> Judged:
    """The recipe's judged answers; raises `DataError` for those that are too long, and where all are of one kind."""
    rows = read_rows(dataset, "kto")
    file = recipe.data.kto.name if recipe.data.kto else "kto"
    if len({row["label"] for row in rows}) < 2:
        raise DataError(f"{file}: all {len(rows)} answers have one label; KTO learns from the difference, give both kinds.")
    texts = [(row["line"], [*(each["content"] for each in row["prompt"]), row["completion"]]) for row in rows]
    require_plain_text(tokenizer, texts)
    tokens = []
    for row in rows:
        messages = conversational(row)
        prompt = render_ids(tokenizer, row["prompt"], add_generation_prompt=True)
        whole = render_ids(tokenizer, [*row["prompt"], *messages["completion"]], add_generation_prompt=False)
        tokens.append((prompt, whole[len(prompt) :]))
    lengths = [(row["line"], len(prompt) + len(answer)) for row, (prompt, answer) in zip(rows, tokens, strict=True)]
    require_lengths(lengths, recipe.kto.max_tokens, "kto.max_tokens", file)
    return Judged(rows, tokens)
