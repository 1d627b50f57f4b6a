"""What in a text can be right or wrong: times, street addresses, numbers, e-mail and web addresses, names. Entry: `find`.

By their form alone; nothing here knows what is true. Names are capitalised words inside a sentence, so German, which writes
every noun so, and scripts without capitals have none.
"""

import re
import unicodedata
from dataclasses import dataclass
from typing import Literal

Kind = Literal["contact", "time", "address", "number", "name"]

_CONTACT = re.compile(r"[\w.+-]+@[\w-]+\.[\w.-]*\w|(?:https?://|www\.)[^\s<>\"')]*[\w/]", re.IGNORECASE)
_TIME = re.compile(
    r"\b([01]?\d|2[0-4])[:.h]([0-5]\d)(?!\d|[.,]\d)(?:\s?(?:uur|uhr|h\b|a\.?m\b|p\.?m\b))?|"
    r"\b([01]?\d|2[0-4])\s?(?:uur|uhr|h\b|a\.?m\b|p\.?m\b)",
    re.IGNORECASE,
)
# Dutch and German write the kind of street at the end of its name; English and Polish apart, Polish before it.
_SUFFIXES = "straat|weg|laan|plein|kade|singel|gracht|dijk|steeg|hof|pad|straße|strasse|str\\.|gasse|allee|platz|ufer|damm"
_APART = "street|road|avenue|lane|square|drive|boulevard|place|st\\.|rd\\.|ave\\."
_ADDRESS = re.compile(
    rf"\b((?:[^\W\d_][\w'’.-]*\s){{0,2}}?[^\W\d_][\w'’-]*(?:{_SUFFIXES})|(?:ulica|ul\.|aleja|al\.|plac|pl\.)\s[^\W\d_][\w'’-]+)"
    rf"\s(\d+(?:\s?[a-z]\b)?(?:\s?[-–/]\s?\d+)?)"
    rf"|\b(\d+)\s((?:[^\W\d_][\w'’-]*\s){{1,3}}?(?:{_APART}))(?!\w)",
    re.IGNORECASE,
)
_NUMBER = re.compile(r"\+?\d[\d\s/-]{6,}\d|\d+(?:[.,]\d+)*")  # telephone numbers have spaces inside
_NAME = re.compile(r"(?<=[\w,;:)’'\"] )(?:[^\W\d_a-zß-öø-ÿ][\w'’-]+)(?:\s[^\W\d_a-zß-öø-ÿ][\w'’-]+)*")


@dataclass(frozen=True, slots=True)
class Fact:
    """`value` is the same however the text writes it: folded, without spaces where they mean nothing."""

    kind: Kind
    value: str


def find(text: str, language: str | None) -> frozenset[Fact]:
    """Every fact of the text, each once; `language` (ISO 639-1) says whether capitals mark names."""
    rest = unicodedata.normalize("NFKC", text)
    facts: set[Fact] = set()

    def take(pattern: re.Pattern[str], kind: Kind) -> None:
        """What one kind has taken is not read as another: the number of a house is no number of its own."""
        nonlocal rest
        facts.update(Fact(kind, _value(kind, match)) for match in pattern.finditer(rest))
        rest = pattern.sub(lambda match: " " * len(match.group()), rest)

    take(_CONTACT, "contact")
    take(_ADDRESS, "address")
    take(_TIME, "time")
    if language != "de":
        take(_NAME, "name")
    take(_NUMBER, "number")
    return frozenset(fact for fact in facts if fact.value)


def occurs(fact: Fact, text: str, facts: frozenset[Fact]) -> bool:
    """Whether a text says it: among its `facts`, or, for what opens a sentence there, as its plain words."""
    if fact in facts:
        return True
    folded = f" {_folded(text)} "
    return fact.kind in ("name", "number") and f" {_folded(fact.value)} " in folded


def _value(kind: Kind, match: re.Match[str]) -> str:
    if kind == "time":
        hour, minute, whole = match.group(1), match.group(2), match.group(3)
        late = re.search(r"p\.?m", match.group(), re.IGNORECASE) is not None and int(hour or whole) < 12
        return f"{int(hour or whole) + 12 * late}:{minute or '00'}"
    if kind == "address":
        street, number = (match.group(1), match.group(2)) if match.group(1) else (match.group(4), match.group(3))
        # Of "the office at Long Road 5" the last word is the street's name for certain; what is before it may be a sentence.
        last = _folded(street).split()[-2:] if match.group(4) or "." in street else _folded(street).split()[-1:]
        return f"{' '.join(last)} {re.sub(r'[^0-9a-z]', '', number.lower().replace('–', '-').replace('-', 'x'))}"
    if kind == "number":
        return _number(match.group())
    return _folded(match.group())


def _number(text: str) -> str:
    """1.000 is 1000, 3,5 is 3.5, and a telephone number is its digits."""
    digits = re.sub(r"\D", "", text)
    is_one = len(digits) >= 7 or re.fullmatch(r"\d{1,3}(?:[.,]\d{3})+", text) is not None
    return digits if is_one else text.replace(",", ".")


def _folded(text: str) -> str:
    return " ".join(re.findall(r"\w+", text.casefold()))
