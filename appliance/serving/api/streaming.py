"""A streamed response that gives back what it holds, however it ends, and bodies whose failure is a body too."""

import contextlib
import json
from collections.abc import AsyncIterator, Mapping
from typing import Any

from fastapi.responses import StreamingResponse
from starlette.types import Receive, Scope, Send

from appliance.errors import ApplianceError
from appliance.serving import sse
from appliance.serving.api.errors import appliance_error_body

HEADERS = {"Cache-Control": "no-store", "X-Accel-Buffering": "no"}  # the second keeps nginx from collecting
EVENTS = "text/event-stream"
LINES = "application/x-ndjson"

# What the OpenAPI document says about an answer that may be streamed.
MAY_BE_EVENTS: dict[int | str, dict[str, Any]] = {200: {"content": {EVENTS: {}}}}
MAY_BE_LINES: dict[int | str, dict[str, Any]] = {200: {"content": {LINES: {}}}}

Bodies = AsyncIterator[Mapping[str, Any]]


class HoldingStream(StreamingResponse):
    """Closes `held` at the end. A generator's own `finally` does not run when the client left before its first step."""

    def __init__(self, content: AsyncIterator[bytes], held: contextlib.AsyncExitStack, media_type: str) -> None:
        super().__init__(content, media_type=media_type, headers=HEADERS)
        self._held = held

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        async with self._held:
            await super().__call__(scope, receive, send)


async def events(bodies: Bodies) -> AsyncIterator[bytes]:
    """As OpenAI streams. Once the status is sent, an error can only be an event of its own; no [DONE] follows it."""
    try:
        async for body in bodies:
            yield sse.encode(body)
        yield sse.DONE
    except ApplianceError as error:
        yield sse.encode(appliance_error_body(error))


async def lines(bodies: Bodies) -> AsyncIterator[bytes]:
    """As Ollama streams: one JSON object a line."""
    try:
        async for body in bodies:
            yield _line(body)
    except ApplianceError as error:
        yield _line({"error": str(error)})


def _line(body: Mapping[str, Any]) -> bytes:
    return json.dumps(body, ensure_ascii=False, separators=(",", ":")).encode() + b"\n"
