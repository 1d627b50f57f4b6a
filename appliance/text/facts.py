"""Facts that a text states and that can be true or false: streets with house numbers, postcodes, telephone numbers, times.

Streets are found in the Dutch, German, English and Polish styles, whatever the language around them. An address is compared
by `street` and `number`; it is not known whether it exists.
"""

import functools
import re
import string
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

# Endings of street names. The weak ones also end common words, so that the name must begin with a capital.
STRONG: tuple[str, ...] = (
    "straat",
    "weg",
    "laan",
    "plein",
    "kade",
    "singel",
    "gracht",
    "dijk",
    "steeg",
    "dreef",
    "strasse",
    "str.",
    "platz",
)
STRONG += ("allee", "gasse", "ufer", "chaussee")
WEAK: tuple[str, ...] = (
    "wal",
    "hof",
    "pad",
    "markt",
    "haven",
    "plantsoen",
    "park",
    "boulevard",
    "baan",
    "poort",
    "damm",
    "ring",
    "dam",
    "hoek",
)
NOT_STREETS = frozenset({"onderweg", "halverwege", "snelweg", "autoweg", "supermarkt", "uitweg", "omweg", "bijstand"})

# A number, its letter, and a range; not the beginning of an amount, a time or a longer number.
_NUMBER = r"\d{1,4}[a-zA-Z]?(?!\w)(?:\s?[-–]\s?\d{1,4}[a-zA-Z]?(?!\w))?(?![.,:]\d)"
_UNIT = (
    r"(?!\s*(?:uur|euro|eur\b|€|%|ct\b|minu|min\b|dagen|days|weken|weeks|personen|mensen|people|km|m\b|meter|uhr|godz|zł|"
    r"hours?|o['’]clock|am\b|pm\b|jaar|years?|lat\b|tage|keer|times))"
)
# Words are bounded and begin where no other goes on: in a long unbroken one every letter would be a place to begin at.
_AFTER = re.compile(
    rf"(?<!\w)((?:[^\W\d_][\w'’-]{{0,60}}\s{{1,9}})?)([^\W\d_][\w'’-]{{0,60}}\.?)\s{{1,9}}(?:nr\.?\s{{1,9}}|nummer\s{{1,9}})?"
    rf"({_NUMBER}){_UNIT}",
    re.IGNORECASE,
)
_ENGLISH = re.compile(
    r"\b(\d{1,4}[a-zA-Z]?)\s+((?:[A-Z][\w'’]+\s+){1,3}(?:Street|Road|Avenue|Lane|Square|Drive|Way|Court|Terrace|Close|Row|Quay))\b"
)
_POLISH = re.compile(
    rf"\b(?:ul\.|ulic[aąęy]|al\.|alei|aleja|alejach|pl\.|placu?|os\.)\s+((?:[^\W\d_][\w'’-]*\.?\s+){{1,3}}?)({_NUMBER}){_UNIT}",
    re.IGNORECASE,
)
_POSTCODES = re.compile(
    r"\b(?:[1-9]\d{3}\s?(?!S[ADS]\b)[A-Z]{2}|\d{2}-\d{3}|[A-Z]{1,2}\d[A-Z\d]?\s\d[A-Z]{2}|\d{5}(?=\s+[A-ZÄÖÜ]))\b"
)
_TIMES = re.compile(
    r"\b(?:([01]?\d|2[0-4])[.:h]([0-5]\d)(?!\d|[.,]\d)(?:\s?(?:uur|uhr|h)\b)?|([01]?\d|2[0-4])(?=\s?(?:uur|uhr|h|[ap]\.?m)\b))"
    r"(?:\s?(?:uur|uhr|h)\b|\s?([ap])\.?m\b\.?)?",
    re.IGNORECASE,
)
_DIGITS = re.compile(r"(?<![\w.])[+(]{0,2}\d[\d \t().\-/]{5,24}\d(?!\w)")
EMAIL = re.compile(r"(?<![\w.+-])[\w.+-]+@[\w-]+(?:\.[\w-]+)*\.[^\W\d_]{2,}")
POSTCODE_REACH = 12  # characters between an address and its postcode: a comma, a city


@dataclass(frozen=True, slots=True)
class Address:
    """A street with a house number; `start` and `end` say where in the text."""

    street: str
    number: str
    start: int
    end: int

    def __str__(self) -> str:
        return f"{string.capwords(self.street)} {self.number}"


@dataclass(frozen=True, slots=True)
class Time:
    """`clock` is HH:MM of a day of 24 hours."""

    clock: str
    start: int
    end: int

    def __str__(self) -> str:
        return self.clock


@dataclass(frozen=True, slots=True)
class Phone:
    number: str  # as E.164
    start: int


def addresses(text: str) -> list[Address]:
    """Streets with house numbers, in the order of the text."""
    if not any(character.isdecimal() for character in text):
        return []
    found = {(each.end, each.number): each for each in (*_english(text), *_polish(text), *_by_ending(text))}
    return sorted(found.values(), key=lambda each: each.start)


def _by_ending(text: str) -> Iterator[Address]:
    for match in _AFTER.finditer(text):
        before, word, number = match.groups()
        word = word.removeprefix("s-")  # 's-Gravenweg
        name = word.casefold()
        if not word or name in NOT_STREETS or re.fullmatch(r"(?:19|20)\d\d", number):
            continue
        strong = next((ending for ending in STRONG if name.endswith(ending)), "")
        weak = not strong and word[0].isupper() and name.endswith(WEAK)
        if strong and len(name) <= len(strong) + 1:  # "Berliner Straße 3": the name stands before
            if not before or not before[0].isupper() or not word[0].isupper():
                continue
            name = f"{before.strip()} {name}"
        elif not strong and not weak:
            continue
        yield Address(_street(name), _house(number), match.start(2), match.end(3))


def _english(text: str) -> Iterator[Address]:
    for match in _ENGLISH.finditer(text):
        yield Address(_street(match[2]), _house(match[1]), match.start(), match.end())


def _polish(text: str) -> Iterator[Address]:
    for match in _POLISH.finditer(text):
        yield Address(_street(match[1]), _house(match[2]), match.start(1), match.end(2))


def _street(name: str) -> str:
    folded = " ".join(name.casefold().split()).replace("’", "'")
    return re.sub(r"str\.$", "strasse", folded)


def _house(number: str) -> str:
    return re.sub(r"\s", "", number).replace("–", "-").lower()


def agree(number: str, other: str) -> bool:
    """Whether two house numbers can be of one place: the same, or one inside the other's range."""
    if number == other:
        return True
    low, high = (_bounds(each) for each in (number, other))
    return low != high and ("-" in number or "-" in other) and max(low[0], high[0]) <= min(low[1], high[1])


def _bounds(number: str) -> tuple[int, int]:
    ends = [int(re.sub(r"\D", "", part)) for part in number.split("-")]
    return ends[0], ends[-1]


def postcode_of(address: Address, text: str) -> str | None:
    """The postcode written behind an address."""
    near = _POSTCODES.search(text, address.end, address.end + POSTCODE_REACH + 8)
    return re.sub(r"\s", "", near.group()) if near and near.start() - address.end <= POSTCODE_REACH else None


def times(text: str) -> list[Time]:
    """Times of day, in the order of the text."""
    found = []
    for match in _TIMES.finditer(text):
        hour, minute, whole, half = match.groups()
        hours = int(hour or whole)
        hours += 12 if half in ("p", "P") and hours < 12 else 0
        found.append(Time(f"{hours:02}:{minute or '00'}", match.start(), match.end()))
    return found


def phones(text: str, regions: Sequence[str]) -> list[Phone]:
    """Telephone numbers that are valid in one of the regions (ISO 3166), or written with their country code.

    Each once; a number that is valid in several regions is read as of the first.
    """
    found: dict[str, Phone] = {}
    for match in _DIGITS.finditer(text):
        for number in _phones(match.group(), tuple(regions)):
            found.setdefault(number, Phone(number, match.start()))
    return list(found.values())


@functools.lru_cache(maxsize=1 << 16)  # the library takes a millisecond each, and rows repeat their numbers
def _phones(digits: str, regions: tuple[str, ...]) -> list[str]:
    import phonenumbers

    for region in regions or (None,):
        matches = list(phonenumbers.PhoneNumberMatcher(digits, region))
        if matches:
            return [phonenumbers.format_number(each.number, phonenumbers.PhoneNumberFormat.E164) for each in matches]
    return []
