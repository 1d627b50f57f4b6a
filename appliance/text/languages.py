"""Which of a few languages a text is in, by py3langid (offline; its model is inside the package)."""

import functools
from collections.abc import Sequence
from typing import Any

from appliance.errors import RecipeError

MINIMUM_CHARACTERS = 12


def detect(text: str, candidates: Sequence[str]) -> str | None:
    """The likeliest of `candidates` (ISO 639-1); None for a text too short to tell."""
    if len(text.strip()) < MINIMUM_CHARACTERS:
        return None
    language: str = _identifier(tuple(sorted(candidates))).classify(text)[0]
    return language


def identify(text: str, candidates: Sequence[str]) -> tuple[str, float] | None:
    """The likeliest of `candidates` and its probability among them; None for a text too short to tell."""
    if len(text.strip()) < MINIMUM_CHARACTERS:
        return None
    language, probability = _identifier(tuple(sorted(candidates))).classify(text)
    return language, float(probability)


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
