"""What holds for every route: bodies that cannot be read, unknown routes, ids, counts, departures, keys."""

import json
from collections.abc import AsyncIterator
from typing import Any

import pytest

from appliance.errors import EngineFailed, QueueFull, RequestError
from appliance.recipe import Serve
from appliance.serving.api.errors import invalid_body
from appliance.serving.api.json_body import MAX_BODY_BYTES, MAX_DEPTH
from appliance.serving.auth import gate_for
from appliance.serving.events import DocumentCounts
from tests.serving.api.site import Site
from tests.serving.fakes import FakeEngine, says

COMPLETIONS, TAGS = "/v1/completions", "/api/tags"
BODY: dict[str, Any] = {"model": "fake", "prompt": "hello"}
GENERATING: dict[str, dict[str, Any]] = {
    COMPLETIONS: BODY,
    "/v1/chat/completions": {"model": "fake", "messages": [{"role": "user", "content": "hi"}]},
    "/v1/responses": {"model": "fake", "input": "hi"},
    "/api/chat": {"model": "fake", "messages": [{"role": "user", "content": "hi"}]},
    "/api/generate": {"model": "fake", "prompt": "hi"},
}


@pytest.fixture(scope="module")
def site() -> Site:
    return Site(FakeEngine(says("Hel", "lo.")))


@pytest.mark.parametrize(
    ("method", "path", "content", "status", "code"),
    [
        ("POST", COMPLETIONS, "{", 400, "invalid_json"),
        ("POST", COMPLETIONS, "", 400, "invalid_request"),
        ("POST", COMPLETIONS, "[]", 400, "invalid_request"),
        ("POST", COMPLETIONS, '"x"', 400, "invalid_request"),
        ("POST", COMPLETIONS, "[" * 100_000, 400, "invalid_json"),
        ("POST", COMPLETIONS, "[" * (MAX_DEPTH + 2) + "]" * (MAX_DEPTH + 2), 400, "invalid_json"),
        ("POST", COMPLETIONS, b"\xff\xfe", 400, "invalid_json"),
        ("POST", COMPLETIONS, b'\xef\xbb\xbf{"prompt": "x"}', 400, "invalid_json"),
        ("POST", COMPLETIONS, '{"prompt": "\\ud800"}', 400, "invalid_json"),
        ("POST", COMPLETIONS, '{"prompt": "x", "\\udfff": 1}', 400, "invalid_json"),
        ("POST", COMPLETIONS, '{"prompt": "x", "prompt": "y"}', 400, "invalid_json"),
        ("POST", COMPLETIONS, '{"prompt": "x", "temperature": NaN}', 400, "invalid_json"),
        ("POST", COMPLETIONS, '{"prompt": "x", "temperature": 1e999}', 400, "invalid_json"),
        ("POST", COMPLETIONS, '{"prompt": "x", "seed": 1' + "0" * 30 + "}", 400, "invalid_json"),
        ("POST", COMPLETIONS, '{"prompt": "x", "seed": 1' + "0" * 9999 + "}", 400, "invalid_json"),
        ("POST", COMPLETIONS, json.dumps({**BODY, "model": "other"}), 404, "model_not_found"),
        ("POST", COMPLETIONS, json.dumps({**BODY, "suffix": "x"}), 400, "unsupported_parameter"),
        ("POST", COMPLETIONS, json.dumps({**BODY, "prompt": "x" * 70}), 400, "context_length_exceeded"),
        ("POST", COMPLETIONS, " " * (MAX_BODY_BYTES + 1), 413, "request_too_large"),
        ("GET", COMPLETIONS, "", 405, "method_not_allowed"),
        ("GET", "/v1/nothing", "", 404, "not_found"),
        ("GET", "/v1/models/%00", "", 404, "model_not_found"),
        ("GET", "/v1/models/%ff", "", 404, "model_not_found"),
        ("GET", "/docs", "", 404, "not_found"),
        ("OPTIONS", COMPLETIONS, "", 405, "method_not_allowed"),
    ],
)  # fmt: skip
def test_bad_input_is_answered_in_openai_shape(
    site: Site, method: str, path: str, content: str | bytes, status: int, code: str
) -> None:
    before = len(site.engine.requests)
    response = site.ask(method, path, content=content)
    error = response.json()["error"]
    assert (response.status_code, error["code"]) == (status, code)
    assert set(error) == {"message", "type", "param", "code"}
    assert error["type"] == "invalid_request_error"
    assert len(site.engine.requests) == before


@pytest.mark.parametrize(
    ("method", "path", "content", "status"),
    [
        ("POST", "/api/generate", "{", 400),
        ("POST", "/api/generate", '{"model": "other", "prompt": "x"}', 404),
        ("POST", "/api/generate", '{"model": "fake", "prompt": "x", "suffix": "y"}', 400),
        ("POST", "/api/generate", " " * (MAX_BODY_BYTES + 1), 413),
        ("DELETE", "/api/delete", "", 404),
        ("DELETE", TAGS, "", 405),
    ],
)
def test_bad_input_is_answered_in_ollama_shape(site: Site, method: str, path: str, content: str, status: int) -> None:
    response = site.ask(method, path, content=content)
    assert response.status_code == status
    assert set(response.json()) == {"error"}
    assert isinstance(response.json()["error"], str)


@pytest.mark.parametrize("kind", ["application/json", "application/x-www-form-urlencoded", "text/plain", None])
def test_a_body_is_json_whatever_it_is_declared_to_be(site: Site, kind: str | None) -> None:
    headers = {"content-type": kind} if kind else {}
    assert site.ask("POST", COMPLETIONS, content=json.dumps(BODY), headers=headers).status_code == 200


def test_undeclared_length_is_counted(site: Site) -> None:
    async def chunks() -> AsyncIterator[bytes]:
        for _ in range(20):
            yield b" " * (MAX_BODY_BYTES // 10)

    response = site.ask("POST", COMPLETIONS, content=chunks())
    assert (response.status_code, response.json()["error"]["code"]) == (413, "request_too_large")


def test_no_value_is_repeated_in_an_error(site: Site) -> None:
    bad = {"prompt": {"secret": "secret"}, "stop": {"secret": 1}, "logit_bias": {"secret": 1}, "stream": "secret"}
    assert "secret" not in site.post(COMPLETIONS, bad).text
    message = {"role": "secret", "content": "secret", "tool_calls": [{"function": {"name": "secret!"}}]}
    assert "secret" not in site.post("/api/chat", {"model": "fake", "messages": [message]}).text


def test_many_problems_are_told_shortly() -> None:
    problems = [{"type": "int_type", "loc": ("body", "tokens", number), "msg": "wrong"} for number in range(1000)]
    message = invalid_body(problems)["error"]["message"]
    assert message.startswith("tokens[0]: wrong; tokens[1]: wrong; ")
    assert message.endswith("; and 992 more")


def test_every_response_has_an_id_and_none_a_cors_header() -> None:
    site = Site(FakeEngine(says("x")))
    answers = [site.ask("GET", path, headers={"origin": "http://test"}) for path in ("/healthz", TAGS, "/nothing")]
    site.engine.submit = None  # type: ignore[method-assign, assignment]
    answers.append(site.post(COMPLETIONS, BODY))
    assert [answer.status_code for answer in answers] == [200, 200, 404, 500]
    assert all(answer.headers["x-request-id"].startswith("req-") for answer in answers)
    assert len({answer.headers["x-request-id"] for answer in answers}) == 4
    assert not any(name.startswith("access-control") for answer in answers for name in answer.headers)


@pytest.mark.parametrize("path", GENERATING)
def test_unexpected_error_keeps_its_details_to_itself(path: str) -> None:
    site = Site(FakeEngine())
    site.engine.submit = None  # type: ignore[method-assign, assignment]
    response = site.post(path, GENERATING[path])
    assert response.status_code == 500
    assert "unexpected error" in response.text
    assert "NoneType" not in response.text
    assert site.models.leases == 0


@pytest.mark.parametrize("path", GENERATING)
def test_full_queue_says_when_to_come_back(path: str) -> None:
    site = Site(FakeEngine())
    site.engine.refusal = QueueFull("Full.", retry_after_seconds=7)
    response = site.post(path, {**GENERATING[path], "stream": True})
    assert (response.status_code, response.headers["retry-after"]) == (503, "7")
    assert site.refusals("queue_full") == 1
    assert site.models.leases == 0


def test_refusals_are_counted_and_failures_are_not() -> None:
    site = Site(FakeEngine())
    site.post(COMPLETIONS, {})
    site.ask("POST", COMPLETIONS, content="{")
    site.engine.refusal = RequestError("No.")
    site.post(COMPLETIONS, BODY)
    site.engine.refusal = EngineFailed("Gone.")
    assert site.post(COMPLETIONS, BODY).status_code == 500
    assert site.refusals("invalid") == 3
    assert site.refusals("other") == 0


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("path", GENERATING)
def test_client_that_goes_away_frees_its_place(path: str, stream: bool) -> None:
    site = Site(FakeEngine())
    site.leave(path, {**GENERATING[path], "stream": stream})
    assert (site.engine.cancelled, site.engine.running, site.models.leases) == (1, 0, 0)


def test_health_and_greeting() -> None:
    site = Site(FakeEngine())
    assert site.ask("GET", "/").text == "appliance is running"
    assert site.ask("HEAD", "/").status_code == 200
    assert site.ask("GET", "/healthz").json() == {"status": "ok"}
    assert site.ask("GET", "/readyz").json() == {"status": "ready", "running": 0, "waiting": 0, "slots": 2}
    assert site.ask("GET", "/health").json() == {"status": "ok"}
    site.models.documents = DocumentCounts(known=3, waiting=1)
    counts = {"known": 3, "waiting": 1, "refused": 0, "erased": 0, "unerased": 0}
    assert site.ask("GET", "/readyz").json()["documents"] == counts
    site.models.drain(1)
    assert (site.ask("GET", "/readyz").status_code, site.ask("GET", "/readyz").json()["status"]) == (503, "draining")
    assert site.ask("GET", "/health").json()["error"]["code"] == "engine_draining"
    assert site.ask("GET", "/healthz").status_code == 200
    assert site.ask("GET", "/metrics").headers["content-type"].startswith("text/plain; version=0.0.4")


def test_the_gate_answers_in_the_shape_of_the_path() -> None:
    gate = gate_for(Serve(), "127.0.0.1", 8080, is_keyless_allowed=True)
    site = Site(FakeEngine(), gate=gate)
    openai, ollama = (site.ask("GET", path, headers={"host": "evil.example"}) for path in ("/v1/models", TAGS))
    assert (openai.status_code, openai.json()["error"]["code"]) == (403, "not_allowed")
    assert openai.headers["x-request-id"]
    assert (ollama.status_code, type(ollama.json()["error"])) == (403, str)
    assert site.refusals("forbidden") == 2
    assert site.ask("GET", "/v1/models", headers={"host": "localhost:8080"}).status_code == 200
