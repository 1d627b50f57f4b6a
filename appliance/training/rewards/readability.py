"""Whether an answer reads as easily as the recipe wants: Flesch's reading ease, with the constants of each language.

A count of syllables and sentence lengths, no judgement of a text's level: it never proves B1. All counting is in `_ease`.
"""

import re
from collections.abc import Sequence

from appliance.errors import RecipeError
from appliance.reward_settings import Readability
from appliance.text.languages import detect
from appliance.training.rewards.reward import Answer, Prompt, Score

# Base, per word of a sentence, per syllable of a word: Flesch 1948, Douma 1960, Amstad 1978, Kandel and Moles 1958.
FORMULAS = {
    "en": (206.835, 1.015, 84.6),
    "nl": (206.84, 0.93, 77.0),
    "de": (180.0, 1.0, 58.5),
    "fr": (207.0, 1.015, 73.6),
}
_WORD = re.compile(r"[^\W\d_]+")
_SENTENCE_END = re.compile(r"[.!?…]+(?:\s|$)|\n+")
_VOWELS = re.compile(r"[aeiouyáàâäåæéèêëíìîïóòôöøœúùûüýÿ]+", re.IGNORECASE)


def make(settings: Readability, prompts: Sequence[Prompt], languages: Sequence[str]) -> Score:  # noqa: ARG001
    """Raises `RecipeError` for a recipe none of whose languages has a formula."""
    if not (measured := [language for language in languages if language in FORMULAS]):
        raise RecipeError(f"grpo.rewards.readability knows {', '.join(FORMULAS)}; the recipe's languages are none of them.")

    def score(answers: Sequence[Answer]) -> list[float | None]:
        return [_score(answer.text, settings.ease) for answer in answers]

    def _score(text: str, wanted: float) -> float | None:
        if not _WORD.search(text):
            return 0.0
        language = (detect(text, languages) if len(languages) > 1 else None) or measured[0]
        if language not in FORMULAS:
            return None
        return min(1.0, max(0.0, _ease(text, language)) / wanted) if wanted else 1.0

    return score


def _ease(text: str, language: str) -> float:
    """About 0 (hard) to 100 (easy); syllables are counted as groups of vowels."""
    base, per_length, per_syllables = FORMULAS[language]
    words = _WORD.findall(text)
    sentences = max(1, sum(bool(_WORD.search(part)) for part in _SENTENCE_END.split(text)))
    syllables = sum(max(1, len(_VOWELS.findall(word))) for word in words)
    return base - per_length * len(words) / sentences - per_syllables * syllables / len(words)
