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
    """The words of a text that say what it is about."""
    return [word for word in words(text) if len(word) > 2 and EVERY_STOP_WORD.isdisjoint((word, APOSTROPHE.split(word)[0]))]


def normal(text: str) -> str:
    """A text without what hardly makes it another one: case, punctuation, spacing. Never empty for a text that is not."""
    return " ".join(PART.findall(unicodedata.normalize("NFKC", text).casefold())) or text
