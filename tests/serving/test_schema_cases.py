"""Requests made from our own OpenAPI document, right and wrong ones, are never answered 5xx, and always as documented.

The engine is a fake one: what is tested is how requests are read and answers are written.
"""

import asyncio
from collections import Counter
from typing import Any

import httpx
import msgspec
import pytest
import schemathesis
from hypothesis import HealthCheck, Phase, given, settings
from schemathesis import Case, GenerationMode
from schemathesis.checks import not_a_server_error
from schemathesis.schemas import APIOperation
from schemathesis.specs.openapi.checks import (
    content_type_conformance,
    response_schema_conformance,
    status_code_conformance,
)

from appliance.serving.events import Event
from appliance.serving.requests import ChatPrompt, GenerationRequest
from tests.serving.api.site import Site
from tests.serving.fakes import THINKING_MODEL, FakeEngine, says

MODEL = msgspec.structs.replace(THINKING_MODEL, vocabulary_tokens=256)  # the fake engine's tokens are bytes
QUICK_CASES, ALL_CASES = 1_000, 10_000
STREAMED = ("/v1/chat/completions", "/v1/completions", "/v1/responses")  # when asked to
CHECKS = [not_a_server_error, status_code_conformance, content_type_conformance, response_schema_conformance]


def answers(request: GenerationRequest) -> list[Event]:
    """Something for each answer; a call when there are tools."""
    call = '<tool_call>\n{"name": "f", "arguments": {}}\n</tool_call>'
    text = call if isinstance(request.prompt, ChatPrompt) and request.prompt.tools else "{}"
    return [event for index in range(request.n) for event in says("Hm. ", text, index=index)]


@pytest.mark.parametrize("cases", [QUICK_CASES, pytest.param(ALL_CASES, marks=pytest.mark.slow)])
def test_no_request_is_answered_with_a_server_error(cases: int) -> None:
    site = Site(FakeEngine(answers, model=MODEL))
    schema = schemathesis.openapi.from_dict(site.app.openapi())
    operations = [result.ok() for result in schema.get_all_operations()]
    posted = [operation for operation in operations if operation.body]
    each = -(-cases // (2 * len(posted)))
    visitor = Visitor(site)
    for operation in operations:
        visitor.visit(operation, GenerationMode.POSITIVE, each)
        if operation in posted:
            visitor.visit(operation, GenerationMode.NEGATIVE, each)
    visitor.close()
    assert visitor.statuses.total() >= cases
    assert visitor.statuses[200] > cases / 10
    assert visitor.statuses[400] > cases / 10
    assert (site.models.leases, site.engine.running) == (0, 0)


class Visitor:
    """Sends the cases, in one event loop: a new one for each would take most of the time."""

    def __init__(self, site: Site) -> None:
        self.statuses = Counter[int]()
        self._runner = asyncio.Runner()
        transport = httpx.ASGITransport(site.app)
        self._client = httpx.AsyncClient(transport=transport, base_url="http://test")

    def visit(self, operation: APIOperation, mode: GenerationMode, count: int) -> None:
        @given(case=operation.as_strategy(generation_mode=mode))
        @settings(
            max_examples=count,
            deadline=None,
            database=None,
            derandomize=True,
            phases=[Phase.generate],
            suppress_health_check=list(HealthCheck),
        )
        def try_all(case: Case) -> None:
            self._try(case)

        try_all()

    def close(self) -> None:
        self._runner.run(self._client.aclose())
        self._runner.close()

    def _try(self, case: Case) -> None:
        if isinstance(case.body, dict) and isinstance(case.body.get("model"), str):
            case.body["model"] = MODEL.name  # a made-up name would be answered 404, whatever else is asked
        if isinstance(case.body, dict) and case.path in STREAMED and self.statuses.total() % 2:
            case.body["stream"] = True
        request: dict[str, Any] = case.as_transport_kwargs(base_url="http://test")
        del request["cookies"]
        if isinstance(request.get("data"), bytes):
            request["content"] = request.pop("data")
        response = self._runner.run(self._client.request(**request))
        self.statuses[response.status_code] += 1
        case.validate_response(response, checks=CHECKS)
