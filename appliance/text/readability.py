"""How hard a text is to read, by a formula that was made for its language, where there is one.

Dutch: Flesch-Douma (1960). English: Flesch (1948). German: Amstad (1978). French: Kandel and Moles (1958). Their scores fall
from 100 (easy) to 0.
Polish: Pisarek (1969), checked with readers by Charzyńska and Dębowski (2015); it rises with the years of schooling.
Arabic has none here: its formulas count syllables, which unvowelled script does not show. A score never proves a CEFR level.
"""

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Literal

from appliance.text.words import WORD

MINIMUM_WORDS = 10
_SENTENCE_END = re.compile(r"[.!?؟…]+(?=\s|$)|\n+")
_VOWELS = {
    "nl": re.compile(r"aai|ooi|oei|eeuw|ieuw|aa|ee|oo|uu|ie|oe|eu|ui|ij|ei|au|ou|[aeiouyáéíóúàèäëïöü]", re.IGNORECASE),
    "en": re.compile(r"[aeiouy]+", re.IGNORECASE),
    "de": re.compile(r"ie|ei|ai|eu|äu|au|aa|ee|oo|[aeiouyäöü]", re.IGNORECASE),
    # "i" before another vowel only softens the consonant.
    "fr": re.compile(r"eau|aie|oui|ou|ai|ei|oi|au|eu|œu|ie|ui|io|ia|[aeiouyàâæéèêëîïôœùûüÿ]", re.IGNORECASE),
    "pl": re.compile(r"i?(?:au|eu|[aąeęoóuy])|i", re.IGNORECASE),
}
NO_METHOD = "none: there is no formula for it here"


@dataclass(frozen=True, slots=True)
class Method:
    """A formula; `hard` is the score past which an adult with little schooling is lost."""

    name: str
    score: Callable[[float, float, float], float]  # words a sentence, syllables a word, share of words of four syllables
    hard: float
    better: Literal["higher", "lower"]

    def is_hard(self, score: float) -> bool:
        return score < self.hard if self.better == "higher" else score > self.hard


METHODS: Mapping[str, Method] = {
    "nl": Method("Flesch-Douma", lambda length, syllables, _: 206.84 - 0.93 * length - 77 * syllables, 50, "higher"),
    "en": Method(
        "Flesch reading ease", lambda length, syllables, _: 206.835 - 1.015 * length - 84.6 * syllables, 50, "higher"
    ),
    "fr": Method(
        "Flesch, by Kandel and Moles", lambda length, syllables, _: 207 - 1.015 * length - 73.6 * syllables, 50, "higher"
    ),
    "de": Method("Flesch, by Amstad", lambda length, syllables, _: 180 - length - 58.5 * syllables, 50, "higher"),
    "pl": Method("Pisarek, linear", lambda length, _, hard: length / 3 + 100 * hard / 3 + 1, 12, "lower"),
}
NO_METHODS = {"ar": "none: the formulas for Arabic count syllables, which unvowelled script does not show"}


def method_name(language: str) -> str:
    """The method for a language, or why it has none."""
    return METHODS[language].name if language in METHODS else NO_METHODS.get(language, NO_METHOD)


def score(text: str, language: str) -> float | None:
    """The score by the language's formula; None without a formula or for fewer than ten words."""
    return score_any(text, language) if len(WORD.findall(text)) >= MINIMUM_WORDS else None


def score_any(text: str, language: str) -> float | None:
    """The same of any text that has words: of a few of them it says little, but an answer must not escape by being short."""
    words = WORD.findall(text)
    if language not in METHODS or not words:
        return None
    sentences = max(1, sum(bool(WORD.search(part)) for part in _SENTENCE_END.split(text)))
    counts = [syllables(word, language) for word in words]
    long = sum(count >= 4 for count in counts) / len(words)
    return METHODS[language].score(len(words) / sentences, sum(counts) / len(words), long)


def syllables(word: str, language: str) -> int:
    """Syllables by the spelling: groups of vowels, and no silent e in English and French."""
    count = len(_VOWELS[language].findall(word))
    if language == "fr" and count > 1 and re.search(r"[^aeiouyéèêà]e(?:s|nt)?$", word, re.IGNORECASE):
        count -= 1
    if language == "en" and count > 1 and re.search(r"[^aeiouyl]e$|[^aeiouytd]ed$", word, re.IGNORECASE):
        count -= 1
    return max(1, count)
