"""Language detection among a few candidates, offline."""

import pytest

from appliance.errors import RecipeError
from appliance.text import languages

CANDIDATES = ("nl", "en", "pl", "ar")


@pytest.mark.parametrize(
    ("text", "language"),
    [
        ("De nachtopvang is elke dag open vanaf acht uur.", "nl"),
        ("The night shelter opens at eight every day.", "en"),
        ("Nocleg jest otwarty codziennie od ósmej.", "pl"),
        ("المأوى الليلي مفتوح كل يوم من الساعة الثامنة.", "ar"),
    ],
)
def test_language(text: str, language: str) -> None:
    assert languages.detect(text, CANDIDATES) == language


@pytest.mark.parametrize("text", ["", "  ", "Ja.", "  kort       "])
def test_too_short_to_tell(text: str) -> None:
    assert languages.detect(text, CANDIDATES) is None


def test_only_candidates_are_answered() -> None:
    assert languages.detect("De nachtopvang is elke dag open vanaf acht uur.", ("en", "pl")) in ("en", "pl")
    assert languages.detect("De nachtopvang is elke dag open vanaf acht uur.", CANDIDATES) == "nl"


def test_unknown_codes_are_named() -> None:
    languages.require_known(CANDIDATES)
    with pytest.raises(RecipeError, match="unknown codes NL, dutch;"):
        languages.require_known(["nl", "dutch", "NL"])
