"""Whether an answer reads as easily as the recipe wants, by its language's reading ease (`appliance/text/readability.py`).

A count of syllables and sentence lengths, no judgement of a text's level: it never proves B1.
"""

from collections.abc import Sequence

from appliance.errors import RecipeError
from appliance.reward_settings import Readability
from appliance.text.languages import detect
from appliance.text.readability import METHODS, score_any
from appliance.training.rewards.reward import Answer, Prompt, Score

# Those that run from about 0 (hard) to 100 (easy); Polish counts years of schooling.
EASES = [language for language, method in METHODS.items() if method.better == "higher"]


def make(settings: Readability, prompts: Sequence[Prompt], languages: Sequence[str]) -> Score:  # noqa: ARG001
    """Raises `RecipeError` for a recipe none of whose languages has a formula."""
    if not (measured := [language for language in languages if language in EASES]):
        raise RecipeError(f"grpo.rewards.readability knows {', '.join(EASES)}; the recipe's languages are none of them.")

    def score(answers: Sequence[Answer]) -> list[float | None]:
        return [_score(answer.text, settings.ease) for answer in answers]

    def _score(text: str, wanted: float) -> float | None:
        language = (detect(text, languages) if len(languages) > 1 else None) or measured[0]
        if language not in EASES:
            return None
        ease = score_any(text, language)
        if ease is None:  # no words
            return 0.0
        return min(1.0, max(0.0, ease) / wanted) if wanted else 1.0

    return score
