"""Who may ask what: every HTTP request passes the gate before anything else looks at it.

`gate_for` makes it for a server. The gate refuses names that are not this server's (DNS rebinding), web pages of other
sites, missing and wrong keys, keys without the right scope, and too many requests. Every path needs a scope unless it is
listed as open. Knows nothing of routes beyond their first word, and never logs a key or anything that a client wrote.
"""

import ipaddress
import logging
import re
import socket
from collections.abc import Awaitable, Callable, MutableMapping
from typing import Any

from appliance import config
from appliance.errors import (
    ApplianceError,
    NotAllowed,
    NotAuthenticated,
    RateLimited,
    RecipeError,
    ServerError,
)
from appliance.keys import Key, KeyBook, Scope
from appliance.recipe import Serve
from appliance.serving.limits import RateLimit

ASGIScope = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[MutableMapping[str, Any]]]
Send = Callable[[MutableMapping[str, Any]], Awaitable[None]]
App = Callable[[ASGIScope, Receive, Send], Awaitable[None]]
Refuse = Callable[[ApplianceError, str], App]  # by the error and the path that was asked for

OPEN_PATHS = ("/healthz", "/readyz", "/health")
SCOPE_OF_PATH: tuple[tuple[str, Scope], ...] = (("/metrics", "metrics"), ("/admin", "admin"))
DEFAULT_SCOPE: Scope = "chat"
LOOPBACK_HOSTS = frozenset({"localhost", "127.0.0.1", "::1"})
WRONG_KEYS_PER_MINUTE = 20  # from one address; a right key always passes
MAX_HEADER_CHARACTERS = 512
HOST = re.compile(r"(?:https?://)?(\[[0-9a-f:.]+\]|[a-z0-9_.-]+)(?::[0-9]{1,5})?")
POLICY_VIOLATION = 1008  # of the WebSocket protocol
_log = logging.getLogger(__name__)


def gate_for(serve: Serve, host: str, port: int, *, is_keyless_allowed: bool) -> "Gate":
    """The gate of a server on `host`.

    Where no key was ever made, everybody on this machine may ask; a host that others can reach then raises `RecipeError`.
    Once there is a key, everybody needs one, on this machine too. `is_keyless_allowed` turns keys off altogether.
    Raises as `Store.open` does.
    """
    keys = None if is_keyless_allowed else KeyBook(config.store_file(), config.store_key_file())
    if keys is not None and not keys.has_active and not _is_loopback(host):
        keys.close()
        raise RecipeError(
            f"serve.host: {host!r}, port {port}, can be reached by others, and there is no valid API key yet; make one with "
            "`appliance keys create --label NAME`, use 127.0.0.1, or --insecure-no-key where everybody may use the models."
        )
    allowed = LOOPBACK_HOSTS | {
        _name(host, "serve.host"),
        *(_name(each, "serve.allowed_hosts") for each in serve.allowed_hosts),
    }
    return Gate(keys=keys, allowed_hosts=allowed, requests_per_minute=serve.requests_per_minute)


class Gate:
    """Decides about every request. `middleware` is what wraps an ASGI application."""

    def __init__(self, *, keys: KeyBook | None, allowed_hosts: frozenset[str], requests_per_minute: int) -> None:
        """Without a key book nobody needs a key."""
        self._keys, self._allowed_hosts = keys, allowed_hosts
        self._rate = RateLimit(requests_per_minute)
        self._wrong_keys = RateLimit(WRONG_KEYS_PER_MINUTE)

    def middleware(self, app: App, refuse: Refuse) -> App:
        """Puts `tenant` and `key_id` into the request's state: the id of its key, or "" without keys.

        What is not admitted is answered by what `refuse` returns.
        """

        async def guarded(scope: ASGIScope, receive: Receive, send: Send) -> None:
            if scope["type"] == "websocket":  # there is no such route, and a browser may open one to any site
                await receive()
                await send({"type": "websocket.close", "code": POLICY_VIOLATION})
                return
            if scope["type"] == "http":
                try:
                    key_id = self._admit(scope)
                except ApplianceError as error:
                    await refuse(error, scope["path"])(scope, receive, send)
                    return
                scope.setdefault("state", {}).update(tenant=key_id, key_id=key_id)
            await app(scope, receive, send)

        return guarded

    def close(self) -> None:
        if self._keys is not None:
            self._keys.close()

    def _admit(self, scope: ASGIScope) -> str:
        """The id of the request's key, or "". Raises what is wrong with it."""
        headers = _Headers(scope)
        self._require_own_name(headers, scope)
        needed = _scope_of(scope["path"])
        if needed is None:
            return ""
        key = self._require_key(headers, _address(scope), needed)
        if needed == DEFAULT_SCOPE and (wait := self._rate.wait_seconds(key.id if key else _address(scope))):
            raise RateLimited(f"Too many requests; the next one may come in {wait} s.", retry_after_seconds=wait)
        return key.id if key else ""

    def _require_own_name(self, headers: "_Headers", scope: ASGIScope) -> None:
        own_address = (scope.get("server") or ("",))[0]
        if not self._is_own(_host_of(headers.one("host") or ""), own_address):
            raise NotAllowed(
                "The Host of this request is not a name of this server; use its address, or add the name to "
                "serve.allowed_hosts."
            )
        if "origin" in headers and not self._is_own(_host_of(headers.one("origin") or ""), own_address):
            raise NotAllowed("Web pages of other sites may not use this server; add their host to serve.allowed_hosts.")

    def _is_own(self, host: str, own_address: str) -> bool:
        if host in self._allowed_hosts:
            return bool(host)
        address = _parsed(host)
        return address is not None and (address.is_loopback or address == _parsed(own_address))

    def _require_key(self, headers: "_Headers", address: str, needed: Scope) -> Key | None:
        if self._keys is None or not _is_key_required(self._keys):
            return None
        text = headers.key()
        if text is None:
            raise NotAuthenticated("This server needs an API key: send it as `Authorization: Bearer KEY`.")
        key = self._keys.find(text)
        if key is None:
            if wait := self._wrong_keys.wait_seconds(address):
                raise RateLimited("Too many wrong API keys from this address.", retry_after_seconds=wait)
            _log.warning("event=wrong_key address=%s", address)
            raise NotAuthenticated("This API key is not known, has been revoked, or has expired.")
        if not key.allows(needed):
            raise NotAllowed(f"This API key has no {needed!r} scope, which this path needs.")
        return key


class _Headers:
    """The few headers that the gate reads. One that is there twice, or is too long, is as good as none."""

    def __init__(self, scope: ASGIScope) -> None:
        self._values: dict[str, list[str]] = {}
        for name, value in scope["headers"]:
            self._values.setdefault(name.decode("latin-1").lower(), []).append(value.decode("latin-1").strip())

    def __contains__(self, name: str) -> bool:
        return name in self._values

    def one(self, name: str) -> str | None:
        values = self._values.get(name, ())
        return values[0] if len(values) == 1 and len(values[0]) <= MAX_HEADER_CHARACTERS else None

    def key(self) -> str | None:
        kind, _, text = (self.one("authorization") or "").partition(" ")
        if kind.lower() == "bearer" and text.strip():
            return text.strip()
        return self.one("x-api-key") or None


def _is_key_required(keys: KeyBook) -> bool:
    try:
        return keys.is_required
    except (ApplianceError, OSError) as error:  # their words name files of this machine
        raise ServerError("This server cannot read its API keys; its log says why.") from error


def _scope_of(path: str) -> Scope | None:
    """None for what anybody may see."""
    if path in OPEN_PATHS:
        return None
    return next((scope for start, scope in SCOPE_OF_PATH if path == start or path.startswith(f"{start}/")), DEFAULT_SCOPE)


def _name(text: str, setting: str) -> str:
    """A configured host as it appears in a Host header, without brackets. Raises `RecipeError` for anything else."""
    if (address := _parsed(text)) is not None:
        return str(address)
    if (name := _host_of(text)) and name == text.lower().rstrip("."):
        return name
    raise RecipeError(f"{setting}: {text[:80]!r} is no host name or address; write it without scheme, port and path.")


def _host_of(text: str) -> str:
    """The host of a Host or Origin header, without scheme, port and brackets; "" when it is anything else."""
    match = HOST.fullmatch(text.lower())
    return match[1].strip("[]").rstrip(".") if match else ""


def _parsed(host: str) -> ipaddress.IPv4Address | ipaddress.IPv6Address | None:
    try:
        address = ipaddress.ip_address(host.partition("%")[0])
    except ValueError:
        return None
    return getattr(address, "ipv4_mapped", None) or address


def _address(scope: ASGIScope) -> str:
    """Where the request came from, as a name for its bucket: an IPv6 client has a whole /64 to choose from.

    A proxy on this machine says it in a header, and whoever is on this machine may write one: no other text is taken.
    """
    address = _parsed((scope.get("client") or ("",))[0])
    if isinstance(address, ipaddress.IPv6Address):
        return str(ipaddress.ip_network((address, 64), strict=False))
    return str(address or "unknown")


def _is_loopback(host: str) -> bool:
    if host == "localhost":
        return True
    try:
        found = socket.getaddrinfo(host, None, type=socket.SOCK_STREAM)
    except (OSError, UnicodeError) as error:
        raise ServerError(f"serve.host: {host[:80]!r} is no address of this machine ({error}).") from error
    addresses = [_parsed(str(each[4][0])) for each in found]
    return all(address is not None and address.is_loopback for address in addresses)
