"""How the server and an engine's process talk: length-prefixed msgpack frames over a Unix socket pair.

A frame is four bytes of length, little-endian, and one message, decoded by its type: nothing that arrives can name code to
run. The first frame is `EngineSettings`; after it the server sends `ToWorker` and the worker sends `FromWorker`. Knows
nothing of processes, threads or llama.cpp.
"""

import socket
import struct
from collections.abc import Iterator
from typing import Any, Generic, TypeVar

import msgspec
from msgspec import Struct

from appliance.errors import ApplianceError, EngineFailed
from appliance.serving.engine_settings import EngineSettings
from appliance.serving.events import Event, Load, ModelInfo, RequestStats, StepStats
from appliance.serving.requests import Document, Request

FRAME_BYTES = 64 << 20  # 8,000 embeddings of 2,048 numbers; no request comes near it
HEADER = struct.Struct("<I")

T = TypeVar("T")


class FrameBroken(Exception):
    """The other side sent something that is no message, or one that is too large."""


class Cancel(Struct, frozen=True, kw_only=True, tag=True):
    """Nobody waits for this request any more."""

    id: str


class Ping(Struct, frozen=True, kw_only=True, tag=True):
    """Answered with a `Pong` by a process that is well."""


class Drain(Struct, frozen=True, kw_only=True, tag=True):
    """No new request is taken; those in hand have this long."""

    grace_seconds: float


class Documents(Struct, frozen=True, kw_only=True, tag=True):
    """The operator's documents, all there are now. What was told before and is not among them is erased.

    `refused` could not be read from their files; `is_read_ahead` asks for reading them before a request does.
    """

    documents: tuple[Document, ...] = ()
    refused: int = 0
    is_read_ahead: bool = False


class Ready(Struct, frozen=True, kw_only=True, tag=True):
    """The model is loaded."""

    model: ModelInfo


class LoadRefused(Struct, frozen=True, kw_only=True, tag=True):
    """The model cannot be loaded; the worker ends after this."""

    code: str
    message: str

    def error(self) -> ApplianceError:
        return _LOAD_ERRORS.get(self.code, EngineFailed)(self.message)


class Report(Struct, frozen=True, kw_only=True, tag=True):
    """What has happened since the last report: as a rule, one step of the engine. Not each says how things stand."""

    events: list[tuple[str, Event]] = []
    steps: list[StepStats] = []
    requests: list[RequestStats] = []
    load: Load | None = None


class Pong(Struct, frozen=True, kw_only=True, tag=True):
    """Sent at `at`; `encoding_since` is when the oldest request in rendering, tokenising or compiling got there."""

    at: float
    load: Load
    encoding_since: float | None = None


ToWorker = Request | Cancel | Ping | Drain | Documents
FromWorker = Ready | LoadRefused | Report | Pong


def pack(message: Any) -> bytes:
    """A message as a frame. Raises `FrameBroken` when it is too large or nested too deep."""
    try:
        body = msgspec.msgpack.encode(message)
    except (RecursionError, OverflowError, TypeError) as error:
        raise FrameBroken(f"it cannot be packed ({type(error).__name__})") from error
    if len(body) > FRAME_BYTES:
        raise FrameBroken(f"it has {len(body)} bytes; the limit is {FRAME_BYTES}")
    return HEADER.pack(len(body)) + body


class Decoder(Generic[T]):
    """Turns the body of a frame into a message of one type, which may be a union."""

    def __init__(self, kind: Any) -> None:
        self._decoder: msgspec.msgpack.Decoder[T] = msgspec.msgpack.Decoder(kind)

    def message(self, body: bytes) -> T:
        """Raises `FrameBroken`."""
        try:
            return self._decoder.decode(body)
        except (msgspec.DecodeError, RecursionError) as error:
            raise FrameBroken(f"a frame of {len(body)} bytes is no message: {error}") from error


class Frames(Generic[T]):
    """Cuts bytes, however they arrive, into messages."""

    def __init__(self, decoder: Decoder[T]) -> None:
        self._decoder = decoder
        self._rest = bytearray()  # the beginning of a frame

    def messages(self, data: bytes) -> Iterator[T]:
        """Those that are complete with `data`. Raises `FrameBroken`, and then is of no use any more."""
        if self._rest:
            self._rest += data
        if not self._rest and len(data) >= HEADER.size and len(data) == HEADER.size + _checked_length(data):
            yield self._decoder.message(data[HEADER.size :])  # as a rule: one frame came, and all of it
            return
        self._rest = self._rest or bytearray(data)
        while len(self._rest) >= HEADER.size:
            end = HEADER.size + _checked_length(self._rest)
            if len(self._rest) < end:
                return
            body = bytes(self._rest[HEADER.size : end])
            del self._rest[:end]
            yield self._decoder.message(body)


def receive(sock: socket.socket, decoder: Decoder[T]) -> T | None:
    """Waits for a message; None when the other side has closed. Raises `FrameBroken`."""
    header = _receive_exactly(sock, HEADER.size)
    if header is None:
        return None
    body = _receive_exactly(sock, _checked_length(header))
    return None if body is None else decoder.message(body)


def _checked_length(header: bytes | bytearray) -> int:
    length: int = HEADER.unpack_from(header)[0]
    if length > FRAME_BYTES:
        raise FrameBroken(f"a frame of {length} bytes was announced; the limit is {FRAME_BYTES}")
    return length


def _receive_exactly(sock: socket.socket, count: int) -> bytes | None:
    parts, missing = [], count
    while missing:
        try:
            part = sock.recv(min(missing, 1 << 20))
        except ConnectionError:
            return None
        if not part:
            return None
        parts.append(part)
        missing -= len(part)
    return b"".join(parts)


SETTINGS: Decoder[EngineSettings] = Decoder(EngineSettings)
TO_WORKER: Decoder[ToWorker] = Decoder(ToWorker)
FROM_WORKER: Decoder[FromWorker] = Decoder(FromWorker)


def _subclasses(kind: type[ApplianceError]) -> dict[str, type[ApplianceError]]:
    """By api_code, those that are made of a message alone."""
    found = {kind.api_code: kind} if kind.__init__ is Exception.__init__ else {}
    for each in kind.__subclasses__():
        found |= _subclasses(each)
    return found


_LOAD_ERRORS = _subclasses(ApplianceError)
