"""ASGI middleware: what is posted is plain JSON of a bounded size, before anything else looks at it.

A body is refused when it is larger than the limit (also when its length was not declared) or takes too long to arrive, is
not UTF-8 or not JSON, nests too deeply, holds too many values, repeats a key, or holds NaN, a number beyond 64 bits, or half
a surrogate pair. It is read as JSON whatever its content type says: `curl -d` declares a form, and people use it. (Web pages
of other origins are kept out by the gate.)
"""

import asyncio
import json
import math
import re
from collections.abc import Iterable
from typing import Any

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from appliance.serving.api.errors import RefusedBody

MAX_BODY_BYTES = 1 << 20
MAX_HELD_BYTES = 64 << 20  # of all bodies that are arriving
MAX_SECONDS = 60.0  # for a body to arrive
MAX_DEPTH = 64
MAX_MEMBERS = 1 << 15  # a megabyte could hold 350,000 empty lists, which take seconds to look through
QUICK_BYTES = 1 << 15  # checked at once; a longer body would hold up the answers of others
LONG_NUMBER = re.compile(r"\d{19}")
STRING = re.compile(rb'"(?:[^"\\]++|\\.)*+"?', re.DOTALL)


class JsonBody:
    def __init__(self, app: ASGIApp, max_bytes: int = MAX_BODY_BYTES, max_seconds: float = MAX_SECONDS) -> None:
        self._app = app
        self._max_bytes = max_bytes
        self._max_seconds = max_seconds
        self._held_bytes = 0
        self._checking = asyncio.Lock()  # threads that check would take turns with the event loop's, all of them

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or scope["method"] != "POST":
            await self._app(scope, receive, send)
            return
        kept = [(name, value) for name, value in scope["headers"] if name != b"content-type"]
        scope["headers"] = [*kept, (b"content-type", b"application/json")]  # no copy: the router notes its route in it
        is_read = False

        async def checked() -> Message:
            nonlocal is_read
            if is_read:
                return await receive()
            message = await self._whole(receive)
            is_read = True
            if message["type"] == "http.request" and message["body"]:
                await self._require_plain(message["body"])
            return message

        await self._app(scope, checked, send)

    async def _whole(self, receive: Receive) -> Message:
        """The body in one message, or the client's departure."""
        body = bytearray()
        try:
            async with asyncio.timeout(self._max_seconds):
                while True:
                    message = await receive()
                    if message["type"] != "http.request":
                        return message
                    self._hold(body, message.get("body", b""))
                    if not message.get("more_body", False):
                        return {"type": "http.request", "body": bytes(body), "more_body": False}
        except TimeoutError:
            raise RefusedBody(408, "request_timeout", f"The body did not arrive within {self._max_seconds:.0f} s.") from None
        finally:
            self._held_bytes -= len(body)

    def _hold(self, body: bytearray, more: bytes) -> None:
        """Adds what has arrived. Raises `RefusedBody`."""
        body += more
        self._held_bytes += len(more)
        if len(body) > self._max_bytes:
            raise RefusedBody(413, "request_too_large", f"The body is larger than the limit of {self._max_bytes} bytes.")
        if self._held_bytes > MAX_HELD_BYTES:
            message = "Too many large requests arrive at the same time; try again in a while."
            raise RefusedBody(503, "too_many_bodies", message, {"Retry-After": "1"})

    async def _require_plain(self, body: bytes) -> None:
        if len(body) <= QUICK_BYTES:
            require_plain(body)
            return
        async with self._checking:
            await asyncio.to_thread(require_plain, body)


def require_plain(body: bytes) -> None:
    """Raises `RefusedBody` unless this is JSON that every later reader understands in the same way."""
    _require_few(body)
    try:
        text = body.decode()
        read_int = _bounded if LONG_NUMBER.search(text) else None  # Python's own is much faster
        document = json.loads(
            text, object_pairs_hook=_unique, parse_constant=_not_json, parse_float=_finite, parse_int=read_int
        )
        if "\\u" in text:
            json.dumps(document, ensure_ascii=False).encode()
    except UnicodeDecodeError as error:
        raise _invalid(f"The body is not UTF-8 (byte {error.start}).") from None
    except UnicodeEncodeError:
        raise _invalid("The body holds half a surrogate pair, which is no character.") from None
    except json.JSONDecodeError as error:
        raise _invalid(f"The body is not valid JSON (line {error.lineno}, column {error.colno}).") from None
    except ValueError as error:
        raise _invalid(str(error) if isinstance(error, _NotPlain) else "The body holds a number that is too long.") from None
    except RecursionError:
        raise _too_deep() from None
    _require_shallow(document)


class _NotPlain(ValueError):
    pass


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    members = dict(pairs)
    if len(members) < len(pairs):
        raise _NotPlain("The body says the same key twice in one object.")
    return members


def _not_json(_: str) -> float:
    raise _NotPlain("The body holds NaN or Infinity, which are not JSON.")


def _finite(digits: str) -> float:
    number = float(digits)
    if not math.isfinite(number):
        raise _NotPlain("The body holds a number beyond the range of a double.")
    return number


def _bounded(digits: str) -> int:
    """An engine is spoken to in msgpack, which has no larger integers."""
    number = int(digits)
    if not -(2**63) <= number < 2**64:
        raise _NotPlain("The body holds an integer beyond 64 bits.")
    return number


def _require_few(body: bytes) -> None:
    """Counts lists, objects and their members without making any, for it is making them that takes the time."""
    if sum(map(body.count, (b"[", b"{", b":"))) > MAX_MEMBERS:  # most of them in texts, perhaps
        bare = STRING.sub(b"", body)
        if sum(map(bare.count, (b"[", b"{", b":"))) > MAX_MEMBERS:
            raise _invalid(f"The body holds more than {MAX_MEMBERS} lists, objects and members of objects together.")


def _require_shallow(document: Any) -> None:
    level: Iterable[Any] = [document]
    for _ in range(MAX_DEPTH + 1):
        level = [inner for each in level if isinstance(each, dict | list) for inner in _members(each)]
        if not level:
            return
    raise _too_deep()


def _members(value: dict[str, Any] | list[Any]) -> Iterable[Any]:
    return value.values() if isinstance(value, dict) else value


def _too_deep() -> RefusedBody:
    return _invalid(f"The body nests more than {MAX_DEPTH} levels deep.")


def _invalid(message: str) -> RefusedBody:
    return RefusedBody(400, "invalid_json", message)
