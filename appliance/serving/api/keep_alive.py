"""Comments in a stream of events while there is nothing to tell, so that no proxy takes a long prompt for a dead server.

https://html.spec.whatwg.org/multipage/server-sent-events.html#authoring-notes
"""

import asyncio
from collections.abc import AsyncIterator

KEEP_ALIVE = b": keep-alive\n\n"
KEEP_ALIVE_SECONDS = 10.0


async def with_keep_alive(events: AsyncIterator[bytes], seconds: float = KEEP_ALIVE_SECONDS) -> AsyncIterator[bytes]:
    """The same events, and a comment whenever none has come for `seconds`."""
    following: asyncio.Task[bytes | None] | None = None
    try:
        while True:
            following = asyncio.create_task(_following(events))
            while not (await asyncio.wait({following}, timeout=seconds))[0]:
                yield KEEP_ALIVE
            event = following.result()
            if event is None:
                return
            yield event
    finally:
        if following is not None:
            following.cancel()


async def _following(events: AsyncIterator[bytes]) -> bytes | None:
    return await anext(events, None)
