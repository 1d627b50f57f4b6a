"""Words that say what a text is about."""

import pytest

from appliance.text.words import telling


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("L'art d'une ville, l'hôpital", ["art", "ville", "hôpital"]),
        ("They don't know, and we'll see the lighthouse", ["know", "see", "lighthouse"]),
        ("De schuur van opa's huis", ["schuur", "opa's", "huis"]),
    ],
)
def test_telling(text: str, words: list[str]) -> None:
    assert telling(text) == words
