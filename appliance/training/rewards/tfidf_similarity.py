"""How near an answer's words are to those of its own reference: cosine of TF-IDF vectors, fitted once on all references.

Cosine alone is won by keywords: a handful of the reference's rare words, without a sentence around them, comes near 1. So
what is shorter or more repetitive than the reference gets less, unless the recipe sets `guard = false`.
"""

import re
from collections.abc import Sequence

from appliance.errors import DataError
from appliance.reward_settings import TfidfSimilarity
from appliance.text.stop_words import stop_words
from appliance.training.rewards.reward import Answer, Prompt, Score

_WORD = re.compile(r"\w+")
_SHORTEST = r"(?u)\b\w\w+\b"  # as scikit-learn counts words


def make(settings: TfidfSimilarity, prompts: Sequence[Prompt], languages: Sequence[str]) -> Score:
    """Raises `DataError` when the references hold nothing but function words."""
    import numpy as np
    from sklearn.feature_extraction.text import TfidfVectorizer

    words = [word for word in stop_words(languages) if len(word) > 1]
    vectorizer = TfidfVectorizer(lowercase=True, stop_words=sorted(words), token_pattern=_SHORTEST)
    try:
        vectorizer.fit([prompt.reference for prompt in prompts])
    except ValueError as error:
        raise DataError(
            f"tfidf_similarity: the {len(prompts)} references hold no word beside function words ({error}); take another."
        ) from error

    def score(answers: Sequence[Answer]) -> list[float]:
        texts = vectorizer.transform([answer.text for answer in answers])
        references = vectorizer.transform([answer.prompt.reference for answer in answers])
        found = np.asarray(texts.multiply(references).sum(axis=1)).ravel().tolist()  # cosines, since rows are 1 long
        if not settings.guard:
            return list(found)
        return [cosine * _fullness(each.text, each.prompt.reference) for cosine, each in zip(found, answers, strict=True)]

    return score


def _fullness(text: str, reference: str) -> float:
    """From 0 to 1: 1 for a text as long as the reference, and with as few repetitions, or longer."""
    words, expected = (_WORD.findall(each.casefold()) for each in (text, reference))
    if not words or not expected:
        return 0.0
    variety = (len(set(words)) / len(words)) / (len(set(expected)) / len(expected))
    return min(1.0, len(words) / len(expected)) * min(1.0, variety)
