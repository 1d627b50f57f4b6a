"""Rows as they stand in a user's file, to be written again with nothing lost: stray keys, spaces and all."""

import json
from pathlib import Path

from appliance.data import check, formats
from appliance.data.formats import Row
from appliance.recipe import Recipe


def read(recipe: Recipe, name: str, path: Path) -> list[str]:
    """One line of JSON for each usable row of a file, whatever kind of file it is; `name` is its key in `[data]`.

    Lines with labels become rows in the normal form, since only in a file of such lines they need no map of columns.
    """
    columns = check.columns(recipe, name)
    reading = formats.examine(path, name, columns)
    is_normal = reading.source.kind == "fastText labels" and columns is None
    return [json.dumps(_flat(row) if is_normal else record.value, ensure_ascii=False) for record, row in reading.usable([])]


def _flat(row: Row) -> Row:
    """A row in normal form with its further columns beside its own keys, as it would be read again."""
    return {**row.get("columns", {}), **{key: value for key, value in row.items() if key != "columns"}}
