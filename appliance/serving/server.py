"""The HTTP server process: a socket taken before the model is loaded, and a shutdown that lets answers finish.

SIGTERM or SIGINT starts a drain: the server still answers, refuses new chats with 503 and leaves once the engine is
idle or the grace time is over. A second signal leaves at once.
"""

import ipaddress
import socket
from collections.abc import Callable
from types import FrameType

import uvicorn
from fastapi import FastAPI

from appliance.errors import RecipeError, ServerError
from appliance.serving.engine import Engine

GRACE_SECONDS = 30.0
LAST_BYTES_SECONDS = 5  # for a slow reader, once its answer is complete
BACKLOG = 128


def require_loopback(host: str) -> None:
    """Without keys, only this machine may ask. Raises `RecipeError`."""
    if host == "localhost":
        return
    try:
        is_loopback = ipaddress.ip_address(host).is_loopback
    except ValueError:
        is_loopback = False
    if not is_loopback:
        raise RecipeError(
            f"serve.host: {host!r} can be reached by others, and this version has no API keys yet; use 127.0.0.1, "
            "or --insecure-no-key on a network where everybody may use the model."
        )


def bind(host: str, port: int) -> socket.socket:
    """A bound socket that does not listen yet, so that clients are refused until there is a model to answer them."""
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(
            host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )[0]
        sock = socket.socket(family, kind, protocol)
    except (OSError, UnicodeError) as error:
        raise ServerError(f"serve.host: {host[:80]!r} is no address of this machine ({error}).") from error
    try:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        sock.bind(address)
    except OSError as error:
        sock.close()
        raise _unavailable(host, port, error) from error
    return sock


def run(app: FastAPI, engine: Engine, sock: socket.socket, on_ready: Callable[[str], None]) -> None:
    """Serves until a signal ends it; `on_ready` is told the URL. Raises `ServerError` when the port is taken."""
    host, port = sock.getsockname()[:2]
    try:
        sock.listen(BACKLOG)
    except OSError as error:
        raise _unavailable(host, port, error) from error
    url = f"http://[{host}]:{port}" if sock.family == socket.AF_INET6 else f"http://{host}:{port}"
    config = uvicorn.Config(
        app, lifespan="off", access_log=False, log_level="warning", timeout_graceful_shutdown=LAST_BYTES_SECONDS
    )
    _DrainingServer(config, engine, lambda: on_ready(url)).run(sockets=[sock])


class _DrainingServer(uvicorn.Server):
    """uvicorn's server, which would close its port at the first signal and leave with the signal's own exit code."""

    def __init__(self, config: uvicorn.Config, engine: Engine, on_ready: Callable[[], None]) -> None:
        super().__init__(config)
        self._engine = engine
        self._on_ready = on_ready
        self._signals = 0
        self._is_draining = False

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        self._on_ready()

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:  # noqa: ARG002
        self._signals += 1
        if self._signals > 1:
            self.should_exit = self.force_exit = True

    async def on_tick(self, counter: int) -> bool:
        """Ten times a second."""
        if self._signals and not self._is_draining:
            self._is_draining = True
            self._engine.drain(GRACE_SECONDS)
        load = self._engine.load()
        if self._is_draining and load.running == load.waiting == 0:
            self.should_exit = True
        return await super().on_tick(counter)


def _unavailable(host: str, port: int, error: OSError) -> ServerError:
    return ServerError(
        f"Port {port} of {host} cannot be used ({error.strerror}); end the program that has it, or choose another "
        "with --port (0 takes any free one)."
    )
