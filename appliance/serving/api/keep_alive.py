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
    stream = _Stream(send, unread_seconds, comment, seconds)

    def end_unread(task: "asyncio.Task[None]") -> None:
        if not task.cancelled() and task.exception() is None:
            limit.reschedule(asyncio.get_running_loop().time())

    try:
        async with asyncio.timeout(None) as limit:
            attending = asyncio.create_task(stream.attend())
            attending.add_done_callback(end_unread)
            try:
                yield stream.say
            finally:
                attending.cancel()
                await asyncio.wait({attending})
    except TimeoutError:
        if not limit.expired():
            raise
        raise NotRead from None


class _Stream:
    """What was sent when. Events and comments take turns: none is sent while another waits for the client."""

    def __init__(self, send: Send, unread_seconds: float, comment: bytes, seconds: float) -> None:
        self._send, self._comment = send, comment
        self._unread_seconds, self._seconds = unread_seconds, seconds
        self._clock = asyncio.get_running_loop().time
        self._turn = asyncio.Lock()
        self._is_open, self._said_at = False, self._clock()
        self._sending_since: float | None = None

    async def say(self, message: Message) -> None:
        async with self._turn:
            self._is_open = message["type"] == "http.response.start" or bool(message.get("more_body"))
            self._sending_since = self._clock()
            await self._send(message)
            self._sending_since, self._said_at = None, self._clock()

    async def attend(self) -> None:
        """Returns when the client reads no more."""
        while True:
            await asyncio.sleep(self._due_in())
            if self._sending_since is not None:
                if self._clock() >= self._sending_since + self._unread_seconds:
                    return
            elif self._is_silent and self._clock() >= self._said_at + self._seconds:
                try:
                    async with asyncio.timeout(self._unread_seconds):
                        await self.say({"type": "http.response.body", "body": self._comment, "more_body": True})
                except TimeoutError:
                    return

    @property
    def _is_silent(self) -> bool:
        """Whether a comment may be needed: there is one, the status was sent, and the end was not."""
        return bool(self._comment) and self._is_open

    def _due_in(self) -> float:
        """Seconds until something may have to be done; what happens meanwhile may change that."""
        soon = min(self._seconds, self._unread_seconds)
        if self._sending_since is not None:
            soon = min(soon, self._sending_since + self._unread_seconds - self._clock())
        elif self._is_silent:
            soon = min(soon, self._said_at + self._seconds - self._clock())
        return max(0.0, soon)
