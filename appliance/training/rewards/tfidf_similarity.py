"""How near an answer's words are to those of its own reference: cosine of TF-IDF vectors, fitted once on all references.

Words that no reference has count as the rarest ones, or they could be added for nothing. Cosine alone is won by keywords: a
handful of the reference's rare words, without a sentence around them, comes near 1. So what is shorter or more repetitive
than the reference gets less, unless the recipe sets `guard = false`.
"""

import math
from collections import Counter
from collections.abc import Sequence

from appliance.errors import DataError
from appliance.reward_settings import TfidfSimilarity
from appliance.text.stop_words import stop_words
from appliance.text.words import PART
from appliance.training.rewards.reward import Answer, Prompt, Score


def make(settings: TfidfSimilarity, prompts: Sequence[Prompt], languages: Sequence[str]) -> Score:
    """Raises `DataError` when the references hold nothing but function words."""
    import numpy as np
    from sklearn.feature_extraction.text import TfidfVectorizer

    ignored = stop_words(languages)

    def telling(text: str) -> list[str]:
        return [word for word in PART.findall(text.casefold()) if word not in ignored]

    vectorizer = TfidfVectorizer(analyzer=telling)
    try:
        vectorizer.fit([prompt.reference for prompt in prompts])
    except ValueError as error:
        raise DataError(
            f"tfidf_similarity: the {len(prompts)} references hold no word beside function words ({error}); take another."
        ) from error

    rarest = math.log(1 + len(prompts)) + 1  # the weight that the vectorizer would give a word of no reference

    def known_part(text: str) -> float:
        """Of the length of a text's vector: what its words have that some reference has, 0 to 1."""
        counts = Counter(telling(text))
        weights = {
            word: vectorizer.idf_[place] for word in counts if (place := vectorizer.vocabulary_.get(word)) is not None
        }
        known = sum((counts[word] * weight) ** 2 for word, weight in weights.items())
        unknown = sum((count * rarest) ** 2 for word, count in counts.items() if word not in weights)
        return math.sqrt(known / (known + unknown)) if known else 0.0

    def score(answers: Sequence[Answer]) -> list[float]:
        texts = vectorizer.transform([answer.text for answer in answers])
        references = vectorizer.transform([answer.prompt.reference for answer in answers])
        cosines = np.asarray(texts.multiply(references).sum(axis=1)).ravel().tolist()  # since rows are 1 long
        found = [cosine * known_part(each.text) for cosine, each in zip(cosines, answers, strict=True)]
        if not settings.guard:
            return found
        return [cosine * _fullness(each.text, each.prompt.reference) for cosine, each in zip(found, answers, strict=True)]

    return score


def _fullness(text: str, reference: str) -> float:
    """From 0 to 1: 1 for a text as long as the reference, and with as few repetitions, or longer."""
    words, expected = (PART.findall(each.casefold()) for each in (text, reference))
    if not words or not expected:
        return 0.0
    variety = (len(set(words)) / len(words)) / (len(set(expected)) / len(expected))
    return min(1.0, len(words) / len(expected)) * min(1.0, variety)
