"""A few rows out of many, so that each part of a file has its share of them."""

from collections.abc import Sequence
from typing import TypeVar

T = TypeVar("T")


def evenly(rows: Sequence[T], count: int) -> list[T]:
    """`count` rows, or all where there are fewer: the middles of as many equal parts, in their order."""
    count = min(count, len(rows))
    return [rows[(2 * part + 1) * len(rows) // (2 * count)] for part in range(count)]
