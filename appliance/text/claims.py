"""What a text claims that can be right or wrong: times, street addresses, numbers, e-mail and web addresses, names.

By their form alone; nothing here knows what is true. Names are capitalised words inside a sentence, so German, which writes
every noun so, and scripts without capitals have none. Main entry: `find`.
"""

import functools
import re
import unicodedata
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Literal

from appliance.text import facts

Kind = Literal["contact", "address", "time", "name", "number"]
Span = tuple[int, int]

_WEB = re.compile(r"(?:https?://|www\.)[^\s<>\"')]*[\w/]", re.IGNORECASE)
_NUMBER = re.compile(r"\+?\d[\d\s/-]{6,}\d|\d+(?:[.,]\d+)*")  # telephone numbers have spaces inside
_NAME = re.compile(r"(?<=[\w,;:)’'\"] )(?:[^\W\d_a-zß-öø-ÿ][\w’'-]+)(?:\s[^\W\d_a-zß-öø-ÿ][\w’'-]+)*")


@dataclass(frozen=True, slots=True)
class Claim:
    """`value` is the same however the text writes it: folded, without spaces where they mean nothing."""

    kind: Kind
    value: str


def find(text: str, language: str | None) -> frozenset[Claim]:
    """Every claim of the text, each once; `language` (ISO 639-1) says whether capitals mark names."""
    rest = unicodedata.normalize("NFKC", text)
    claims: set[Claim] = set()

    def take(kind: Kind, found: Callable[[str], Iterable[tuple[str, Span]]]) -> None:
        """What one kind has taken is not read as another: the number of a house is no number of its own."""
        nonlocal rest
        for value, (start, end) in list(found(rest)):
            claims.add(Claim(kind, value))
            rest = rest[:start] + " " * (end - start) + rest[end:]

    for pattern in (facts.EMAIL, _WEB):
        take("contact", functools.partial(_matches, pattern, value=_folded))
    take(
        "address", lambda rest: ((f"{each.street} {each.number}", (each.start, each.end)) for each in facts.addresses(rest))
    )
    take("time", lambda rest: ((each.clock, (each.start, each.end)) for each in facts.times(rest)))
    if language != "de":
        take("name", lambda rest: _matches(_NAME, rest, _folded))
    take("number", lambda rest: _matches(_NUMBER, rest, _number))
    return frozenset(claim for claim in claims if claim.value)


def occurs(claim: Claim, text: str, claims: frozenset[Claim]) -> bool:
    """Whether a text says it: among its `claims`, or, for what opens a sentence there, as its plain words.

    A house number inside a range of the same street agrees with it.
    """
    if claim in claims:
        return True
    if claim.kind == "address":
        street, _, number = claim.value.rpartition(" ")
        others = (each.value.rpartition(" ") for each in claims if each.kind == "address")
        return any(name == street and facts.agree(number, other) for name, _, other in others)
    return claim.kind in ("name", "number") and f" {_folded(claim.value)} " in f" {_folded(text)} "


def _matches(pattern: re.Pattern[str], text: str, value: Callable[[str], str]) -> Iterable[tuple[str, Span]]:
    return ((value(match.group()), match.span()) for match in pattern.finditer(text))


def _number(text: str) -> str:
    """1.000 is 1000, 3,5 is 3.5, and a telephone number is its digits."""
    digits = re.sub(r"\D", "", text)
    is_one = len(digits) >= 7 or re.fullmatch(r"\d{1,3}(?:[.,]\d{3})+", text) is not None
    return digits if is_one else text.replace(",", ".")


def _folded(text: str) -> str:
    return " ".join(re.findall(r"\w+", text.casefold()))
