"""What a chat request may say, and what is said about one that may not."""

from typing import Any

import pytest
from pydantic import ValidationError

from appliance.serving.engine import Finished, SamplingSettings
from appliance.serving.openai import Answer, ChatRequest, invalid_body
from tests.serving.fakes import MODEL

USER = {"role": "user", "content": "hi"}


def request(**fields: Any) -> ChatRequest:
    return ChatRequest.model_validate({"model": "m", "messages": [USER], **fields})


def refusal(body: Any) -> dict[str, Any]:
    with pytest.raises(ValidationError) as error:
        ChatRequest.model_validate(body)
    problems = [{**each, "loc": ("body", *each["loc"])} for each in error.value.errors()]
    answer: dict[str, Any] = invalid_body(problems)["error"]
    return answer


def test_defaults_are_greedy() -> None:
    assert request().sampling() == SamplingSettings(temperature=0.0)
    assert (request().answer_tokens, request().stops, request().wants_usage) == (None, (), False)


def test_everything_supported_is_honoured() -> None:
    full = request(
        max_completion_tokens=7,
        temperature=1,
        top_p=0.5,
        top_k=3,
        min_p=0.1,
        seed=-4,
        stop=["a", "b"],
        stream=True,
        stream_options={"include_usage": True},
        n=1,
        user="u",
        metadata={"k": "v"},
        presence_penalty=0.5,
        frequency_penalty=-0.5,
    )
    assert full.sampling() == SamplingSettings(
        temperature=1.0, top_p=0.5, top_k=3, min_p=0.1, presence_penalty=0.5, frequency_penalty=-0.5, seed=-4
    )
    assert (full.answer_tokens, full.stops, full.wants_usage) == (7, ("a", "b"), True)
    assert request(stop="a").stops == ("a",)


def test_null_and_fields_that_ask_for_nothing_are_accepted() -> None:
    request(max_tokens=None, tools=[], logprobs=False, response_format={"type": "text"}, stream_options=None)


def test_parts_and_roles_become_plain_messages() -> None:
    parts = [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]
    messages = request(messages=[{"role": "developer", "content": "s"}, {"role": "user", "content": parts}]).messages
    assert [message.plain() for message in messages] == [
        {"role": "system", "content": "s"},
        {"role": "user", "content": "ab"},
    ]


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"tools": [{"type": "function"}]}, "tools"),
        ({"response_format": {"type": "json_object"}}, "response_format"),
        ({"logprobs": True}, "logprobs"),
        ({"best_of": 2}, "best_of"),
        ({"messages": [{**USER, "name": "x"}]}, "messages[0].name"),
    ],
)
def test_unsupported_fields_are_named(fields: dict[str, Any], param: str) -> None:
    error = refusal({"model": "m", "messages": [USER], **fields})
    assert (error["code"], error["param"]) == ("unsupported_parameter", param)
    assert "not support" in error["message"]


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"model": 3}, "model"),
        ({"messages": []}, "messages"),
        ({"messages": "hi"}, "messages"),
        ({"messages": [{"role": "user"}]}, "messages[0].content"),
        ({"messages": [{"role": "user", "content": 3}]}, "messages[0].content"),
        ({"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}, "messages[0].content"),
        ({"messages": [{"role": "tool", "content": "x"}]}, "messages[0].role"),
        ({"messages": [{"role": "user", "content": "\ud800"}]}, "messages[0].content"),
        ({"max_tokens": 0}, "max_tokens"),
        ({"max_tokens": "5"}, "max_tokens"),
        ({"max_tokens": True}, "max_tokens"),
        ({"temperature": 2.5}, "temperature"),
        ({"temperature": float("nan")}, "temperature"),
        ({"top_p": 0}, "top_p"),
        ({"seed": 2**64}, "seed"),
        ({"stop": ""}, "stop"),
        ({"stop": ["a"] * 17}, "stop"),
        ({"stop": [1]}, "stop"),
        ({"n": 2}, "n"),
        ({"stream": "yes"}, "stream"),
        ({"stream_options": {"include_usage": 1}, "stream": True}, "stream_options.include_usage"),
    ],
)
def test_wrong_values_are_named(fields: dict[str, Any], param: str) -> None:
    error = refusal({"model": "m", "messages": [USER], **fields})
    assert error["type"] == "invalid_request_error"
    assert error["param"].partition("[")[0] == param.partition("[")[0]
    assert param.rpartition("]")[2] in error["param"]


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"messages": [USER, {"role": "assistant", "content": "x"}]}, "last message"),
        ({"stream_options": {"include_usage": True}}, "stream is true"),
        ({"max_tokens": 1, "max_completion_tokens": 2}, "differ"),
    ],
)
def test_contradictions_are_explained(fields: dict[str, Any], said: str) -> None:
    error = refusal({"model": "m", "messages": [USER], **fields})
    assert said in error["message"]


@pytest.mark.parametrize("body", [None, 3, [], "secret"])
def test_a_body_that_is_no_object_is_refused(body: Any) -> None:
    assert refusal(body)["code"] == "invalid_request"


def test_no_value_is_repeated_in_an_error() -> None:
    error = refusal({"model": "m", "messages": [{"role": "secret", "content": 1}], "stop": {"secret": 1}})
    assert "secret" not in str(error)


def test_bodies() -> None:
    finished = Finished(reason="stop", prompt_tokens=3, generated_tokens=2)
    answer = Answer("chatcmpl-1", 17, MODEL, with_usage=True)
    head = {"id": "chatcmpl-1", "created": 17, "model": "fake", "system_fingerprint": "fp_0123456789ab"}
    counts = {"prompt_tokens": 3, "completion_tokens": 2, "total_tokens": 5}
    message = {"role": "assistant", "content": "hi", "refusal": None}
    assert answer.whole("hi", finished) == {
        **head,
        "object": "chat.completion",
        "choices": [{"index": 0, "message": message, "logprobs": None, "finish_reason": "stop"}],
        "usage": counts,
    }
    assert answer.text_chunk("h") == {
        **head,
        "object": "chat.completion.chunk",
        "choices": [{"index": 0, "delta": {"content": "h"}, "logprobs": None, "finish_reason": None}],
        "usage": None,
    }
    assert answer.usage_chunk(finished)["choices"] == []
    assert answer.usage_chunk(finished)["usage"] == counts
