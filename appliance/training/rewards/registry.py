"""The rewards of a recipe, by name. One file each; a new one is a settings class, a file and a line here."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from appliance import artifacts
from appliance.config import plain
from appliance.recipe import Recipe
from appliance.reward_settings import OwnReward, SentimentMatch
from appliance.training.rewards import (
    boolean_syntax,
    format_tags,
    grounded_in,
    language_match,
    length,
    own,
    readability,
    sentiment_match,
    tfidf_similarity,
)
from appliance.training.rewards.reward import Prompt, Reward, Score

Maker = Callable[[Any, Sequence[Prompt], Sequence[str]], Score]

MAKERS: Mapping[str, Maker] = {
    "tfidf_similarity": tfidf_similarity.make,
    "sentiment_match": sentiment_match.make,
    "language_match": language_match.make,
    "format_tags": format_tags.make,
    "boolean_syntax": boolean_syntax.make,
    "readability": readability.make,
    "grounded_in": grounded_in.make,
    "length": length.make,
}


def build(recipe: Recipe, prompts: Sequence[Prompt]) -> list[Reward]:
    """The rewards that count, ready to judge answers to these prompts; what one needs is loaded and checked."""
    return [
        Reward(name, settings.weight, MAKERS.get(name, own.make)(settings, prompts, recipe.languages))
        for name, settings in recipe.grpo.rewards.named().items()
        if settings.weight > 0
    ]


def identities(recipe: Recipe) -> dict[str, Any]:
    """What the rewards are, for the digest of what they train: settings, with files by content and not by place."""
    described = {}
    for name, settings in recipe.grpo.rewards.named().items():
        entries = plain(settings)
        if isinstance(settings, SentimentMatch):
            entries["encoder"] = artifacts.identity(settings.encoder)
        elif isinstance(settings, OwnReward):
            entries["function"] = own.identity(settings.function)
        described[name] = entries
    return described
