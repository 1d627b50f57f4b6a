"""ASGI middleware: a request body larger than the limit is answered 413 before it is held in memory.

FastAPI's own `max_body_size` does the same but answers in plain text, which OpenAI clients cannot read.
"""

from starlette.exceptions import HTTPException
from starlette.types import ASGIApp, Message, Receive, Scope, Send


class BodyLimit:
    """Counts what arrives; the declared length may be missing or untrue."""

    def __init__(self, app: ASGIApp, max_bytes: int) -> None:
        self._app = app
        self._max_bytes = max_bytes

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        seen_bytes = 0

        async def limited() -> Message:
            nonlocal seen_bytes
            message = await receive()
            seen_bytes += len(message.get("body", b""))
            if seen_bytes > self._max_bytes:
                raise HTTPException(413)  # the app's error handler words it
            return message

        await self._app(scope, limited if scope["type"] == "http" else receive, send)
