"""The one client of every benchmark: sends a request over HTTP and notes when each piece of the answer arrived.

It shares the cores with the server that it measures, so while answers run it does next to nothing: bytes are kept with the
time of their arrival and are read as HTTP (by h11) and as events only when the answer is over. Measured on four streams of
500 events a second: 31 to 47 µs of CPU for an event, nearly all of it the kernel's and the event loop's; aiohttp took 42 to
50, httpx 102 to 104. Knows nothing of servers; `ask` is the entry.
"""

import asyncio
import dataclasses
import json
import time
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import h11

clock = time.perf_counter
EVENT_END = b"\n\n"
DATA = b"data:"
DONE = b"[DONE]"


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Request:
    """What is sent: a POST of `body` as JSON, or a GET without one."""

    host: str
    port: int
    path: str
    body: Mapping[str, Any] | None = None

    @property
    def method(self) -> str:
        return "GET" if self.body is None else "POST"


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Exchange:
    """What went over one connection; times are those of `clock`. `problem` says why it ended early, if it did."""

    sent_at: float
    ended_at: float
    reads: Sequence[tuple[float, bytes]]
    problem: str = ""


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Answer:
    """One request as the client saw it.

    `text_times` has the arrival of each event that brought text. `coalesced` of them came in the same read as the one
    before: their distance in time is 0 because of a buffer, and says nothing about the model. `finished_at` is when the
    server said why the answer ended. `status` is 0 when no answer came at all.
    """

    sent_at: float
    ended_at: float
    status: int
    headers: Mapping[str, str] = dataclasses.field(default_factory=dict)
    text: str = ""
    text_times: Sequence[float] = ()
    coalesced: int = 0
    prompt_tokens: int | None = None
    answer_tokens: int | None = None
    finish_reason: str | None = None
    finished_at: float | None = None
    problem: str = ""

    @property
    def is_whole(self) -> bool:
        return self.status == 200 and not self.problem

    @property
    def first_token_seconds(self) -> float | None:
        return self.text_times[0] - self.sent_at if self.text_times else None


class _Recorder(asyncio.Protocol):
    """Sends one request and keeps what comes back until the server closes the connection."""

    def __init__(self, request: bytes) -> None:
        self.sent_at = 0.0
        self.reads: list[tuple[float, bytes]] = []
        self.closed: asyncio.Future[Exception | None] = asyncio.get_running_loop().create_future()
        self._request = request

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        assert isinstance(transport, asyncio.WriteTransport)
        self.sent_at = clock()
        transport.write(self._request)

    def data_received(self, data: bytes) -> None:
        self.reads.append((clock(), data))

    def connection_lost(self, error: Exception | None) -> None:
        if not self.closed.done():
            self.closed.set_result(error)


async def ask(request: Request, *, patience_seconds: float) -> Answer:
    """Sends the request and reads the answer to its end; never raises for what the server does wrong."""
    return read(request, await exchange(request, patience_seconds=patience_seconds))


async def exchange(request: Request, *, patience_seconds: float) -> Exchange:
    """The bytes of `ask`, for those who read them later; when patience is over the connection is cut, as a person would."""
    loop = asyncio.get_running_loop()
    began = clock()
    try:
        async with asyncio.timeout(patience_seconds) as patience:
            transport, recorder = await loop.create_connection(
                lambda: _Recorder(_wire_bytes(request)), request.host, request.port
            )
    except (OSError, TimeoutError) as error:
        return Exchange(sent_at=began, ended_at=clock(), reads=(), problem=f"no connection ({error or 'too late'})")
    problem = ""
    try:
        async with asyncio.timeout_at(patience.when()):
            lost = await recorder.closed
            problem = "" if lost is None else f"connection lost ({lost})"
    except TimeoutError:
        problem = f"no end within {patience_seconds:g} s"
    finally:
        transport.abort()
    return Exchange(sent_at=recorder.sent_at, ended_at=clock(), reads=recorder.reads, problem=problem)


def read(request: Request, exchange: Exchange) -> Answer:
    """What an exchange says: an error's body, one JSON object, or a stream of events."""
    base: dict[str, Any] = {"sent_at": exchange.sent_at, "ended_at": exchange.ended_at}
    try:
        head, parts = _http(request, exchange.reads)
    except h11.RemoteProtocolError as error:
        return Answer(**base, status=0, problem=exchange.problem or f"broken answer ({error})")
    if head is None:
        return Answer(**base, status=0, problem=exchange.problem or "closed without an answer")
    base |= {"status": head.status_code, "headers": {name.decode(): value.decode() for name, value in head.headers}}
    kind = base["headers"].get("content-type", "")
    if "text/event-stream" in kind:
        return _stream(base, parts, exchange.problem)
    body = b"".join(data for _, data in parts)
    if head.status_code != 200 or "json" not in kind:
        return Answer(**base, text=body.decode(errors="replace"), problem=exchange.problem)
    return _plain(base, body, exchange.problem)


def _wire_bytes(request: Request) -> bytes:
    """`Connection: close` makes the end of the connection the end of the answer, which costs no look at the bytes."""
    body = b"" if request.body is None else json.dumps(request.body).encode()
    connection = h11.Connection(h11.CLIENT)
    headers = [
        ("Host", f"{request.host}:{request.port}"),
        ("Connection", "close"),
        ("Content-Type", "application/json"),
        ("Content-Length", str(len(body))),
    ]
    sent = connection.send(h11.Request(method=request.method, target=request.path, headers=headers))
    return b"".join(filter(None, (sent, connection.send(h11.Data(data=body)), connection.send(h11.EndOfMessage()))))


def _http(
    request: Request, reads: Sequence[tuple[float, bytes]]
) -> tuple[h11.Response | None, Sequence[tuple[float, bytes]]]:
    """The head of the answer and the parts of its body, each with the time of the read that completed it."""
    connection = h11.Connection(h11.CLIENT)
    connection.send(h11.Request(method=request.method, target=request.path, headers=[("Host", request.host)]))
    connection.send(h11.EndOfMessage())
    head: h11.Response | None = None
    parts: list[tuple[float, bytes]] = []
    for at, data in reads:
        connection.receive_data(data)
        while (event := connection.next_event()) not in (h11.NEED_DATA, h11.PAUSED):
            if isinstance(event, h11.Response):
                head = event
            elif isinstance(event, h11.Data):
                parts.append((at, bytes(event.data)))
            elif isinstance(event, h11.EndOfMessage):
                return head, parts
    return head, parts


def _plain(base: Mapping[str, Any], body: bytes, problem: str) -> Answer:
    try:
        told = json.loads(body)
    except ValueError:
        return Answer(**base, problem=problem or f"no JSON: {body[:120]!r}")
    table = told if isinstance(told, dict) else {}
    choice = (table.get("choices") or [{}])[0]
    usage = table.get("usage") or {}
    return Answer(
        **base,
        text=str((choice.get("message") or {}).get("content") or ""),
        prompt_tokens=usage.get("prompt_tokens"),
        answer_tokens=usage.get("completion_tokens"),
        finish_reason=choice.get("finish_reason"),
        problem=problem,
    )


def _stream(base: Mapping[str, Any], parts: Sequence[tuple[float, bytes]], problem: str) -> Answer:
    texts: list[str] = []
    times: list[float] = []
    usage: Mapping[str, Any] = {}
    reason: str | None = None
    finished_at: float | None = None
    coalesced, is_done = 0, False
    for at, data in _events(parts):
        if data == DONE:
            is_done = True
            break
        try:
            body = json.loads(data)
        except ValueError:
            return Answer(**base, problem=f"no JSON in an event: {data[:120]!r}")
        if "error" in body:
            problem = problem or f"error in the stream: {json.dumps(body['error'])[:300]}"
        usage = body.get("usage") or usage
        choice = (body.get("choices") or [{}])[0]
        if choice.get("finish_reason"):
            reason, finished_at = choice["finish_reason"], at
        delta = choice.get("delta") or {}
        if text := (delta.get("content") or delta.get("reasoning_content") or ""):
            coalesced += bool(times) and times[-1] == at
            texts.append(text)
            times.append(at)
    return Answer(
        **base,
        text="".join(texts),
        text_times=times,
        coalesced=coalesced,
        prompt_tokens=usage.get("prompt_tokens"),
        answer_tokens=usage.get("completion_tokens"),
        finish_reason=reason,
        finished_at=finished_at,
        problem=problem or ("" if is_done else "the stream ended before its end"),
    )


def _events(parts: Sequence[tuple[float, bytes]]) -> Iterator[tuple[float, bytes]]:
    """The data of each event, with the time at which its last byte arrived. Comments and pings are no events."""
    rest = b""
    for at, data in parts:
        *whole, rest = (rest + data).replace(b"\r\n", b"\n").split(EVENT_END)
        for event in whole:
            lines = (line.removeprefix(DATA).strip() for line in event.split(b"\n") if line.startswith(DATA))
            if joined := b"\n".join(lines):
                yield at, joined
