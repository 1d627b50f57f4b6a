"""ASGI middleware: an error that nothing has foreseen is answered 500 and logged by its type and place.

Not by its words, which uvicorn would log: they may be a client's. It has to be outside of everything that may fail.
"""

import logging
import traceback

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from appliance.serving.api.errors import unexpected_error_response

_log = logging.getLogger("appliance.serving")


class AnswerUnexpected:
    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        is_begun = False

        async def noticed(message: Message) -> None:
            nonlocal is_begun
            is_begun = True
            await send(message)

        try:
            await self._app(scope, receive, noticed)
        except Exception as error:
            if scope["type"] != "http":
                raise
            request_id = scope["state"]["request_id"]
            _log.error("event=request_failed request=%s type=%s\n%s", request_id, type(error).__name__, _places(error))
            if not is_begun:  # otherwise the server ends the connection, which tells the client
                await unexpected_error_response(scope["path"])(scope, receive, send)


def _places(error: BaseException) -> str:
    """Where it happened, and what it came from."""
    inner = error.__cause__ or error.__context__
    before = "" if inner is None else f"{_places(inner)}which led to {type(error).__name__}\n"
    return before + "".join(traceback.format_tb(error.__traceback__))
