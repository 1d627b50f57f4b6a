"""ASGI middleware: every response says a new id, under which the log has the request and what became of its answer.

The log names the route and nothing that a client wrote.
"""

import logging
import secrets
import time
from contextvars import ContextVar

from starlette.types import ASGIApp, Message, Receive, Scope, Send

HEADER = "x-request-id"
METHODS = frozenset({"GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "OPTIONS"})  # any other is a client's own word
UNWATCHED = ("/healthz", "/readyz", "/metrics")  # asked every few seconds, and of no interest unless somebody debugs them

_log = logging.getLogger("appliance.serving")
_current: ContextVar[str | None] = ContextVar("request", default=None)


def engine_id(prefix: str) -> str:
    """An id for the engine, which ends as that of the response does."""
    return f"{prefix}{_current.get() or secrets.token_hex(12)}"


class RequestId:
    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        token = secrets.token_hex(12)
        _current.set(token)
        request_id = f"req-{token}"
        scope.setdefault("state", {})["request_id"] = request_id
        arrived_at, status = time.monotonic(), 0

        async def named(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                message = {**message, "headers": [*message.get("headers", ()), (HEADER.encode(), request_id.encode())]}
            await send(message)

        try:
            await self._app(scope, receive, named)
        finally:
            route = getattr(scope.get("route"), "path", "unknown")
            level = logging.DEBUG if route in UNWATCHED else logging.INFO
            seconds = time.monotonic() - arrived_at
            said = "event=request request=%s method=%s route=%s status=%d seconds=%.3f"
            method = scope["method"] if scope["method"] in METHODS else "other"
            _log.log(level, said, request_id, method, route, status, seconds)
