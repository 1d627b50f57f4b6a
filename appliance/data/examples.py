"""Where to look: a few places out of many, as findings name them."""

from collections.abc import Iterable, Sequence

from appliance.data.texts import Text

MOST = 10


def of(rows: Iterable[Text]) -> list[str]:
    """The first places, each once, in the given order."""
    return first(row.where for row in rows)


def first(places: Iterable[str]) -> list[str]:
    return list(dict.fromkeys(places))[:MOST]


def listed(parts: Sequence[str], most: int = 5) -> str:
    """Parts of a sentence, and how many more there are."""
    more = len(parts) - most
    return "; ".join(parts[:most]) + (f"; and {more} more" if more > 0 else "")


def rows(count: int) -> str:
    return "1 row" if count == 1 else f"{count:,} rows"
