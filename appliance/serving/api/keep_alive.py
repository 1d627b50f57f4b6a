"""What looks after a stream while it is sent: fills its silence, and ends it when nobody reads.

Comments keep proxies from taking a long prompt for a dead server:
https://html.spec.whatwg.org/multipage/server-sent-events.html#authoring-notes
"""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from starlette.types import Message, Send

KEEP_ALIVE = b": keep-alive\n\n"
KEEP_ALIVE_SECONDS = 10.0


class NotRead(Exception):
    """The client takes nothing any more."""


@asynccontextmanager
async def attended(
    send: Send, *, unread_seconds: float, comment: bytes = KEEP_ALIVE, seconds: float = KEEP_ALIVE_SECONDS
) -> AsyncIterator[Send]:
    """An ASGI `send` for a whole stream.

    `comment`, if any, is sent whenever nothing was for `seconds`, until the answer is whole. Raises `NotRead` in the block
    when the client takes nothing for `unread_seconds`. One task waits beside the stream, so that an event costs no more
    than noting when it was sent. A client that cannot be reached with a comment is found gone by the next event, too.
    """
    clock = asyncio.get_running_loop().time
    turn = asyncio.Lock()
    is_open, said_at = False, clock()
    sending_since: float | None = None

    async def say(message: Message) -> None:
        nonlocal is_open, said_at, sending_since
        async with turn:
            is_open = message["type"] == "http.response.start" or bool(message.get("more_body"))
            sending_since = clock()
            await send(message)
            sending_since, said_at = None, clock()

    def due_in() -> float:
        """Seconds until something may have to be done; what happens meanwhile may change that."""
        soon = min(seconds, unread_seconds)
        if sending_since is not None:
            soon = min(soon, sending_since + unread_seconds - clock())
        elif comment and is_open:
            soon = min(soon, said_at + seconds - clock())
        return max(0.0, soon)

    async def attend() -> None:
        """Returns when the client reads no more."""
        nonlocal said_at
        while True:
            await asyncio.sleep(due_in())
            if sending_since is not None:
                if clock() >= sending_since + unread_seconds:
                    return
            elif comment and is_open and clock() >= said_at + seconds:
                async with turn:
                    try:
                        async with asyncio.timeout(unread_seconds):
                            await send({"type": "http.response.body", "body": comment, "more_body": True})
                    except TimeoutError:
                        return
                    said_at = clock()

    def end_unread(task: "asyncio.Task[None]") -> None:
        if not task.cancelled() and task.exception() is None:
            limit.reschedule(clock())

    try:
        async with asyncio.timeout(None) as limit:
            attending = asyncio.create_task(attend())
            attending.add_done_callback(end_unread)
            try:
                yield say
            finally:
                attending.cancel()
                await asyncio.wait({attending})
    except TimeoutError:
        if not limit.expired():
            raise
        raise NotRead from None
