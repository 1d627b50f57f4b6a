"""Readability: each language by its own formula, and none where there is none."""

import pytest

from appliance.text import readability


@pytest.mark.parametrize(
    ("language", "word", "expected"),
    [
        *(("nl", "openingstijden", 5), ("nl", "geen", 1), ("nl", "nieuwe", 2)),
        *(("en", "made", 1), ("en", "table", 2), ("en", "opened", 2)),
        *(("de", "Häuser", 2), ("pl", "miasto", 2), ("pl", "niebieski", 3), ("pl", "ul", 1)),
    ],
)
def test_syllables(language: str, word: str, expected: int) -> None:
    assert readability.syllables(word, language) == expected


def test_formula_by_hand() -> None:
    text = "De kat zit op de mat. De hond zit in de tuin."  # 12 words, 12 syllables, 2 sentences
    assert readability.score(text, "nl") == pytest.approx(206.84 - 0.93 * 6 - 77)


TEXTS = {
    "nl": (
        "De deur is nu open. Je mag naar binnen. Er is koffie en brood voor jou.",
        "Overeenkomstig de desbetreffende verordeningen geschiedt toelating uitsluitend na voorafgaande beoordeling van"
        " aanspraken.",
    ),
    "en": (
        "The door is open now. You can come in. There is bread and tea for you.",
        "Eligibility determinations necessitate administrative verification of documentation preceding accommodation"
        " availability.",
    ),
    "de": (
        "Die Tür ist auf. Du kannst nun rein. Es gibt Brot und Tee für dich.",
        "Entsprechend der Verordnung erfolgt Unterbringung ausschließlich nach vorheriger Anspruchsberechtigungsprüfung"
        " durch zuständige Behörden.",
    ),
    "pl": (
        "Drzwi są otwarte. Możesz wejść do środka. Jest tu chleb i kawa.",
        "Zakwaterowanie następuje wyłącznie po przeprowadzeniu uprzedniej weryfikacji uprawnień świadczeniobiorcy przez"
        " odpowiednie organy administracyjne.",
    ),
}


@pytest.mark.parametrize("language", TEXTS)
def test_hard_texts_are_told_from_easy_ones(language: str) -> None:
    method = readability.METHODS[language]
    scores = [readability.score(text, language) for text in TEXTS[language]]
    assert None not in scores
    assert [method.is_hard(each) for each in scores if each is not None] == [False, True]


def test_language_without_a_method_says_so() -> None:
    assert readability.score("هذا نص قصير جدا لا يمكن قياس سهولة قراءته بأي طريقة معروفة هنا الآن", "ar") is None
    assert "unvowelled" in readability.method_name("ar")
    assert readability.method_name("xx").startswith("none")
    assert readability.score("te kort", "nl") is None
