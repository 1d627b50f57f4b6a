"""ASGI middleware: when the client goes away before it was answered, the work for it is cancelled wherever it stands.

The route's task is cancelled, so that what it holds (a place in the queue, a model's lease) is given back in its `finally`.
"""

import asyncio

from starlette.types import ASGIApp, Message, Receive, Scope, Send


class CancelWhenGone:
    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        is_answered = False
        gone = asyncio.Event()
        watcher: asyncio.Task[None] | None = None

        async def watched() -> Message:
            """After the body only the departure can come, and more than one reader may wait for it."""
            nonlocal watcher
            if watcher is None:
                message = await receive()
                if message["type"] == "http.request" and not message.get("more_body", False):
                    watcher = asyncio.create_task(watch())
                return message
            await gone.wait()
            return {"type": "http.disconnect"}

        async def watch() -> None:
            while (await receive())["type"] != "http.disconnect":
                pass
            gone.set()
            if not is_answered:  # servers also report a departure after the last byte: leave the clean-up alone
                work.cancel()

        async def noticed(message: Message) -> None:
            nonlocal is_answered
            is_answered = message["type"] == "http.response.body" and not message.get("more_body", False)
            await send(message)

        work = asyncio.ensure_future(self._app(scope, watched, noticed))
        try:
            await work
        except asyncio.CancelledError:
            if not gone.is_set():
                raise
        finally:
            if watcher is not None:
                watcher.cancel()
