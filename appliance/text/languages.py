"""Which of a few languages a text is in, by py3langid (offline; its model is inside the package)."""

import functools
from collections.abc import Sequence
from typing import Any

MINIMUM_CHARACTERS = 12


def detect(text: str, candidates: Sequence[str]) -> str | None:
    """The likeliest of `candidates` (ISO 639-1); None for a text too short to tell."""
    if len(text.strip()) < MINIMUM_CHARACTERS:
        return None
    language: str = _identifier(tuple(sorted(candidates))).classify(text)[0]
    return language


@functools.lru_cache(maxsize=4)
def _identifier(candidates: tuple[str, ...]) -> Any:
    from py3langid.langid import MODEL_FILE, LanguageIdentifier

    identifier = LanguageIdentifier.from_model_file(MODEL_FILE, norm_probs=True)
    identifier.set_languages(list(candidates))
    return identifier
