"""What a client may send to wear the server out: it costs the client an error and nobody else anything."""

import asyncio
import contextlib
import json
import logging
import re
from collections.abc import AsyncIterator
from typing import Any

import httpx
import pytest
import uvicorn
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError
from starlette.types import Message, Receive, Scope, Send

from appliance.serving.api import connection, json_body
from appliance.serving.api.chat_schema import ChatRequest
from appliance.serving.api.completions import CompletionRequest
from appliance.serving.api.connection import Connection
from appliance.serving.api.errors import RefusedBody
from appliance.serving.api.fields import MAX_FIELDS
from appliance.serving.api.json_answer import json_answer
from appliance.serving.api.json_body import MAX_MEMBERS, JsonBody, require_plain
from appliance.serving.api.responses_schema import ResponsesRequest
from appliance.serving.api.streaming import EVENTS, HoldingStream
from appliance.serving.api.tokens import MAX_PIECES_CHARACTERS
from tests.serving.api.site import Site
from tests.serving.fakes import FakeEngine, says

CHAT = "/v1/chat/completions"
USER = {"role": "user", "content": "x"}
END = b"\r\n\r\n"
SECRET = "an unlisted phone number"
JSON = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**53), 2**53) | st.floats(allow_nan=False, allow_infinity=False) | st.text(),
    lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner),
)


@pytest.mark.parametrize("unit", ["[]", "{}", '"":0', '{"\\"[[[":[]}'])
def test_a_body_of_too_many_members_is_refused(unit: str) -> None:
    if unit.startswith('"'):
        body = "{" + ",".join(f'"{i}":0' for i in range(MAX_MEMBERS + 1)) + "}"
    else:
        body = "[" + ",".join([unit] * MAX_MEMBERS) + "]"
    with pytest.raises(RefusedBody, match=f"more than {MAX_MEMBERS} lists"):
        require_plain(body.encode())


@pytest.mark.parametrize("text", ["[", "{:", '\\"[', "\\\\"])
def test_brackets_in_texts_are_not_counted(text: str) -> None:
    require_plain(('{"a":"' + text * 2 * MAX_MEMBERS + '"}').encode())


def test_numbers_are_not_counted() -> None:
    require_plain(json.dumps({"input": [1] * 4 * MAX_MEMBERS}).encode())


@pytest.mark.parametrize("text", [b'"', b'\\"' * 200_000, b'"' + b'\\"' * 200_000, b'"\\' * 200_000, b'["' * 200_000])
def test_texts_without_an_end_are_read_once(text: bytes) -> None:
    with pytest.raises(RefusedBody):
        require_plain(b"[" * (MAX_MEMBERS + 1) + text)


def test_a_body_that_does_not_come_is_not_waited_for() -> None:
    parts = 0

    async def arriving() -> Message:
        nonlocal parts
        parts += 1
        if parts == 1:
            return {"type": "http.request", "body": b"{", "more_body": True}
        await asyncio.Event().wait()
        raise AssertionError

    async def reader(_: Scope, receive: Receive, __: Send) -> None:
        await receive()

    async def go() -> None:
        body = JsonBody(reader, max_seconds=0.01)
        with pytest.raises(RefusedBody) as refused:
            await asyncio.wait_for(body({"type": "http", "method": "POST", "headers": []}, arriving, no_send), 20)
        assert refused.value.status_code == 408
        assert body._held_bytes == 0

    asyncio.run(go())


def test_bodies_that_arrive_are_bounded_together(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(json_body, "MAX_HELD_BYTES", 1000)
    statuses: list[int] = []
    gate = asyncio.Event()

    def arriving() -> Receive:
        messages = iter([{"type": "http.request", "body": b"[" + b" " * 399, "more_body": True}])

        async def receive() -> Message:
            for message in messages:
                return message
            await gate.wait()
            return {"type": "http.request", "body": b"]", "more_body": False}

        return receive

    async def reader(_: Scope, receive: Receive, __: Send) -> None:
        try:
            await receive()
            statuses.append(200)
        except RefusedBody as error:
            statuses.append(error.status_code if error.headers else 0)

    async def go() -> None:
        body = JsonBody(reader)
        scope = {"type": "http", "method": "POST", "headers": []}
        asked = [asyncio.create_task(body(scope, arriving(), no_send)) for _ in range(3)]
        await asyncio.wait(asked, return_when=asyncio.FIRST_COMPLETED, timeout=20)
        assert statuses == [503]
        gate.set()
        await asyncio.gather(*asked)
        assert sorted(statuses) == [200, 200, 503]
        assert body._held_bytes == 0

    asyncio.run(go())


@pytest.mark.parametrize(
    ("kind", "body"),
    [
        (ChatRequest, {"messages": [{}] * 1000}),
        (ChatRequest, {"messages": [USER], "tools": [{}] * 100}),
        (ChatRequest, {"messages": [USER], "stop": [0] * 1000}),
        (ChatRequest, {"messages": [USER], "logit_bias": {f"a{i}": "" for i in range(1025)}}),
        (ChatRequest, {"messages": [USER], "metadata": {f"a{i}": 0 for i in range(1000)}}),
        (ChatRequest, {"messages": [USER], "chat_template_kwargs": {f"a {i}": 0 for i in range(1000)}}),
        (ChatRequest, {"messages": [USER], **{f"a{i}": 0 for i in range(MAX_FIELDS)}}),
        (ChatRequest, {"messages": [{**USER, **{f"a{i}": 0 for i in range(MAX_FIELDS)}}]}),
        (CompletionRequest, {"prompt": [{}] * 1000}),
        (CompletionRequest, {"prompt": [[{}] * 1000]}),
        (ResponsesRequest, {"input": [{}] * 1000}),
    ],
)
def test_a_wrong_body_makes_few_errors(kind: Any, body: Any) -> None:
    with pytest.raises(ValidationError) as refused:
        kind.model_validate(body)
    assert refused.value.error_count() <= 8


def test_pieces_are_told_of_short_texts_only() -> None:
    site = Site(FakeEngine())
    body = {"content": "x" * (MAX_PIECES_CHARACTERS + 1)}
    assert site.post("/tokenize", body).status_code == 200
    refused = site.post("/tokenize", {**body, "with_pieces": True})
    assert (refused.status_code, refused.json()["error"]["code"]) == (400, "invalid_request")


@pytest.mark.parametrize(
    "fields",
    [
        {"top_logprobs": 0},
        {"logprobs": False, "top_logprobs": 0},
        {"top_k": -1},
        {"prompt_cache_retention": "24h"},
        {"reasoning_effort": "none"},
        {"store": False, "service_tier": "auto", "stream_options": None, "verbosity": "medium", "modalities": ["text"]},
        {"functions": [], "function_call": "auto", "audio": None, "prediction": None, "tools": [], "tool_choice": "auto"},
        {
            "messages": [
                {"role": "assistant", "content": "a", "refusal": None, "tool_calls": [], "function_call": None},
                USER,
            ]
        },
    ],
)
def test_what_asks_for_nothing_is_accepted(fields: dict[str, Any]) -> None:
    assert Site(FakeEngine(says("x"))).post(CHAT, {"messages": [USER], **fields}).status_code == 200


@pytest.mark.parametrize(
    ("path", "body", "message"),
    [
        (CHAT, {"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}, "messages[0].content: part 0 must"),
        (CHAT, {"messages": [{"role": "x"}]}, "messages[0]: role must be one of"),
        ("/v1/responses", {"input": [{"type": "x"}]}, "input[0]: type must be one of 'message',"),
        ("/v1/responses", {"input": [7]}, "input[0]: must be an object that says what it is"),
    ],
)
def test_errors_speak_of_the_request_and_not_of_this_program(path: str, body: Any, message: str) -> None:
    assert message in Site(FakeEngine()).post(path, body).json()["error"]["message"]


@pytest.mark.parametrize("path", ["/", "/healthz", "/readyz", "/health"])
def test_probes_may_ask_for_the_head_alone(path: str) -> None:
    assert Site(FakeEngine()).ask("HEAD", path).status_code == 200


@given(JSON)
def test_an_answer_in_pieces_is_the_same_json(value: Any) -> None:
    body = {"value": value, "made": iter([value, 1]), "in": [{"none": iter(())}, {"deep": {"made": iter([value])}}]}
    made = asyncio.run(json_answer(body)).body
    assert json.loads(bytes(made)) == {
        "value": value,
        "made": [value, 1],
        "in": [{"none": []}, {"deep": {"made": [value]}}],
    }


def test_others_have_their_turn_while_an_answer_is_encoded(monkeypatch: pytest.MonkeyPatch) -> None:
    turns = 0

    async def count() -> None:
        nonlocal turns
        while True:
            turns += 1
            await asyncio.sleep(0)

    async def go() -> None:
        other = asyncio.create_task(count())
        await json_answer({"data": iter(range(50))})
        other.cancel()

    monkeypatch.setattr("appliance.serving.api.json_answer.TURN_SECONDS", -1.0)
    asyncio.run(go())
    assert turns >= 50


def test_a_stream_that_nobody_reads_gives_back_what_it_holds() -> None:
    async def content() -> AsyncIterator[bytes]:
        while True:
            yield b"x"

    async def send(message: Message) -> None:
        sent.append(message["type"])
        if len(sent) > 3:
            await asyncio.Event().wait()

    async def receive() -> Message:
        await asyncio.Event().wait()
        raise AssertionError

    async def go() -> None:
        held = contextlib.AsyncExitStack()
        held.callback(lambda: sent.append("given back"))
        response = HoldingStream(content(), held, EVENTS, unread_seconds=0.01)
        scope = {"type": "http", "asgi": {"spec_version": "2.3"}}
        await asyncio.wait_for(response(scope, receive, send), 20)

    sent: list[str] = []
    asyncio.run(go())
    assert sent == ["http.response.start", *["http.response.body"] * 3, "given back"]


@pytest.mark.parametrize("is_streamed", [False, True])
def test_an_unexpected_error_is_logged_without_its_words(
    is_streamed: bool, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def fail(*_: Any) -> None:
        try:
            raise KeyError(SECRET)
        except KeyError as error:
            raise ValueError(SECRET) from error

    monkeypatch.setattr("appliance.serving.api.chat_bodies.ChatBodies._choice", fail)
    monkeypatch.setattr("appliance.serving.api.chat_bodies.ChatBodies._chunk", fail)
    site = Site(FakeEngine(says("x")))
    broken = pytest.raises(AssertionError) if is_streamed else contextlib.nullcontext()  # httpx: the answer has no end
    with caplog.at_level(logging.DEBUG), broken:
        response = site.post(CHAT, {"messages": [USER], "stream": is_streamed})
        assert SECRET not in response.text
        assert "unexpected error" in response.text
    assert SECRET not in caplog.text
    assert re.search(r"event=request_failed request=req-\w+ type=ValueError", caplog.text)
    assert "in fail" in caplog.text
    assert site.models.leases == 0


@pytest.mark.parametrize(
    "parts",
    [
        (b"",),
        (b"GET / HT",),
        (b"GET / HTTP/1.1\r\nHost: localhost\r\n\r\n", b"GET"),
        (b"GET / HTTP/1.1\r\nHost: localhost\r\n",),
    ],
)
def test_a_head_that_does_not_come_ends_the_connection(parts: tuple[bytes, ...], monkeypatch: pytest.MonkeyPatch) -> None:
    async def go() -> bytes:
        async with answering(0.2) as port:  # longer than a head may take
            reader, writer = await asyncio.open_connection("127.0.0.1", port)
            said = b""
            for part in parts:
                writer.write(part)
                said += await asyncio.wait_for(reader.readuntil(b"done") if part.endswith(END) else reader.read(), 20)
            writer.close()
            return said

    monkeypatch.setattr(connection, "HEAD_SECONDS", 0.05)
    assert asyncio.run(go()).count(b"200 OK") == len(parts) - 1


def test_a_slow_answer_outlives_the_time_of_its_head(monkeypatch: pytest.MonkeyPatch) -> None:
    async def go() -> list[str]:
        async with answering(0.2) as port, httpx.AsyncClient(trust_env=False) as client:
            return [(await client.get(f"http://127.0.0.1:{port}/")).text for _ in range(2)]

    monkeypatch.setattr(connection, "HEAD_SECONDS", 0.05)
    assert asyncio.run(go()) == ["done", "done"]


@contextlib.asynccontextmanager
async def answering(seconds: float) -> AsyncIterator[int]:
    """The port of a server that answers after some time."""

    async def app(_: Scope, __: Receive, send: Send) -> None:
        await asyncio.sleep(seconds)
        await send({"type": "http.response.start", "status": 200, "headers": []})
        await send({"type": "http.response.body", "body": b"done"})

    config = uvicorn.Config(app, port=0, lifespan="off", log_level="error", http=Connection, ws="none")
    server = uvicorn.Server(config)
    running = asyncio.create_task(server.serve())
    while not server.started:
        await asyncio.sleep(0.01)
    try:
        yield server.servers[0].sockets[0].getsockname()[1]
    finally:
        server.should_exit = True
        await running


async def no_send(message: Message) -> None:
    raise AssertionError(message)
