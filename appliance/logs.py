"""The log on stderr: a line of text, or one JSON object, for each event.

Calls write `logger.info("event=NAME key=%s other=%d", ...)`: the text form prints that, the JSON form makes a field of each
key. What clients write is never logged, so that a log may be kept. Other libraries' lines get the event `log`.
"""

import json
import logging
import re
import sys
from datetime import UTC, datetime
from typing import Any, Literal, get_args

Format = Literal["text", "json"]
Level = Literal["debug", "info", "warning", "error"]
FORMATS, LEVELS = get_args(Format), get_args(Level)
_PLACE = re.compile(r"(?:(\w+)=)?(%[#0 +.\d-]*[a-zA-Z])")  # a key and where its value goes
_FIXED = re.compile(r"(\w+)=([^%\s]\S*)")


def configure(form: Format, level: Level) -> None:
    """What is logged from now on goes to stderr in this form."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(JsonFormatter() if form == "json" else logging.Formatter("%(message)s"))
    logging.basicConfig(handlers=[handler], level=level.upper(), force=True)
    logging.getLogger("asyncio").setLevel(logging.WARNING)


class JsonFormatter(logging.Formatter):
    """One line each: `time` (RFC 3339, UTC), `level`, `event`, and what the event has."""

    def format(self, record: logging.LogRecord) -> str:
        moment = datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds")
        line: dict[str, Any] = {"time": moment.replace("+00:00", "Z"), "level": record.levelname.lower()}
        line |= fields(record)
        if record.exc_info:
            line["exception"] = self.formatException(record.exc_info)
        return json.dumps(line, ensure_ascii=False, default=str)


def fields(record: logging.LogRecord) -> dict[str, Any]:
    """`event` and the keys of a record; what has no key is its `detail`."""
    template = str(record.msg)
    if not template.startswith("event="):
        return {"event": "log", "logger": record.name, "message": record.getMessage()}
    found: dict[str, Any] = dict(_FIXED.findall(template))
    values = record.args if isinstance(record.args, tuple) else ()
    for (key, place), value in zip(_PLACE.findall(template), values, strict=True):
        # A number is one, unless the template rounds it; `%r` only guards a line of text.
        rounded = round(value, 6) if isinstance(value, float) else value
        found[key or "detail"] = rounded if place[-1] in "dfr" or isinstance(value, int | float | None) else str(value)
    return found
