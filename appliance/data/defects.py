"""What can be wrong with a row, and how it is said: file, line, what, and what was done about it.

A row is either repaired (`fixed`) or left out (`set aside`); nothing is dropped in silence. Rows may hold personal data, so
that no message shows a value: of what was found it says the type and the size.
"""

import json
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

from appliance.data import examples

Row = dict[str, Any]
Action = Literal["fixed", "set aside"]
Report = Callable[[str, Action], None]

SHOWN_CHARACTERS = 40
SHOWN_KEYS = 20


@dataclass(frozen=True, slots=True)
class Defect:
    """One thing wrong in one row. `line` is 1-based, and `item` too: the row's number on a line that has several, else 0."""

    file: str
    line: int
    what: str
    action: Action
    item: int = 0

    @property
    def where(self) -> str:
        return f"{self.file}:{place(self.line, self.item)}"

    def __str__(self) -> str:
        return f"{self.where}: {self.what}; {self.action}."


class SetAside(Exception):
    """This row cannot be used; the text says why."""


def place(line: int, item: int) -> str:
    """A row's place in its file: `12`, or `1[40]` for the 40th on a line that has several, as a list on one line has."""
    return f"{line}[{item}]" if item else str(line)


def shown(value: Any) -> str:
    """A value for who reads his own data at the terminal; long ones are cut. Nothing that a report shows has it."""
    return cut(kind_of(value) if value is None else json.dumps(value, ensure_ascii=False))


def kind_of(value: Any) -> str:
    """A value for a defect: its type and size, since it may be somebody's."""
    if value is None or isinstance(value, bool):
        return {None: "nothing", True: "true", False: "false"}[value]
    if isinstance(value, str):
        return f"text of {len(value):,} characters" if value else "empty text"
    if isinstance(value, list | dict):
        return f"{'a list of' if isinstance(value, list) else 'an object of'} {len(value):,}"
    return "a number"


def shown_keys(keys: list[str]) -> str:
    """The keys of a row or the columns of a file, for an error message."""
    return ", ".join(examples.some([cut(key) for key in keys], SHOWN_KEYS)) or "none"


def require_whole_characters(value: Row) -> None:
    try:
        json.dumps(value, ensure_ascii=False).encode()
    except UnicodeEncodeError as error:
        half = str(error.object)[error.start]
        raise SetAside(f"holds {half!a}, half of a character: a text was cut inside an emoji") from None


def cut(text: str) -> str:
    """A key or a column for an error message."""
    return text if len(text) <= SHOWN_CHARACTERS else f"{text[:SHOWN_CHARACTERS]}…"
