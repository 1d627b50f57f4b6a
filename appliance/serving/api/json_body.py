"""ASGI middleware: what is posted is plain JSON of a bounded size, before anything else looks at it.

A body is refused when it is larger than the limit (also when its length was not declared), is not UTF-8 or not JSON, nests
too deeply, repeats a key, or holds NaN, a number beyond 64 bits, or half a surrogate pair. It is read as JSON whatever its
content type says: `curl -d` declares a form, and people use it. (Web pages of other origins are kept out by the gate.)
"""

import json
import math
import re
from collections.abc import Iterable
from typing import Any

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from appliance.serving.api.errors import RefusedBody

MAX_BODY_BYTES = 1 << 20
MAX_DEPTH = 64
LONG_NUMBER = re.compile(r"\d{19}")


class JsonBody:
    def __init__(self, app: ASGIApp, max_bytes: int = MAX_BODY_BYTES) -> None:
        self._app = app
        self._max_bytes = max_bytes

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or scope["method"] != "POST":
            await self._app(scope, receive, send)
            return
        kept = [(name, value) for name, value in scope["headers"] if name != b"content-type"]
        scope = {**scope, "headers": [*kept, (b"content-type", b"application/json")]}
        is_read = False

        async def checked() -> Message:
            nonlocal is_read
            if is_read:
                return await receive()
            message = await self._whole(receive)
            is_read = True
            if message["type"] == "http.request" and message["body"]:
                require_plain(message["body"])
            return message

        await self._app(scope, checked, send)

    async def _whole(self, receive: Receive) -> Message:
        """The body in one message, or the client's departure."""
        body = bytearray()
        while True:
            message = await receive()
            if message["type"] != "http.request":
                return message
            body += message.get("body", b"")
            if len(body) > self._max_bytes:
                raise RefusedBody(413, "request_too_large", f"The body is larger than the limit of {self._max_bytes} bytes.")
            if not message.get("more_body", False):
                return {"type": "http.request", "body": bytes(body), "more_body": False}


def require_plain(body: bytes) -> None:
    """Raises `RefusedBody` unless this is JSON that every later reader understands in the same way."""
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
