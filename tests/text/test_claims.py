"""Claims by their form, the same however they are written."""

import pytest

from appliance.text.claims import Claim, find, occurs


@pytest.mark.parametrize(
    ("language", "text", "kind", "value"),
    [
        ("nl", "De balie is aan de Lindekade 3, naast de brug.", "address", "lindekade 3"),
        ("nl", "Kom naar Vijverhofstraat 35-37.", "address", "vijverhofstraat 35-37"),
        ("de", "Das Hotel liegt in der Lindenstraße 12a.", "address", "lindenstrasse 12a"),
        ("en", "We are at 12 Mill Street.", "address", "mill street 12"),
        ("pl", "Biuro jest przy ul. Lipowa 7.", "address", "lipowa 7"),
        ("nl", "open om 9.30 uur", "time", "09:30"),
        ("nl", "open om 9 uur", "time", "09:00"),
        ("en", "open until 4 pm", "time", "16:00"),
        ("en", "open until 16:00", "time", "16:00"),
        ("en", "call 06 12345678 now", "number", "0612345678"),
        ("en", "it costs 1.000 euros", "number", "1000"),
        ("nl", "het kost 3,50 euro", "number", "3.50"),
        ("en", "write to desk@example.org.", "contact", "desk example org"),
        ("en", "the desk in Rotterdam is open", "name", "rotterdam"),
    ],
)
def test_found(language: str, text: str, kind: str, value: str) -> None:
    assert Claim(kind, value) in find(text, language)  # type: ignore[arg-type]


def test_a_house_number_is_no_number_of_its_own() -> None:
    assert {claim.kind for claim in find("de balie is aan de Lindekade 3", "nl")} == {"address"}


def test_nothing_to_find() -> None:
    assert find("Ja, dat mag.", "nl") == frozenset()
    assert find("Das Zimmer war sehr schön und der Service gut.", "de") == frozenset()


def test_another_house_number_is_another_address() -> None:
    right, wrong = find("Ga naar Lindekade 3", "nl"), find("Ga naar Lindekade 30", "nl")
    assert not right & wrong


def test_what_opens_a_sentence_is_found_by_its_words() -> None:
    (claim,) = find("the desk in Rotterdam", "en")
    assert occurs(claim, "Rotterdam has it.", find("Rotterdam has it.", "en"))
    assert not occurs(claim, "Amsterdam has it.", find("Amsterdam has it.", "en"))


def test_a_house_inside_a_range_is_no_other_address() -> None:
    (claim,) = find("Ga naar Vijverhofstraat 35", "nl")
    for text, expected in (
        ("Vijverhofstraat 35-37 is het adres", True),
        ("Vijverhofstraat 3-5", False),
        ("Lindekade 35-37", False),
    ):
        assert occurs(claim, text, find(text, "nl")) is expected
