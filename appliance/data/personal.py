"""Personal data in rows: a model that has read them may say them to anybody.

A Dutch citizen service number (BSN) counts when it passes its 11-test or when a label announces it, since people mistype
their own. Names and dates of birth are found by their label only. What the FAQ states is the organisation's own. No value
is ever shown, and neither is, elsewhere in a report, what is not `is_public`. Main entry: `find`.
"""

import re
from collections.abc import Callable, Collection, Iterable, Sequence
from dataclasses import dataclass

from appliance.data import examples
from appliance.data.texts import Text
from appliance.findings import Finding
from appliance.text import facts, words

REGIONS = {"nl": "NL", "en": "GB", "de": "DE", "pl": "PL", "fr": "FR", "es": "ES", "it": "IT", "tr": "TR"}
SHARED_ROWS = 3  # a number or address in more rows than this is public, not somebody's

_NINE = r"(?<![\w.+-])\d{3}[. ]?\d{3}[. ]?\d{3}(?![\w-]|\.\d)|(?<![\w.+-])\d{4}[. ]\d{2}[. ]\d{3}(?![\w-]|\.\d)"
_BSN = re.compile(_NINE)
_BSN_LABELLED = re.compile(
    r"(?i:\b(?:BSN|burgerservicenummer|sofi-?nummer|citizen service number)\b)\W*(?:(?i:is|nummer|number|nr)\W*)?"
    rf"(?:{_NINE}|\d{{8,9}}\b)"
)
# Looked for at every place, also inside what begins like one before it; what follows an account may look like more of it.
_IBAN = re.compile(r"\b(?=([A-Z]{2}[0-9]{2}(?:\s?[A-Z0-9]{4}){2,7}(?:\s?[A-Z0-9]{1,4})?)\b)", re.IGNORECASE)
_LABEL_END = r"\W{0,4}[:=]\W{0,4}"
_CAPITAL = r"[A-ZŁŚŻŹĆÄÖÜ\u0620-\u064a][^\W\d_]+"
_NAME = re.compile(
    r"(?i:\b(?:(?:voor|achter)?naam|(?:full|first|last) name|name|vorname|nachname|imię(?: i nazwisko)?|nazwisko)|\bالاسم)"
    rf"{_LABEL_END}(?!\s)({_CAPITAL}(?:[ -](?:[^\W\d_]{{1,3}} ){{0,2}}{_CAPITAL}){{0,3}})"
)
_BIRTH = re.compile(
    r"(?i:\b(?:geboortedatum|geboren op|date of birth|born on|geburtsdatum|data urodzenia)|تاريخ الميلاد)"
    r"\W{0,6}\d{1,4}[-./ ]\w+[-./ ]\d{2,4}"
)


@dataclass(frozen=True, slots=True)
class Kind:
    """One sort of personal data: its name, how it is said, and what finds its values in a text."""

    name: str
    said: str
    values: Callable[[str, Sequence[str]], Iterable[str]]
    is_shared_public: bool = False  # what many rows repeat is an organisation's


def _bsns(text: str, _: Sequence[str]) -> Iterable[str]:
    if not any(character.isdecimal() for character in text):
        return
    from stdnum.nl import bsn

    for match in _BSN_LABELLED.finditer(text):
        yield re.sub(r"\D", "", match.group())
    for match in _BSN.finditer(text):
        digits = re.sub(r"\D", "", match.group())
        if not digits.startswith("0") and bsn.is_valid(digits):
            yield digits


def _ibans(text: str, _: Sequence[str]) -> Iterable[str]:
    from stdnum import iban

    for match in _IBAN.finditer(text):
        groups = match[1].split()
        while groups and not iban.is_valid("".join(groups)):
            groups.pop()
        if groups:
            yield "".join(groups).upper()


def _phones(text: str, regions: Sequence[str]) -> Iterable[str]:
    return (phone.number for phone in facts.phones(text, regions))


def _matches(pattern: re.Pattern[str]) -> Callable[[str, Sequence[str]], Iterable[str]]:
    return lambda text, _: (match[pattern.groups].casefold() for match in pattern.finditer(text))


KINDS = (
    Kind("bsn", "a citizen service number (BSN), by its 11-test or its label", _bsns),
    Kind("iban", "a bank account (IBAN)", _ibans, is_shared_public=True),
    Kind("phone", "a telephone number that is not in the FAQ", _phones, is_shared_public=True),
    Kind("email", "an e-mail address that is not in the FAQ", _matches(facts.EMAIL), is_shared_public=True),
    Kind("name", "a name behind its label", _matches(_NAME)),
    Kind("birth_date", "a date of birth behind its label", _matches(_BIRTH)),
)


def regions_of(languages: Sequence[str]) -> list[str]:
    """Where telephone numbers without a country code may be from."""
    return [REGIONS[language] for language in languages if language in REGIONS]


def find(rows: Sequence[Text], languages: Sequence[str]) -> list[Finding]:
    """A finding for each sort of personal data."""
    regions = regions_of(languages)
    found = []
    for kind in KINDS:
        holders = _holders(kind, rows, regions)
        if holders:
            found.append(
                Finding(
                    kind=f"personal_{kind.name}",
                    level="problem",
                    what=f"In {examples.rows(len(holders))}: {kind.said}",
                    remedy="Take it out or put an invented one in its place; a model may repeat to anybody what it was"
                    " trained on.",
                    count=len(holders),
                    examples=examples.of(holders),
                )
            )
    return found


def is_public(holders: Collection[Text], *, is_shared_public: bool = True) -> bool:
    """Whether what these rows hold is the organisation's, so that it may be shown: by the FAQ, or by their number."""
    return (is_shared_public and len(holders) > SHARED_ROWS) or any(row.kind == "faq" for row in holders)


def names(rows: Sequence[Text]) -> set[str]:
    """The words of which names and e-mail addresses consist that are somebody's: no list of words may show them."""
    found = set()
    for kind in KINDS:
        if kind.name in ("name", "email"):
            for value in _private(kind, rows, ()):
                found.update(words.words(value.partition("@")[0]))
    return found


def _holders(kind: Kind, rows: Sequence[Text], regions: Sequence[str]) -> list[Text]:
    private = {id(row) for holders in _private(kind, rows, regions).values() for row in holders}
    return [row for row in rows if id(row) in private]


def _private(kind: Kind, rows: Sequence[Text], regions: Sequence[str]) -> dict[str, list[Text]]:
    """The values that are somebody's, and the rows that hold each."""
    by_value: dict[str, list[Text]] = {}
    for row in rows:
        for value in set(kind.values(row.everything, regions)):
            by_value.setdefault(value, []).append(row)
    return {
        value: holders
        for value, holders in by_value.items()
        if not is_public(holders, is_shared_public=kind.is_shared_public)
    }
