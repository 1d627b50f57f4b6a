"""What can be wrong with a row, and how it is said: file, line, what, and what was done about it.

A row is either repaired (`fixed`) or left out (`set aside`); nothing is dropped in silence. Rows may hold personal data, so
that no message shows a whole one.
"""

import json
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

Row = dict[str, Any]
Action = Literal["fixed", "set aside"]
Report = Callable[[str, Action], None]

SHOWN_CHARACTERS = 40
SHOWN_KEYS = 20


@dataclass(frozen=True, slots=True)
class Defect:
    """One thing wrong in one row. `line` is 1-based."""

    file: str
    line: int
    what: str
    action: Action

    def __str__(self) -> str:
        return f"{self.file}:{self.line}: {self.what}; {self.action}."


class SetAside(Exception):
    """This row cannot be used; the text says why."""


def shown(value: Any) -> str:
    """A value for an error message; long ones are cut."""
    return _cut("nothing" if value is None else json.dumps(value, ensure_ascii=False))


def shown_keys(keys: list[str]) -> str:
    """The keys of a row or the columns of a file, for an error message."""
    names = [_cut(key) for key in keys[:SHOWN_KEYS]]
    more = [f"and {len(keys) - SHOWN_KEYS} more"] if len(keys) > SHOWN_KEYS else []
    return ", ".join([*names, *more]) or "none"


def require_whole_characters(value: Row) -> None:
    try:
        json.dumps(value, ensure_ascii=False).encode()
    except UnicodeEncodeError as error:
        half = str(error.object)[error.start]
        raise SetAside(f"holds {half!a}, half of a character: a text was cut inside an emoji") from None


def _cut(text: str) -> str:
    return text if len(text) <= SHOWN_CHARACTERS else f"{text[:SHOWN_CHARACTERS]}…"
