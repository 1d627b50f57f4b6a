"""Which of a few languages a text is in, by py3langid (offline; its model is inside the package)."""

import functools
from collections.abc import Sequence
from typing import Any

from appliance.errors import RecipeError

MINIMUM_CHARACTERS = 12
UNKNOWN = "unknown"
# Told apart from a recipe's own; more would only be mistaken for them.
OTHERS = ("ar", "de", "en", "es", "fr", "it", "nl", "pl", "pt", "ru", "tr", "uk")
READ_CHARACTERS = 400  # enough to tell a language by
SURE = 0.99
SURE_CHARACTERS = 40  # in less, a name or an address decides


def detect(text: str, candidates: Sequence[str]) -> str | None:
    """The likeliest of `candidates` (ISO 639-1); None for a text too short to tell."""
    if len(text.strip()) < MINIMUM_CHARACTERS:
        return None
    language: str = _identifier(tuple(sorted(candidates))).classify(text)[0]
    return language


def hear(text: str, spoken: Sequence[str]) -> tuple[str, float] | None:
    """The language of a text and its probability; None for a text too short to tell.

    It is one of the `spoken`, unless a longer text is surely in another.
    """
    read = text[:READ_CHARACTERS]
    if len(read.strip()) < MINIMUM_CHARACTERS:
        return None
    ranked = _identifier(tuple(sorted({*spoken, *OTHERS}))).rank(read)  # the likeliest first
    is_sure = ranked[0][1] >= SURE and len(text) >= SURE_CHARACTERS
    language, probability = ranked[0] if is_sure else next(each for each in ranked if each[0] in spoken)
    return language, float(probability)


def of_row(answer: str, asked: str, spoken: Sequence[str]) -> str:
    """The language of a row: of its answer, or of what is asked where the answer is too short to tell."""
    heard = hear(answer, spoken) or hear(asked, spoken)
    return heard[0] if heard else UNKNOWN


def probability(text: str, language: str, candidates: Sequence[str]) -> float | None:
    """How likely a text is in `language` rather than in another of the `candidates`; None for one too short to tell."""
    if len(text.strip()) < MINIMUM_CHARACTERS:
        return None
    ranks = dict(_identifier(tuple(sorted({*candidates, language}))).rank(text))
    return float(ranks[language])


def require_known(codes: Sequence[str]) -> None:
    """Raises `RecipeError` for codes that py3langid does not tell apart."""
    if unknown := sorted(set(codes) - set(_load().labels)):
        raise RecipeError(f"languages: unknown codes {', '.join(unknown)}; use ISO 639-1 codes such as nl, en, pl, ar.")


@functools.lru_cache(maxsize=4)
def _identifier(candidates: tuple[str, ...]) -> Any:
    identifier = _load()
    identifier.set_languages(list(candidates))
    return identifier


def _load() -> Any:
    from py3langid.langid import MODEL_FILE, LanguageIdentifier

    return LanguageIdentifier.from_model_file(MODEL_FILE, norm_probs=True)
