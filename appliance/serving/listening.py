"""The server's socket: taken before the model is loaded, so that a port in use is found out at once, and opened after it.

Imports nothing of HTTP: it is needed while the libraries for that are still being loaded.
"""

import socket

from appliance.errors import ServerError

BACKLOG = 128


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


def begin(sock: socket.socket) -> tuple[str, int]:
    """Lets clients connect; returns host and port. Raises `ServerError`."""
    host, port = sock.getsockname()[:2]
    try:
        sock.listen(BACKLOG)
    except OSError as error:
        raise _unavailable(host, port, error) from error
    return host, port


def _unavailable(host: str, port: int, error: OSError) -> ServerError:
    return ServerError(
        f"Port {port} of {host} cannot be used ({error.strerror}); end the program that has it, or choose another "
        "with --port (0 takes any free one)."
    )
