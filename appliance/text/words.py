"""Words of a text, those that say what it is about, and the form in which two texts count as the same."""

import re
import unicodedata

from appliance.text.stop_words import EVERY_STOP_WORD

WORD = re.compile(r"[^\W\d_]+(?:['’-][^\W\d_]+)*")
APOSTROPHE = re.compile("['’]")
PART = re.compile(r"[^\W_]+")


def words(text: str) -> list[str]:
    """The words of a text in lower case, without figures."""
    return [word.casefold() for word in WORD.findall(text)]


def telling(text: str) -> list[str]:
    """The words of a text that say what it is about; without what is elided before them ("l'art" is about "art")."""
    bare = [_without_elision(word) for word in words(text)]
    return [word for word in bare if len(word) > 2 and not _is_stop_word(word)]


def _is_stop_word(word: str) -> bool:
    """A contraction with "not" says as little as the verb in it."""
    first, *rest = APOSTROPHE.split(word, maxsplit=1)
    return word in EVERY_STOP_WORD or first in EVERY_STOP_WORD or (rest == ["t"] and first.endswith("n"))


def _without_elision(word: str) -> str:
    first, *rest = APOSTROPHE.split(word, maxsplit=1)
    return rest[0] if rest and len(first) <= 2 else word


def normal(text: str) -> str:
    """A text without what hardly makes it another one: case, punctuation, spacing. Never empty for a text that is not."""
    return " ".join(PART.findall(unicodedata.normalize("NFKC", text).casefold())) or text
