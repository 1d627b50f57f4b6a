"""Comments in a stream of events while there is nothing to tell, so that no proxy takes a long prompt for a dead server.

https://html.spec.whatwg.org/multipage/server-sent-events.html#authoring-notes
"""

import asyncio
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from starlette.types import Message, Send

KEEP_ALIVE = b": keep-alive\n\n"
KEEP_ALIVE_SECONDS = 10.0


@asynccontextmanager
async def filled(send: Send, seconds: float = KEEP_ALIVE_SECONDS) -> AsyncIterator[Send]:
    """An ASGI `send` beside which a comment is sent whenever nothing was for `seconds`, until the answer is whole.

    One task waits beside the whole stream, so that an event costs no more than noting when it was sent.
    """
    turn = asyncio.Lock()
    is_open, said_at = False, time.monotonic()

    async def say(message: Message) -> None:
        nonlocal is_open, said_at
        async with turn:
            is_open = message["type"] == "http.response.start" or bool(message.get("more_body"))
            await send(message)
            said_at = time.monotonic()

    async def fill() -> None:
        nonlocal said_at
        while True:
            await asyncio.sleep(max(0.0, said_at + seconds - time.monotonic()))
            async with turn:
                if is_open and time.monotonic() - said_at >= seconds:
                    await send({"type": "http.response.body", "body": KEEP_ALIVE, "more_body": True})
                    said_at = time.monotonic()
                elif not is_open:
                    said_at = time.monotonic()

    filler = asyncio.create_task(fill())
    try:
        yield say
    finally:
        filler.cancel()
        await asyncio.wait({filler})
        if not filler.cancelled():
            filler.exception()  # the client that it failed to reach is found gone by the next event, too
