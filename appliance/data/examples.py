"""A few out of many: the places that findings name, the parts of a sentence, rows evenly over a file."""

from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, TypeVar

if TYPE_CHECKING:
    from appliance.data.texts import Text

MOST = 10
Each = TypeVar("Each")


def of(rows: "Iterable[Text]") -> list[str]:
    """The first places, each once, in the given order."""
    return first(row.where for row in rows)


def first(places: Iterable[str]) -> list[str]:
    return list(dict.fromkeys(places))[:MOST]


def listed(parts: Sequence[str], most: int = 5) -> str:
    """Parts of a sentence, and how many more there are."""
    return "; ".join(some(parts, most))


def some(parts: Sequence[str], most: int, where: str = "") -> list[str]:
    """The first of them, and how many more there are (`where`)."""
    more = [f"and {len(parts) - most:,} more{where}"] if len(parts) > most else []
    return [*parts[:most], *more]


def spread(rows: Sequence[Each], count: int) -> list[Each]:
    """`count` rows, evenly from the first to the last: the middles of so many equal parts."""
    count = min(count, len(rows))
    return [rows[(2 * part + 1) * len(rows) // (2 * count)] for part in range(count)]


def rows(count: int) -> str:
    return "1 row" if count == 1 else f"{count:,} rows"
