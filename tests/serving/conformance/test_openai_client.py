"""The official `openai` client, unmodified, against a running server. The model's answers are noise, their form is not."""

import asyncio
import json
import math
from collections.abc import Iterator
from typing import Any, Literal

import openai
import pytest
from openai.types.chat import ChatCompletion, ChatCompletionMessageParam, ChatCompletionToolParam
from pydantic import BaseModel

from tests.serving.conformance.served import CHAT, PER_MINUTE, RERANKER, VECTORS, Served

HELLO: list[ChatCompletionMessageParam] = [{"role": "user", "content": "hello"}]
TRIP = {
    "type": "object",
    "properties": {"city": {"enum": ["Oslo", "Rome"]}, "days": {"type": "integer", "minimum": 1, "maximum": 9}},
    "required": ["city", "days"],
    "additionalProperties": False,
}
TOOL: ChatCompletionToolParam = {"type": "function", "function": {"name": "plan_trip", "parameters": TRIP}}


class Trip(BaseModel):
    city: Literal["Oslo", "Rome"]
    is_long: bool


@pytest.fixture(scope="module")
def client(served: Served) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{served.url}/v1", api_key="none", max_retries=0, timeout=60) as client:
        yield client


def chat(client: openai.OpenAI, **fields: Any) -> ChatCompletion:
    answer = client.chat.completions.create(model=CHAT, messages=HELLO, **{"max_tokens": 20, **fields})
    assert isinstance(answer, ChatCompletion)
    return answer


def within(text: str) -> str:
    """A character that comes up after the first few."""
    return next(character for place, character in enumerate(text) if place > 2 and text.index(character) == place)


def require_trip(arguments: str) -> None:
    trip = json.loads(arguments)
    assert trip["city"] in ("Oslo", "Rome")
    assert trip["days"] in range(1, 10)


def test_chat(client: openai.OpenAI) -> None:
    answer = chat(client)
    (choice,) = answer.choices
    assert choice.message.role == "assistant"
    assert isinstance(choice.message.content, str)
    assert choice.finish_reason in ("stop", "length")
    assert answer.usage is not None
    assert answer.usage.completion_tokens <= 20
    assert answer.usage.total_tokens == answer.usage.prompt_tokens + answer.usage.completion_tokens
    assert (answer.object, answer.model) == ("chat.completion", CHAT)


@pytest.mark.parametrize(
    "fields", [{}, {"temperature": 1.5, "seed": 3}, {"stop": ["e", "a"]}, {"n": 2, "temperature": 1, "seed": 5}]
)
def test_stream_equals_plain_answer(client: openai.OpenAI, fields: dict[str, Any]) -> None:
    plain = chat(client, **fields)
    texts = dict.fromkeys(range(len(plain.choices)), "")
    reasons = {}
    stream = client.chat.completions.create(
        model=CHAT, messages=HELLO, max_tokens=20, stream=True, stream_options={"include_usage": True}, **fields
    )
    chunks = list(stream)
    for chunk in chunks[:-1]:
        assert chunk.usage is None
        for choice in chunk.choices:
            texts[choice.index] += choice.delta.content or ""
            reasons[choice.index] = choice.finish_reason
    assert list(texts.values()) == [choice.message.content for choice in plain.choices]
    assert list(reasons.values()) == [choice.finish_reason for choice in plain.choices]
    assert chunks[-1].choices == []
    assert chunks[-1].usage is not None
    assert plain.usage is not None
    assert chunks[-1].usage.completion_tokens == plain.usage.completion_tokens


def test_stream_helper(client: openai.OpenAI) -> None:
    stop = within(chat(client).choices[0].message.content or "")  # the helper raises for what max_tokens ended
    with client.chat.completions.stream(model=CHAT, messages=HELLO, max_tokens=20, stop=stop) as stream:
        kinds = {event.type for event in stream}
        final = stream.get_final_completion()
    assert {"chunk", "content.delta", "content.done"} <= kinds
    assert final.choices[0].message.content == chat(client, stop=stop).choices[0].message.content


def test_same_seed_same_text(client: openai.OpenAI) -> None:
    first, again, other = (
        chat(client, temperature=2.0, seed=seed, max_tokens=30).choices[0].message.content for seed in (1, 1, 2)
    )
    assert first == again != other


def test_stop_is_not_part_of_the_text(client: openai.OpenAI) -> None:
    text = chat(client).choices[0].message.content or ""
    stop = within(text)
    stopped = chat(client, stop=stop).choices[0]
    assert (stopped.message.content, stopped.finish_reason) == (text[: text.index(stop)], "stop")


def test_several_answers(client: openai.OpenAI) -> None:
    answer = chat(client, n=3, temperature=2.0, seed=1)
    assert [choice.index for choice in answer.choices] == [0, 1, 2]
    assert len({choice.message.content for choice in answer.choices}) == 3
    assert answer.usage is not None
    assert answer.usage.completion_tokens > 20


def test_logprobs(client: openai.OpenAI) -> None:
    choice = chat(client, logprobs=True, top_logprobs=3, max_tokens=5).choices[0]
    assert choice.logprobs is not None
    told = choice.logprobs.content or []
    assert 0 < len(told) <= 5
    for token in told:
        assert token.logprob <= 0
        assert len(token.top_logprobs) == 3
        assert token.top_logprobs[0].logprob == pytest.approx(token.logprob)  # greedy takes the likeliest
    spoken = b"".join(bytes(token.bytes or ()) for token in told).decode(errors="replace")
    assert (choice.message.content or "") in spoken


@pytest.mark.parametrize("choice", ["required", {"type": "function", "function": {"name": "plan_trip"}}])
def test_a_forced_tool_call_has_valid_arguments(client: openai.OpenAI, choice: Any) -> None:
    answer = chat(client, tools=[TOOL], tool_choice=choice, max_tokens=200, temperature=1, seed=1).choices[0]
    assert answer.finish_reason == "tool_calls"
    for call in answer.message.tool_calls or ():
        assert call.type == "function"
        assert call.function.name == "plan_trip"
        require_trip(call.function.arguments)
    assert answer.message.tool_calls


def test_a_streamed_tool_call_equals_the_whole_one(client: openai.OpenAI) -> None:
    fields: dict[str, Any] = {"tools": [TOOL], "tool_choice": "required", "max_tokens": 200}
    calls = chat(client, **fields).choices[0].message.tool_calls or []
    with client.chat.completions.stream(model=CHAT, messages=HELLO, **fields) as stream:
        streamed = stream.get_final_completion().choices[0].message.tool_calls or []
    told = [(call.function.name, call.function.arguments) for call in calls if call.type == "function"]
    assert [(call.function.name, call.function.arguments) for call in streamed] == told
    assert told


def test_tools_left_to_the_model_and_results_of_earlier_calls(client: openai.OpenAI) -> None:
    assert chat(client, tools=[TOOL]).choices[0].finish_reason in ("stop", "length", "tool_calls")
    earlier: list[ChatCompletionMessageParam] = [
        *HELLO,
        {
            "role": "assistant",
            "tool_calls": [
                {"id": "c1", "type": "function", "function": {"name": "plan_trip", "arguments": '{"city": "Oslo"}'}}
            ],
        },
        {"role": "tool", "tool_call_id": "c1", "content": "done"},
    ]
    answer = client.chat.completions.create(model=CHAT, messages=earlier, tools=[TOOL], max_tokens=5)
    assert answer.choices[0].message.role == "assistant"


def test_json_schema(client: openai.OpenAI) -> None:
    form = {"type": "json_schema", "json_schema": {"name": "trip", "schema": TRIP, "strict": True}}
    require_trip(chat(client, response_format=form, max_tokens=100).choices[0].message.content or "")
    parsed = client.chat.completions.parse(model=CHAT, messages=HELLO, response_format=Trip, max_tokens=100)
    assert isinstance(parsed.choices[0].message.parsed, Trip)


def test_completions(client: openai.OpenAI) -> None:
    answer = client.completions.create(model=CHAT, prompt=["one", "two"], max_tokens=8, logprobs=2, n=2, seed=1)
    assert [choice.index for choice in answer.choices] == [0, 1, 2, 3]
    told = answer.choices[0].logprobs
    assert told is not None
    assert told.tokens
    assert told.top_logprobs
    assert all(len(each) <= 2 for each in told.top_logprobs)
    plain = client.completions.create(model=CHAT, prompt="one", max_tokens=8, echo=True).choices[0].text
    stream = client.completions.create(model=CHAT, prompt="one", max_tokens=8, echo=True, stream=True)
    assert "".join(chunk.choices[0].text for chunk in stream) == plain
    assert plain.startswith("one")
    assert client.completions.create(model=CHAT, prompt=[10, 11], max_tokens=2).usage


def test_responses(client: openai.OpenAI) -> None:
    answer = client.responses.create(model=CHAT, input="hello", max_output_tokens=20, store=False)
    assert answer.object == "response"
    assert answer.status == "incomplete"  # noise does not end by itself
    assert isinstance(answer.output_text, str)
    assert answer.usage is not None
    events = list(client.responses.create(model=CHAT, input="hello", max_output_tokens=20, store=False, stream=True))
    assert (events[0].type, events[-1].type) == ("response.created", "response.incomplete")
    assert "".join(event.delta for event in events if event.type == "response.output_text.delta") == answer.output_text


def test_responses_bound_by_a_schema(client: openai.OpenAI) -> None:
    asked: dict[str, Any] = {"model": CHAT, "input": "hello", "text_format": Trip, "max_output_tokens": 100, "store": False}
    parsed = client.responses.parse(**asked)
    assert isinstance(parsed.output_parsed, Trip)
    with client.responses.stream(**asked) as stream:
        assert list(stream)[-1].type == "response.completed"
        assert stream.get_final_response().output_parsed == parsed.output_parsed


def test_embeddings(client: openai.OpenAI) -> None:
    answer = client.embeddings.create(model=VECTORS, input=["one", "two", "one"])
    vectors = [each.embedding for each in answer.data]
    assert vectors[0] == pytest.approx(vectors[2], abs=1e-5)
    assert vectors[0] != pytest.approx(vectors[1], abs=1e-5)
    assert math.hypot(*vectors[0]) == pytest.approx(1.0, abs=1e-4)
    numbers = client.embeddings.create(model=VECTORS, input="one", encoding_format="float")
    assert numbers.data[0].embedding == pytest.approx(vectors[0], abs=1e-5)
    assert numbers.usage.total_tokens > 0
    with pytest.raises(openai.BadRequestError, match="dimensions"):
        client.embeddings.create(model=VECTORS, input="one", dimensions=3)


def test_rerank(client: openai.OpenAI) -> None:
    asked = {"model": RERANKER, "query": "one", "documents": ["one", "two", "three"], "top_n": 2}
    answer = client.post("/rerank", body=asked, cast_to=dict[str, Any])
    scores = [each["relevance_score"] for each in answer["results"]]
    assert scores == sorted(scores, reverse=True)
    assert len(scores) == 2


def test_models(client: openai.OpenAI) -> None:
    assert [model.id for model in client.models.list()] == [CHAT, VECTORS, RERANKER]
    assert client.models.retrieve(VECTORS).object == "model"
    with pytest.raises(openai.NotFoundError):
        client.models.retrieve("other")


def test_async_client_and_departure(served: Served) -> None:
    async def go() -> str:
        async with openai.AsyncOpenAI(base_url=f"{served.url}/v1", api_key="none", max_retries=0) as client:
            stream = await client.chat.completions.create(
                model=CHAT, messages=HELLO, max_tokens=900, temperature=1, stream=True, logit_bias=served.endless
            )
            async for chunk in stream:
                if chunk.choices and chunk.choices[0].delta.content:
                    break
            await stream.close()
            answer = await client.chat.completions.create(model=CHAT, messages=HELLO, max_tokens=4)
            return answer.choices[0].message.content or ""

    assert isinstance(asyncio.run(go()), str)
    served.until_idle()


def test_wrong_requests_have_the_clients_own_errors(client: openai.OpenAI) -> None:
    with pytest.raises(openai.BadRequestError, match="temperature") as bad:
        chat(client, temperature=9)
    assert (bad.value.param, bad.value.type) == ("temperature", "invalid_request_error")
    assert bad.value.request_id is not None
    with pytest.raises(openai.BadRequestError) as unknown:
        chat(client, extra_body={"no_such_field": 1})
    assert (unknown.value.code, unknown.value.param) == ("unsupported_parameter", "no_such_field")
    with pytest.raises(openai.BadRequestError) as long:
        client.completions.create(model=CHAT, prompt="x" * 5000)
    assert long.value.code == "context_length_exceeded"
    with pytest.raises(openai.NotFoundError) as missing:
        client.chat.completions.create(model="other", messages=HELLO)
    assert missing.value.code == "model_not_found"


def test_a_full_queue_is_an_error_that_clients_retry(busy: Served) -> None:
    """One slot, no queue: the second request is told when to come back."""
    with openai.OpenAI(base_url=f"{busy.url}/v1", api_key="none", max_retries=0, timeout=60) as client:
        running = client.chat.completions.create(
            model=CHAT, messages=HELLO, max_tokens=900, temperature=1, stream=True, logit_bias=busy.endless
        )
        with running:
            next(iter(running))
            with pytest.raises(openai.InternalServerError) as full:
                chat(client)
    assert full.value.status_code == 503
    assert full.value.code == "queue_full"
    assert int(full.value.response.headers["retry-after"]) >= 1
    busy.until_idle()


def test_keys(keyed: Served) -> None:
    def ask(key: str) -> Any:
        with openai.OpenAI(base_url=f"{keyed.url}/v1", api_key=key, max_retries=0, timeout=60) as client:
            return client.models.list().data[0].id

    with pytest.raises(openai.AuthenticationError):
        ask("wrong")
    with pytest.raises(openai.PermissionDeniedError):
        ask(keyed.keys["metrics"])
    assert ask(keyed.keys["chat"]) == CHAT
    for _ in range(PER_MINUTE - 1):
        ask(keyed.keys["chat"])
    with pytest.raises(openai.RateLimitError) as limited:
        ask(keyed.keys["chat"])
    assert int(limited.value.response.headers["retry-after"]) >= 1
