"""The prompts of GRPO: read from the dataset, checked for length, and laid out in the order in which they are trained on."""

import random
from pathlib import Path
from typing import Any

from appliance.data.check import read_rows
from appliance.errors import DataError
from appliance.recipe import Recipe
from appliance.training.labels import render_ids, require_lengths, require_plain_text
from appliance.training.rewards import reward
from appliance.training.rewards.reward import Prompt


def read_checked(tokenizer: Any, dataset: Path, recipe: Recipe) -> list[Prompt]:
    """The recipe's prompts; raises `DataError` naming each that leaves no room for an answer."""
    prompts = reward.prompts(read_rows(dataset, "grpo"))
    if not prompts:
        raise DataError(f"{dataset} holds no prompts for GRPO; check data.grpo of the recipe.")
    require_plain_text(tokenizer, [(each.line, [message["content"] for message in each.messages]) for each in prompts])
    answer_tokens = recipe.grpo.answer_tokens
    lengths = [
        (each.line, answer_tokens + len(render_ids(tokenizer, [dict(m) for m in each.messages], add_generation_prompt=True)))
        for each in prompts
    ]
    file = recipe.data.grpo.name if recipe.data.grpo else "grpo"
    require_lengths(lengths, recipe.grpo.max_tokens, f"an answer of {answer_tokens} included, grpo.max_tokens", file)
    return prompts


def order(prompts: int, epochs: int, per_step: int, seed: int) -> list[int]:
    """Positions of prompts for all steps: each epoch in an order of its own, and some once more to fill the last step.

    Laid out beforehand, since TRL's sampler forgets at which epoch it was when a run is resumed, and drops what does not
    fill a step.
    """
    chance = random.Random(seed)
    places: list[int] = []
    while len(places) < prompts * epochs:
        places += chance.sample(range(prompts), prompts)
    while len(places) % per_step:
        places += chance.sample(range(prompts), min(prompts, -len(places) % per_step))
    return places
