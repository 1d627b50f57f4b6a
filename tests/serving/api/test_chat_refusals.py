"""What POST /v1/chat/completions refuses, and that the error says which field is at fault."""

from typing import Any

import pytest

from appliance.serving.api.chat_schema import MAX_MESSAGES, MAX_TEXT_CHARACTERS
from appliance.serving.api.fields import MAX_CHOICES, MAX_GRAMMAR_BYTES, MAX_STOPS
from appliance.serving.api.tools import MAX_TOOLS
from appliance.text.passages import MOST_DOCUMENTS
from tests.serving.api.site import TOOL, USER, Site
from tests.serving.api.site import ask_chat as ask
from tests.serving.fakes import FakeEngine, says


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"messages": []}, "messages"),
        ({"messages": [{"role": "user"}]}, "messages[0].content"),
        ({"messages": [{"role": "user", "content": 7}]}, "messages[0].content"),
        ({"response_format": {"type": "json_schema", "json_schema": {"name": 7}}}, "response_format.json_schema.name"),
        ({"messages": [{"role": "judge", "content": "x"}]}, "messages[0]"),
        ({"messages": [{"content": "x"}]}, "messages[0]"),
        ({"messages": [USER] * (MAX_MESSAGES + 1)}, "messages"),
        ({"messages": [{"role": "tool", "content": "x"}]}, "messages[0].tool_call_id"),
        ({"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {}}]}]}, "messages[0].content"),
        ({"documents": [{"id": "", "text": "x"}]}, "documents[0].id"),
        ({"documents": [{"id": "a", "text": ""}]}, "documents[0].text"),
        ({"documents": [{"id": "a"}]}, "documents[0].text"),
        ({"documents": [{"id": "a", "text": "x", "url": "y"}]}, "documents[0].url"),
        ({"documents": [{"id": "a", "text": "x", "score": "high"}]}, "documents[0].score"),
        ({"documents": [{"id": "a", "text": "x", "score": 1.7e308}]}, "documents[0].score"),
        ({"documents": [{"id": str(at), "text": "x"} for at in range(MOST_DOCUMENTS + 1)]}, "documents"),
        ({"max_tokens": 0}, "max_tokens"),
        ({"max_tokens": "5"}, "max_tokens"),
        ({"temperature": 2.5}, "temperature"),
        ({"top_p": 0}, "top_p"),
        ({"seed": 2**63}, "seed"),
        ({"logit_bias": {"1": 101}}, "logit_bias"),
        ({"logit_bias": {"x": 1}}, "logit_bias"),
        ({"stop": ""}, "stop"),
        ({"stop": ["a"] * (MAX_STOPS + 1)}, "stop"),
        ({"n": MAX_CHOICES + 1}, "n"),
        ({"stream": "yes"}, "stream"),
        ({"top_logprobs": 21, "logprobs": True}, "top_logprobs"),
        ({"tools": [{"type": "web_search"}]}, "tools[0].type"),
        ({"tools": [TOOL] * (MAX_TOOLS + 1)}, "tools"),
        ({"tools": [{"type": "function", "function": {"name": "a b"}}]}, "tools[0].function.name"),
        (
            {"tools": [{"type": "function", "function": {"name": "a", "parameters": {"type": "string"}}}]},
            "tools[0].function.parameters",
        ),
        ({"tool_choice": "maybe"}, "tool_choice"),
        ({"response_format": {"type": "xml"}}, "response_format"),
        ({"response_format": {"type": "json_schema"}}, "response_format.json_schema"),
        ({"grammar": {"type": "regex", "value": {}}}, "grammar"),
        ({"grammar": {"type": "regex", "value": "a" * (MAX_GRAMMAR_BYTES + 1)}}, "grammar.value"),
        ({"reasoning_effort": "extreme"}, "reasoning_effort"),
        ({"chat_template_kwargs": {"a b": 1}}, "chat_template_kwargs"),
        ({"deadline_seconds": 0}, "deadline_seconds"),
        ({"store": True}, "store"),
        ({"functions": [{}]}, "functions"),
        ({"whatever": 1}, "whatever"),
        ({"tool_choice": "required"}, "tool_choice"),
        ({"reasoning_effort": "low"}, "reasoning_effort"),
    ],
)  # fmt: skip
def test_wrong_values_are_named(fields: dict[str, Any], param: str) -> None:
    site = Site(FakeEngine(says("x")))
    response = ask(site, **fields)
    assert response.status_code == 400
    assert response.json()["error"]["param"] == param
    assert site.engine.requests == []


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"messages": [USER, {"role": "assistant", "content": "x"}]}, "last message"),
        ({"messages": [{"role": "user", "content": "x" * (MAX_TEXT_CHARACTERS + 1)}]}, str(MAX_TEXT_CHARACTERS)),
        ({"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}, "no images"),
        ({"stream_options": {"include_usage": True}}, "stream is true"),
        ({"max_tokens": 1, "max_completion_tokens": 2}, "differ"),
        ({"top_logprobs": 1}, "logprobs is true"),
        ({"tools": [TOOL, TOOL]}, "same name"),
        ({"grammar": {"type": "regex", "value": "a"}, "response_format": {"type": "json_object"}}, "both bind"),
    ],
)
def test_contradictions_are_explained(fields: dict[str, Any], said: str) -> None:
    response = ask(Site(FakeEngine(says("x"))), **fields)
    assert response.status_code == 400
    assert said in response.json()["error"]["message"]


def test_no_value_is_repeated_in_an_error() -> None:
    message = {"role": "secret", "content": [{"type": "secret"}]}
    assert "secret" not in ask(Site(FakeEngine()), messages=[message], stop={"secret": 1}, tool_choice="secret").text


@pytest.mark.parametrize(
    ("documents", "said"),
    [
        ([("a", "x"), ("b", "y"), ("a", "z")], "documents[2] has the id of documents[0]"),
        ([("a", "x"), ("b", " x\n")], "documents[1] has the text of documents[0]"),
        ([("a", "x"), ("b", " \n")], "documents[1] is empty"),
        ([("a", "x" * MAX_TEXT_CHARACTERS)], "longer than the limit"),
    ],
)
def test_documents_that_say_nothing_new(documents: list[tuple[str, str]], said: str) -> None:
    response = ask(Site(FakeEngine(says("x"))), documents=[{"id": name, "text": text} for name, text in documents])
    assert response.status_code == 400
    assert said in response.json()["error"]["message"]
