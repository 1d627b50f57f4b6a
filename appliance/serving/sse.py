"""Server-sent events as OpenAI's API uses them: `data: {json}` lines, ended by `data: [DONE]`.

Format: https://html.spec.whatwg.org/multipage/server-sent-events.html
"""

import json
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import msgspec

DONE = b"data: [DONE]\n\n"


def encode(body: Mapping[str, Any]) -> bytes:
    return b"data: " + msgspec.json.encode(body) + b"\n\n"


def decode(lines: Iterable[str]) -> Iterator[dict[str, Any]]:
    """The JSON bodies of a stream's lines, up to `[DONE]` or the end."""
    for line in lines:
        field, _, value = line.partition(":")
        if field != "data":
            continue
        if value.strip() == "[DONE]":
            return
        yield json.loads(value)
