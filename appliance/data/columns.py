"""A map of columns: which columns of a file are the prompt and the answers, and how several make one text.

`"query"` names a column; `"{query}. {keyphrase}"` is a text with columns in braces (`{{` and `}}` are braces themselves).
"""

import difflib
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from appliance.data.defects import Report, Row, SetAside, kind_of, shown_keys
from appliance.data.messages import read_text
from appliance.errors import DataError, several

Map = Mapping[str, str]  # of the keys of a shape (prompt, completion, …) to a column's name or a text with columns

PLACE = re.compile(r"\{\{|\}\}|\{([^{}]+)\}")


def named(text: str) -> list[str]:
    """The columns that one entry of a map names, in order."""
    found = [match[1] for match in PLACE.finditer(text) if match[1]]
    return found or [text]


def require_columns(columns: Map, known: Sequence[str], path: Path, where: str) -> None:
    """Raises `DataError` with every column that the file does not have, and those that it has."""
    problems = []
    spelled = {each.casefold(): each for each in known}
    for key, text in columns.items():
        for name in named(text):
            if name not in known:
                close = difflib.get_close_matches(name.casefold(), spelled, n=1, cutoff=0.5)
                hint = f"did you mean {spelled[close[0]]!r}? " if close else ""
                problems.append(f"{where}.{key}: no column {name!r}; {hint}columns: {shown_keys(list(known))}")
    if problems:
        raise DataError(several(problems, f"{path} does not have the columns that the recipe names"))


def apply(columns: Map, row: Row, report: Report, *, keeps_others: bool) -> Row:
    """The row with the keys of the map; with the others too where they are kept, but for those taken over as they are."""
    mapped: Row = {key: _fill(text, row, report) for key, text in columns.items()}
    if keeps_others:
        mapped |= {name: value for name, value in row.items() if name not in {*columns, *columns.values()}}
    return mapped


def _fill(text: str, row: Row, report: Report) -> Any:
    """A column as it stands; a text with its columns in their places."""
    if not any(match[1] for match in PLACE.finditer(text)):
        return _value(text, row)

    def fill(match: re.Match[str]) -> str:
        return read_text(_value(match[1], row), match[1], report) if match[1] else match[0][0]

    return PLACE.sub(fill, text)


def _value(name: str, row: Row) -> Any:
    """A number becomes text: which of both a column holds is a matter of the file's format."""
    if name not in row:
        raise SetAside(f"no column {name!r}; found {shown_keys(list(row))}")
    value = row[name]
    if value in (None, ""):
        raise SetAside(f"column {name!r} is empty")
    if isinstance(value, bool | dict):
        raise SetAside(f"column {name!r}: expected text, found {kind_of(value)}")
    return str(value) if isinstance(value, int | float) else value
