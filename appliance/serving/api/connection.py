"""uvicorn's protocol for a connection, and what it lacks: a limit on how long a request's head may take to arrive.

Without it, clients that connect and say nothing, or one letter a minute, take every file descriptor the process has. Bodies
have a limit of their own (`json_body.py`).
"""

import asyncio
from typing import Any

import h11
from uvicorn.protocols.http.h11_impl import H11Protocol

HEAD_SECONDS = 30.0
READ_BYTES = 1 << 14  # at a time: h11 takes a second for 256 KiB that come as chunks of one byte


class Connection(H11Protocol):
    def __init__(self, *arguments: Any, **options: Any) -> None:
        super().__init__(*arguments, **options)
        self._head_deadline: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        transport.max_size = READ_BYTES  # type: ignore[attr-defined]
        super().connection_made(transport)
        self._watch_head()

    def data_received(self, data: bytes) -> None:
        super().data_received(data)
        self._watch_head()

    def connection_lost(self, exc: Exception | None) -> None:
        self._forget_deadline()
        super().connection_lost(exc)

    def _watch_head(self) -> None:
        """Time runs from the connection, or from the first byte that follows an answer, until a head is complete."""
        if self.conn.their_state is not h11.IDLE:
            self._forget_deadline()
        elif self._head_deadline is None:
            self._head_deadline = self.loop.call_later(HEAD_SECONDS, self._end_late_head)

    def _forget_deadline(self) -> None:
        if self._head_deadline is not None:
            self._head_deadline.cancel()
            self._head_deadline = None

    def _end_late_head(self) -> None:
        self._head_deadline = None
        if self.conn.their_state is h11.IDLE:
            self.transport.close()
