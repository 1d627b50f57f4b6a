"""An answer as JSON that may be large: encoded in pieces, between which the event loop goes on with other answers.

An iterator in a body is a list that is made while it is encoded, one item at a time, so that a list of a million objects
never exists. Knows nothing of what is answered.
"""

import asyncio
import json
import time
from collections.abc import Iterator, Mapping
from typing import Any

from fastapi.responses import Response

TURN_SECONDS = 0.01  # of encoding, until others have their turn


async def json_answer(body: Mapping[str, Any]) -> Response:
    parts: list[bytes] = []
    began_at = time.monotonic()
    for piece in _pieces(body):
        parts.append(piece.encode())
        if time.monotonic() - began_at > TURN_SECONDS:
            await asyncio.sleep(0)
            began_at = time.monotonic()
    return Response(b"".join(parts), media_type="application/json")


def _pieces(value: Any) -> Iterator[str]:
    match value:
        case Mapping():
            start = "{"
            for key, member in value.items():
                yield f"{start}{_text(key)}:"
                yield from _pieces(member)
                start = ","
            yield "}" if value else "{}"
        case Iterator():
            start = "["
            for item in value:
                yield start + _text(item)
                start = ","
            yield "]" if start == "," else "[]"
        case [Mapping(), *_]:
            start = "["
            for item in value:
                yield start
                yield from _pieces(item)
                start = ","
            yield "]"
        case _:
            yield _text(value)


def _text(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False, allow_nan=False, separators=(",", ":"))
