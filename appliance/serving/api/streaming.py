"""A streamed response that gives back what it holds, however it ends, and bodies whose failure is a body too."""

import contextlib
from collections.abc import AsyncIterator, Mapping
from typing import Any

import msgspec
from fastapi.responses import StreamingResponse
from starlette.types import Receive, Scope, Send

from appliance.errors import ApplianceError
from appliance.serving import sse
from appliance.serving.api.errors import appliance_error_body
from appliance.serving.api.keep_alive import KEEP_ALIVE, NotRead, attended

HEADERS = {"Cache-Control": "no-store", "X-Accel-Buffering": "no"}  # the second keeps nginx from collecting
EVENTS = "text/event-stream"
LINES = "application/x-ndjson"
UNREAD_SECONDS = 60.0  # a client that takes nothing for so long is gone: what it holds may keep a model from being replaced

# What the OpenAPI document says about an answer that may be streamed.
MAY_BE_EVENTS: dict[int | str, dict[str, Any]] = {200: {"content": {EVENTS: {}}}}
MAY_BE_LINES: dict[int | str, dict[str, Any]] = {200: {"content": {LINES: {}}}}

Bodies = AsyncIterator[Mapping[str, Any]]


class HoldingStream(StreamingResponse):
    """Closes `held` at the end. A generator's own `finally` does not run when the client left before its first step."""

    def __init__(
        self,
        content: AsyncIterator[bytes],
        held: contextlib.AsyncExitStack,
        media_type: str,
        unread_seconds: float = UNREAD_SECONDS,
    ) -> None:
        super().__init__(content, media_type=media_type, headers=HEADERS)
        self._held = held
        self._unread_seconds = unread_seconds

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        comment = KEEP_ALIVE if self.media_type == EVENTS else b""
        async with self._held:
            with contextlib.suppress(NotRead):
                async with attended(send, unread_seconds=self._unread_seconds, comment=comment) as sent:
                    await super().__call__(scope, receive, sent)


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
    return msgspec.json.encode(body) + b"\n"
