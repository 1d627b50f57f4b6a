"""Facts in texts: addresses in the styles of four countries, postcodes, times, telephone numbers."""

import pytest

from appliance.text import facts


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("De balie is aan de Lindekade 3, naast de brug.", ["Lindekade 3"]),
        ("aan de vijverhofstraat 35-37 in Rotterdam", ["Vijverhofstraat 35-37"]),
        ("Tinlepelhof 5a en 's Gravenwal 13.", ["Tinlepelhof 5a", "Gravenwal 13"]),
        ("Ga naar de Lindekade nr. 12 – of 's-Gravenwal 14", ["Lindekade 12", "Gravenwal 14"]),
        ("Pokój przy ul. Długiej 5/7 lub przy Lindekade 3 w mieście", ["Długiej 5", "Lindekade 3"]),
        ("Berliner Straße 12 oder Hauptstr. 7, Goetheplatz 1", ["Berliner Strasse 12", "Hauptstrasse 7", "Goetheplatz 1"]),
        ("Go to 12 High Street or 7 St Mary's Road.", ["High Street 12", "St Mary's Road 7"]),
        ("اذهب إلى (Lindekade 20) غدا", ["Lindekade 20"]),
        ("onderweg 3 uur, markt 4, de supermarkt 24 uur open, Lindekade 20.30 uur, Lindekade 5 minuten lopen", []),
        ("In het Vondelpark 2024 was het feest; de snelweg 20", []),
        ("maat s- 12, of 's- 5", []),
    ],
)
def test_addresses(text: str, expected: list[str]) -> None:
    found = facts.addresses(text)
    assert [str(each) for each in found] == expected
    assert all(each.number[0] in text[each.start : each.end] for each in found)


def test_long_unbroken_text_is_read_once() -> None:
    """Where every letter is a place to begin at, this takes longer than anybody waits."""
    for unbroken in ("x" * 300_000, "x-" * 150_000, "x" + " " * 300_000, "1" * 300_000):
        assert facts.addresses(f"Nr. 5: {unbroken}!") == []
        assert not facts.EMAIL.search(unbroken)
    assert [str(each) for each in facts.addresses(f"{'x' * 300_000}straat 5, Lindekade 3")] == ["Lindekade 3"]


@pytest.mark.parametrize(
    ("one", "other", "same"),
    [
        ("20", "20", True),
        ("35", "35-37", True),
        ("36", "35-37", True),
        ("24", "20", False),
        ("20a", "20", False),
        ("38", "35-37", False),
    ],
)
def test_house_numbers_of_one_place(one: str, other: str, same: bool) -> None:
    assert facts.agree(one, other) is facts.agree(other, one) is same


def test_postcode_belongs_to_the_address_before_it() -> None:
    text = "Lindekade 3, 3012 JR Havermonde; Tinlepelhof 5 is verder weg, in 1011 AB"
    first, second = facts.addresses(text)
    assert facts.postcode_of(first, text) == "3012JR"
    assert facts.postcode_of(second, text) is None
    for text, code in (
        ("ul. Lipowa 3, 00-950 Warszawa", "00-950"),
        ("Lindenstraße 3, 10115 Berlin", "10115"),
        ("3 Linden Road, SW1A 1AA", "SW1A1AA"),
    ):
        (address,) = facts.addresses(text)
        assert facts.postcode_of(address, text) == code


def test_times() -> None:
    text = "van 9.30 tot 17 uur, at 8 pm, 12 a.m., um 7:05 Uhr, € 1.505, 12.345, 3.30,50"
    assert [str(each) for each in facts.times(text)] == ["09:30", "17:00", "20:00", "12:00", "07:05"]
    assert [text[each.start : each.end] for each in facts.times(text)][1:3] == ["17 uur", "8 pm"]


def test_phones() -> None:
    assert [each.number for each in facts.phones("Bel 010-3188188 of +48 22 123 45 67.", ["NL"])] == [
        "+31103188188",
        "+48221234567",
    ]
    assert facts.phones("Nummer 12345678 op 01-02-2024", ["NL"]) == []
