"""The HTTP server process, with a shutdown that lets answers finish.

SIGTERM or SIGINT starts a drain: the server still answers, refuses new requests with 503 and leaves once its engines are
idle or the grace time is over. A second signal leaves at once.
"""

import gc
import resource
import socket
import time
from collections.abc import Callable
from types import FrameType

import uvicorn
from fastapi import FastAPI

from appliance.serving import listening
from appliance.serving.api.connection import Connection
from appliance.serving.engine import Models
from appliance.serving.heap import Heap

OVERTIME_SECONDS = 2.0
LAST_BYTES_SECONDS = 5  # for a slow reader, once its answer is complete


async def run(
    app: FastAPI, models: Models, sock: socket.socket, on_ready: Callable[[str], None], *, grace_seconds: float
) -> None:
    """Serves until a signal ends it; `on_ready` is told the URL. Raises `ServerError` when the port is taken."""
    host, port = listening.begin(sock)
    url = f"http://[{host}]:{port}" if sock.family == socket.AF_INET6 else f"http://{host}:{port}"
    _allow_connections()
    config = uvicorn.Config(
        app,
        http=Connection,
        lifespan="off",
        access_log=False,
        log_config=None,  # as everything else (logs.py)
        log_level="warning",
        proxy_headers=False,  # anybody on this machine could claim any address, and dodge the limits per address
        timeout_graceful_shutdown=LAST_BYTES_SECONDS,
    )
    server = _DrainingServer(config, models, lambda: on_ready(url), grace_seconds)
    await server.serve(sockets=[sock])


class _DrainingServer(uvicorn.Server):
    """uvicorn's server, which would close its port at the first signal and leave with the signal's own exit code."""

    def __init__(self, config: uvicorn.Config, models: Models, on_ready: Callable[[], None], grace_seconds: float) -> None:
        super().__init__(config)
        self._models = models
        self._on_ready = on_ready
        self._grace_seconds = grace_seconds
        self._signals = 0
        self._leave_at: float | None = None
        self._heap = Heap()
        self._requests_seen = 0

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        gc.freeze()  # tens of thousands of objects that stay: looking through them again and again holds up the streams
        self._on_ready()

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:  # noqa: ARG002
        self._signals += 1
        if self._signals > 1:
            self.should_exit = self.force_exit = True

    async def on_tick(self, counter: int) -> bool:
        """Ten times a second."""
        if self.server_state.total_requests > self._requests_seen:
            self._requests_seen = self.server_state.total_requests
            self._heap.use()
        self._heap.trim_in_time()
        if self._signals and self._leave_at is None:
            # The engines end what is late by themselves; one that hangs is not waited for.
            self._leave_at = time.monotonic() + self._grace_seconds + OVERTIME_SECONDS
            self._models.drain(self._grace_seconds)
        if self._leave_at is not None:
            load = self._models.load()
            if load.running == load.waiting == 0 or time.monotonic() > self._leave_at:
                self.should_exit = True
        return await super().on_tick(counter)


def _allow_connections() -> None:
    """As many files as the machine lets this process open: 1,024 connections are easily held by one person."""
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
