"""The probability that an answer is in the language of its reference, or in the one that a column of its row names."""

import functools
from collections.abc import Sequence

from appliance.data.defects import shown
from appliance.errors import DataError
from appliance.reward_settings import LanguageMatch
from appliance.text import languages as known
from appliance.training.rewards.reward import Answer, Prompt, Score

UNDECIDED = 0.5  # for an answer, or a reference, too short to tell
OTHER = "en"  # a single language would always be the likeliest


def make(settings: LanguageMatch, prompts: Sequence[Prompt], languages: Sequence[str]) -> Score:
    """Raises `DataError` for a row whose column is missing, `RecipeError` for a language that nobody can tell apart."""

    @functools.cache  # by text: rows of one line have references of their own
    def language_of(reference: str) -> str | None:
        return known.detect(reference, languages)

    def wanted(prompt: Prompt) -> str | None:
        if settings.column is None:
            return language_of(prompt.reference)
        if not isinstance(code := prompt.columns.get(settings.column), str):
            what = f"column {settings.column!r} must hold a language, found {shown(code)}"
            raise DataError(f"grpo line {prompt.line}: {what}.")
        return code

    candidates = sorted({*languages, OTHER, *(code for code in map(wanted, prompts) if code)})
    known.require_known(candidates)

    def score(answers: Sequence[Answer]) -> list[float]:
        found = []
        for answer in answers:
            language = wanted(answer.prompt)
            chance = known.probability(answer.text, language, candidates) if language else None
            found.append(0.0 if not answer.text.strip() else UNDECIDED if chance is None else chance)
        return found

    return score
