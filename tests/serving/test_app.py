"""The HTTP API over a fake engine: bodies, streams, refusals, departures, metrics."""

import asyncio
import json
from collections.abc import AsyncIterator, Coroutine
from typing import Any

import httpx
import pytest
from prometheus_client import CollectorRegistry
from prometheus_client.parser import text_string_to_metric_families

from appliance.errors import EngineFailed, QueueFull
from appliance.serving import sse
from appliance.serving.app import MAX_BODY_BYTES, create_app
from appliance.serving.engine import RequestStats, StepStats
from appliance.serving.metrics import Metrics
from tests.serving.fakes import FakeEngine, breaks, says

CHAT = "/v1/chat/completions"
BODY: dict[str, Any] = {"model": "fake", "messages": [{"role": "user", "content": "hello"}]}

LONG: dict[str, Any] = {"model": "fake", "messages": [{"role": "user", "content": "x" * 70}]}


class Site:
    """An engine, its metrics, and an in-process client."""

    def __init__(self, engine: FakeEngine) -> None:
        self.engine = engine
        self.metrics = Metrics(CollectorRegistry())
        self.app = create_app(engine, self.metrics, default_max_tokens=33)

    def ask(self, method: str, path: str, **options: Any) -> httpx.Response:
        async def go() -> httpx.Response:
            transport = httpx.ASGITransport(self.app, raise_app_exceptions=False)
            async with httpx.AsyncClient(transport=transport, base_url="http://test") as client:
                return await client.request(method, path, **options)

        return asyncio.run(go())

    def chat(self, **fields: Any) -> httpx.Response:
        return self.ask("POST", CHAT, json={**BODY, **fields})

    def count(self, outcome: str) -> float:
        for family in text_string_to_metric_families(self.metrics.exposition().decode()):
            for sample in family.samples:
                if sample.name == "appliance_requests_total" and sample.labels == {"outcome": outcome}:
                    return sample.value
        return 0.0


def test_plain_answer() -> None:
    site = Site(FakeEngine(says("Hel", "lo.")))
    body = site.chat().json()
    assert body["object"] == "chat.completion"
    assert body["choices"][0]["message"]["content"] == "Hello."
    assert body["choices"][0]["finish_reason"] == "stop"
    assert body["usage"] == {"prompt_tokens": 5, "completion_tokens": 3, "total_tokens": 8}
    assert site.engine.requests[0].max_tokens == 33


@pytest.mark.parametrize("with_usage", [False, True])
def test_streamed_answer(with_usage: bool) -> None:
    site = Site(FakeEngine(says("Hel", "lo.")))
    response = site.chat(stream=True, stream_options={"include_usage": with_usage})
    assert response.headers["content-type"].startswith("text/event-stream")
    assert response.text.endswith("data: [DONE]\n\n")
    chunks = list(sse.decode(response.text.split("\n")))
    assert all(chunk["object"] == "chat.completion.chunk" and chunk["id"] == chunks[0]["id"] for chunk in chunks)
    assert chunks[0]["choices"][0]["delta"] == {"role": "assistant", "content": ""}
    told = [chunk for chunk in chunks if chunk["choices"]]
    assert "".join(chunk["choices"][0]["delta"].get("content", "") for chunk in told) == "Hello."
    assert [chunk["choices"][0]["finish_reason"] for chunk in told] == [None, None, None, "stop"]
    if with_usage:
        assert chunks[-1]["choices"] == []
        assert chunks[-1]["usage"]["total_tokens"] == 8
        assert all(chunk["usage"] is None for chunk in told)
    else:
        assert all("usage" not in chunk for chunk in chunks)


def test_request_reaches_the_engine() -> None:
    site = Site(FakeEngine(says("x")))
    site.chat(max_tokens=4, temperature=0.5, seed=1, stop=["end"])
    request = site.engine.requests[0]
    assert (request.max_tokens, request.stop, request.sampling.temperature) == (4, ("end",), 0.5)
    assert request.prompt == (0, 1, 2, 3, 4)


def test_failure_before_and_during_a_stream() -> None:
    site = Site(FakeEngine(breaks("Hel")))
    plain = site.chat()
    assert plain.status_code == 500
    assert plain.json()["error"] == {
        "message": "It broke.",
        "type": "server_error",
        "param": None,
        "code": "engine_failed",
    }
    streamed = site.chat(stream=True)
    assert "[DONE]" not in streamed.text
    assert list(sse.decode(streamed.text.split("\n")))[-1]["error"]["code"] == "engine_failed"


def test_full_queue_says_when_to_come_back() -> None:
    site = Site(FakeEngine())
    site.engine.refusal = QueueFull("Full.", retry_after_seconds=7)
    response = site.chat(stream=True)
    assert (response.status_code, response.headers["retry-after"]) == (503, "7")
    assert response.json()["error"]["code"] == "queue_full"
    assert site.count("rejected") == 1


def test_dead_engine_is_a_server_error() -> None:
    site = Site(FakeEngine())
    site.engine.refusal = EngineFailed("Gone.")
    assert site.chat().status_code == 500


@pytest.mark.parametrize(
    ("method", "path", "content", "status", "code"),
    [
        ("POST", CHAT, "{", 400, "invalid_json"),
        ("POST", CHAT, "", 400, "invalid_request"),
        ("POST", CHAT, "[]", 400, "invalid_request"),
        ("POST", CHAT, '"x"', 400, "invalid_request"),
        ("POST", CHAT, "[" * 100_000, 400, None),
        ("POST", CHAT, b"\xff\xfe", 400, None),
        ("POST", CHAT, json.dumps({**BODY, "model": "other"}), 404, "model_not_found"),
        ("POST", CHAT, json.dumps({**BODY, "tools": [1]}), 400, "unsupported_parameter"),
        ("POST", CHAT, json.dumps(LONG), 400, "context_length_exceeded"),
        ("POST", CHAT, " " * (MAX_BODY_BYTES + 1), 413, "request_too_large"),
        ("GET", CHAT, "", 405, "method_not_allowed"),
        ("GET", "/v1/nothing", "", 404, "not_found"),
        ("GET", "/docs", "", 404, "not_found"),
    ],
)  # fmt: skip
def test_bad_input_is_answered_in_openai_shape(
    method: str, path: str, content: str | bytes, status: int, code: str | None
) -> None:
    site = Site(FakeEngine(says("x")))
    response = site.ask(method, path, content=content, headers={"content-type": "application/json"})
    error = response.json()["error"]
    assert response.status_code == status
    assert set(error) == {"message", "type", "param", "code"}
    assert error["type"] == "invalid_request_error"
    assert code in (error["code"], None)
    assert site.engine.requests == []
    assert site.count("invalid") == (path == CHAT and method == "POST")


def test_too_long_a_prompt_is_answered_with_the_numbers() -> None:
    site = Site(FakeEngine())
    response = site.ask("POST", CHAT, json=LONG)
    assert "70" in response.json()["error"]["message"]
    assert "64" in response.json()["error"]["message"]


def test_undeclared_length_is_counted() -> None:
    async def chunks() -> AsyncIterator[bytes]:
        for _ in range(20):
            yield b" " * (MAX_BODY_BYTES // 10)

    response = Site(FakeEngine()).ask("POST", CHAT, content=chunks(), headers={"content-type": "application/json"})
    assert (response.status_code, response.json()["error"]["code"]) == (413, "request_too_large")


def test_unexpected_error_keeps_its_details_to_itself() -> None:
    site = Site(FakeEngine())
    site.engine.encode = None  # type: ignore[method-assign, assignment]
    response = site.chat()
    assert response.status_code == 500
    assert response.json()["error"]["code"] == "internal_error"
    assert "NoneType" not in response.text


def test_models_and_health() -> None:
    site = Site(FakeEngine())
    assert site.ask("GET", "/v1/models").json()["data"][0]["id"] == "fake"
    assert site.ask("GET", "/healthz").json() == {"status": "ok"}
    assert site.ask("GET", "/readyz").status_code == 200
    site.engine.drain(1)
    assert site.ask("GET", "/readyz").status_code == 503
    assert site.ask("GET", "/healthz").status_code == 200


async def leave_early(site: Site, stream: bool) -> list[dict[str, Any]]:
    """Sends a request, goes away while the engine is busy with it, and returns what was sent back."""
    body = json.dumps({**BODY, "stream": stream}).encode()
    messages: asyncio.Queue[dict[str, Any]] = asyncio.Queue()
    messages.put_nowait({"type": "http.request", "body": body, "more_body": False})
    sent: list[dict[str, Any]] = []

    async def send(message: dict[str, Any]) -> None:
        sent.append(message)

    headers = [(b"content-type", b"application/json")]
    scope: dict[str, Any] = {
        "type": "http",
        "method": "POST",
        "path": CHAT,
        "raw_path": CHAT.encode(),
        "query_string": b"",
    }
    scope |= {"headers": headers, "asgi": {"version": "3.0", "spec_version": "2.3"}, "http_version": "1.1"}
    scope |= {"scheme": "http", "server": ("test", 80), "client": ("test", 1), "root_path": ""}
    call: Coroutine[Any, Any, None] = site.app(scope, messages.get, send)  # type: ignore[arg-type]
    task = asyncio.create_task(call)
    while not site.engine.requests:
        await asyncio.sleep(0)
    assert site.engine.running == 1
    messages.put_nowait({"type": "http.disconnect"})
    messages.put_nowait({"type": "http.disconnect"})  # two tasks listen
    await task
    return sent


@pytest.mark.parametrize("stream", [False, True])
def test_client_that_goes_away_frees_its_place(stream: bool) -> None:
    site = Site(FakeEngine())
    asyncio.run(asyncio.wait_for(leave_early(site, stream), timeout=20))
    assert (site.engine.cancelled, site.engine.running) == (1, 0)


def test_metrics_are_well_formed() -> None:
    site = Site(FakeEngine(says("x")))
    site.metrics.record_step(
        StepStats(prompt_tokens=4, generated_tokens=2, first_token_seconds=(0.3,), inter_token_seconds=(0.1, 0.2))
    )
    site.metrics.record_request(
        RequestStats(outcome="cancelled", duration_seconds=300.0, queue_seconds=0.1, cancelled_in="decode")
    )
    response = site.ask("GET", "/metrics")
    assert response.headers["content-type"].startswith("text/plain; version=0.0.4")
    families = {family.name: family for family in text_string_to_metric_families(response.text)}
    assert {name: family.type for name, family in families.items() if not name.endswith("_created")} == {
        "appliance_request_duration_seconds": "histogram",
        "appliance_time_to_first_token_seconds": "histogram",
        "appliance_inter_token_seconds": "histogram",
        "appliance_queue_seconds": "histogram",
        "appliance_prompt_tokens": "counter",
        "appliance_generated_tokens": "counter",
        "appliance_requests": "counter",
        "appliance_cancellations": "counter",
        "appliance_requests_running": "gauge",
        "appliance_requests_waiting": "gauge",
        "appliance_slots": "gauge",
        "appliance_engine_ready": "gauge",
        "appliance_model_info": "gauge",
    }
    info = families["appliance_model_info"].samples[0].labels
    assert info == {"name": "fake", "quantization": "Q4_K - Medium", "sha256": "0123456789ab"}
    assert families["appliance_prompt_tokens"].samples[0].value == 4
