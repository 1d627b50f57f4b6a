"""Rows as they stand in a user's file, to be written again with nothing lost: stray keys, spaces and all."""

import json
from collections.abc import Sequence
from pathlib import Path

from appliance.data.formats import Row

LINES = (".jsonl", ".ndjson")


def read(path: Path, rows: Sequence[Row]) -> list[str]:
    """For each normalized row one line of JSON: the file's own line, else (the file is no JSON lines) the normal form."""
    if path.suffix in LINES:
        lines = path.read_bytes().split(b"\n")
        own = [lines[row["line"] - 1].decode("utf-8-sig").strip() for row in rows]
        if all(line.startswith("{") and line.endswith("}") for line in own):
            return own
    plain = ({key: value for key, value in row.items() if key != "line"} for row in rows)
    return [json.dumps(row, ensure_ascii=False) for row in plain]
