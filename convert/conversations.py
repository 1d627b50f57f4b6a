"""Conversations of a dataset, as conversion reads them: calibration, verification and measurement by language."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path

from appliance.errors import DataError
from appliance.text import languages

Messages = Sequence[Mapping[str, str]]
UNTOLD = "untold"  # too short to tell its language


def read(path: Path) -> list[Messages]:
    """The conversations of a dataset's file, JSON lines with messages; raises `DataError`."""
    try:
        rows = [json.loads(line)["messages"] for line in path.read_text(encoding="utf-8").split("\n") if line.strip()]
        lacking = [number for number, messages in enumerate(rows, 1) if "user" not in {each["role"] for each in messages}]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise DataError(f"{path} is no file of conversations ({error}); `appliance data check` makes one.") from error
    if not rows:
        raise DataError(f"{path} holds no conversation, so nothing can be verified.")
    if lacking:
        raise DataError(
            f"{path}: row {lacking[0]} has no user turn; `appliance data check` makes a file that can be verified."
        )
    return rows


def by_language(rows: Sequence[Messages], codes: Sequence[str]) -> dict[str, list[Messages]]:
    """Rows under the language of their assistant's turns, or of all turns where there is none; in the order of `codes`."""
    groups: dict[str, list[Messages]] = {code: [] for code in [*codes, UNTOLD]}
    for messages in rows:
        answers = [each["content"] for each in messages if each["role"] == "assistant"]
        text = "\n".join(answers or [each["content"] for each in messages])
        code = codes[0] if len(codes) == 1 else languages.detect(text, codes)
        groups[code or UNTOLD].append(messages)
    return {code: group for code, group in groups.items() if group}
