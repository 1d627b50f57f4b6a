"""POST /v1/chat/completions over a fake engine: what is asked of it, bodies, streams, and the `openai` client."""

import asyncio
import itertools
import json
from collections.abc import Callable
from typing import Any

import httpx
import openai
import pytest
from hypothesis import given
from hypothesis import strategies as st

from appliance.errors import QueueFull
from appliance.serving import sse
from appliance.serving.events import Event, Finished, TextPiece, TokenLogprob
from appliance.serving.requests import ChatPrompt, Document
from tests.serving.api.site import CHAT, TOOL, USER, Site
from tests.serving.api.site import ask_chat as ask
from tests.serving.fakes import THINKING_MODEL, FakeEngine, breaks, ends, says

TOOL_CALL = {"id": "c1", "type": "function", "function": {"name": "time", "arguments": "{}"}}
CALLED = '<tool_call>\n{"name": "time", "arguments": {"zone": "é"}}\n</tool_call>'


def chunks(response: httpx.Response) -> list[dict[str, Any]]:
    return list(sse.decode(response.text.split("\n")))


def with_client(site: Site, work: Callable[[openai.AsyncOpenAI], Any]) -> Any:
    async def go() -> Any:
        transport = httpx.ASGITransport(site.app)
        async with (
            httpx.AsyncClient(transport=transport) as http,
            openai.AsyncOpenAI(base_url="http://test/v1", api_key="x", http_client=http, max_retries=0) as client,
        ):
            return await work(client)

    return asyncio.run(asyncio.wait_for(go(), timeout=20))


def test_usage_says_how_documents_were_read() -> None:
    end = Finished(
        reason="stop", prompt_tokens=50, generated_tokens=1, cached_tokens=40, stitched_tokens=30, documents="stitched"
    )
    engine = FakeEngine([TextPiece(text="Yes."), end])
    body = ask(Site(engine), documents=[{"id": "a", "text": "x", "score": 0.5}, {"id": "b", "text": "y"}]).json()
    assert body["usage"]["prompt_tokens_details"] == {
        **{"cached_tokens": 40, "reading": "stitched"},
        **{"computed_tokens": 10, "restored_tokens": 10, "stitched_tokens": 30},
    }
    (request,) = engine.requests
    assert isinstance(request.prompt, ChatPrompt)
    assert request.prompt.documents == (Document(id="a", text="x", score=0.5), Document(id="b", text="y"))


def test_usage_of_several_answers_is_that_of_the_first_which_read_the_prompt() -> None:
    told = {"reason": "stop", "prompt_tokens": 50, "generated_tokens": 1, "documents": "stitched"}
    first = Finished(**told, cached_tokens=40, stitched_tokens=30)
    second = Finished(**told, cached_tokens=49, index=1)
    body = ask(Site(FakeEngine([second, first])), n=2, documents=[{"id": "a", "text": "x"}]).json()
    details = body["usage"]["prompt_tokens_details"]
    assert (details["cached_tokens"], details["stitched_tokens"], details["computed_tokens"]) == (40, 30, 10)


def test_plain_answer() -> None:
    site = Site(FakeEngine(says("Hel", "lo.")))
    body = ask(site).json()
    assert body.pop("id").startswith("chatcmpl-")
    assert isinstance(body.pop("created"), int)
    message = {"role": "assistant", "content": "Hello.", "refusal": None}
    assert body == {
        "object": "chat.completion",
        "model": "fake",
        "system_fingerprint": "fp_0123456789ab",
        "choices": [{"index": 0, "message": message, "logprobs": None, "finish_reason": "stop"}],
        "usage": {
            "prompt_tokens": 5,
            "completion_tokens": 3,
            "total_tokens": 8,
            "prompt_tokens_details": {"cached_tokens": 0},
            "completion_tokens_details": {"reasoning_tokens": 0},
        },
    }
    assert site.engine.requests[0].max_tokens == 33
    assert site.models.leases == 0


def test_streamed_answer() -> None:
    response = ask(Site(FakeEngine(says("Hel", "lo."))), stream=True)
    assert response.headers["content-type"].startswith("text/event-stream")
    assert response.text.endswith("data: [DONE]\n\n")
    told = chunks(response)
    assert all(chunk["object"] == "chat.completion.chunk" and chunk["id"] == told[0]["id"] for chunk in told)
    assert all("usage" not in chunk for chunk in told)
    choices = [chunk["choices"][0] for chunk in told]
    assert [choice["delta"] for choice in choices] == [
        {"role": "assistant", "content": ""},
        {"content": "Hel"},
        {"content": "lo."},
        {},
    ]
    assert [choice["finish_reason"] for choice in choices] == [None, None, None, "stop"]


def test_usage_comes_last_when_asked_for() -> None:
    told = chunks(ask(Site(FakeEngine(says("x"))), stream=True, stream_options={"include_usage": True}))
    assert told[-1]["choices"] == []
    assert told[-1]["usage"]["total_tokens"] == 7
    assert all(chunk["usage"] is None for chunk in told[:-1])


def test_everything_that_is_asked_reaches_the_engine() -> None:
    site = Site(FakeEngine(lambda asked: [ends(index=i) for i in range(asked.n)], model=THINKING_MODEL))
    earlier = {"role": "assistant", "content": None, "reasoning_content": "Hm.", "tool_calls": [TOOL_CALL], "refusal": None}
    fields: dict[str, Any] = {
        "messages": [
            {"role": "developer", "content": [{"type": "text", "text": "Be "}, {"type": "text", "text": "brief."}]},
            {"role": "user", "content": "hi", "name": "Ann"},
            earlier,
            {"role": "tool", "tool_call_id": "c1", "content": "noon"},
        ],
        "temperature": 0.5, "top_p": 0.9, "top_k": 7, "min_p": 0.1, "presence_penalty": 1, "frequency_penalty": -1,
        "repeat_penalty": 1.1, "seed": 3, "logit_bias": {"17": -100, "18": 2.5}, "stop": ["end"], "n": 2,
        "max_completion_tokens": 4, "logprobs": True, "top_logprobs": 2, "tools": [TOOL], "tool_choice": "auto",
        "chat_template_kwargs": {"enable_thinking": False}, "deadline_seconds": 2, "ignore_eos": True,
        "user": "u", "metadata": {"a": "b"}, "store": False, "service_tier": "auto", "parallel_tool_calls": True,
    }  # fmt: skip
    assert ask(site, **fields).status_code == 200
    asked = site.engine.requests[0]
    assert isinstance(asked.prompt, ChatPrompt)
    assert asked.prompt.messages == (
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "hi", "name": "Ann"},
        {"role": "assistant", "content": "", "reasoning_content": "Hm.", "tool_calls": [TOOL_CALL]},
        {"role": "tool", "content": "noon", "tool_call_id": "c1"},
    )
    assert asked.prompt.tools == (TOOL,)
    assert asked.prompt.template_variables == {"enable_thinking": False}
    sampling = asked.sampling
    assert (sampling.temperature, sampling.top_p, sampling.top_k, sampling.min_p) == (0.5, 0.9, 7, 0.1)
    assert (sampling.presence_penalty, sampling.frequency_penalty, sampling.repeat_penalty) == (1, -1, 1.1)
    assert (sampling.seed, sampling.logit_bias) == (3, {17: -100, 18: 2.5})
    assert (asked.stop, asked.n, asked.max_tokens, asked.top_logprobs, asked.ignore_end) == (("end",), 2, 4, 2, True)
    assert asked.deadline_at == asked.arrived_at + 2
    assert asked.grammar is not None


def test_null_is_the_same_as_nothing() -> None:
    site = Site(FakeEngine(says("x")))
    optional = (
        "temperature",
        "tools",
        "tool_choice",
        "stop",
        "seed",
        "n",
        "stream_options",
        "logit_bias",
        "response_format",
    )
    assert ask(site, **dict.fromkeys(optional)).status_code == 200
    assert site.engine.requests[0].sampling.temperature == 0


@pytest.mark.parametrize(
    ("fields", "kind", "said"),
    [
        ({"response_format": {"type": "json_object"}}, "lark", '"type": "object"'),
        (
            {"response_format": {"type": "json_schema", "json_schema": {"name": "a", "schema": {"type": "integer"}}}},
            "lark",
            "integer",
        ),
        ({"grammar": {"type": "json_schema", "value": {"type": "integer"}}}, "lark", "integer"),
        ({"grammar": {"type": "regex", "value": "a+"}}, "regex", "a+"),
        ({"grammar": {"type": "gbnf", "value": 'root ::= "a"'}}, "gbnf", "root"),
    ],
)
def test_structured_answers(fields: dict[str, Any], kind: str, said: str) -> None:
    site = Site(FakeEngine(says("{}")))
    assert ask(site, **fields).status_code == 200
    grammar = site.engine.requests[0].grammar
    assert grammar is not None
    assert grammar.kind == kind
    assert said in grammar.source
    site.engine.requests.clear()
    ask(site, response_format={"type": "text"})
    assert site.engine.requests[0].grammar is None


def test_reasoning_and_calls() -> None:
    site = Site(FakeEngine(says("<think>Hm.</think>\nI look. ", CALLED), model=THINKING_MODEL))
    body = ask(site, tools=[TOOL]).json()
    (choice,) = body["choices"]
    (call,) = choice["message"].pop("tool_calls")
    assert call.pop("id").startswith("call_")
    assert call == {"type": "function", "function": {"name": "time", "arguments": '{"zone": "é"}'}}
    assert choice["message"]["content"] == "I look."
    assert choice["message"]["reasoning_content"] == "Hm."
    assert choice["finish_reason"] == "tool_calls"
    assert body["usage"]["completion_tokens_details"] == {"reasoning_tokens": 3}
    assert ask(Site(FakeEngine(says(CALLED))), tools=[TOOL]).json()["choices"][0]["message"]["content"] is None


def test_logprobs() -> None:
    told = TokenLogprob(piece=b"\xc3", logprob=-0.5, top=((b"\xc3", -0.5), (b"b", -1.5)))
    site = Site(FakeEngine([TextPiece(text="", logprobs=(told,)), TextPiece(text="é"), ends()]))
    expected = {
        "token": "�",
        "logprob": -0.5,
        "bytes": [195],
        "top_logprobs": [
            {"token": "�", "logprob": -0.5, "bytes": [195]},
            {"token": "b", "logprob": -1.5, "bytes": [98]},
        ],
    }
    body = ask(site, logprobs=True, top_logprobs=2).json()
    assert body["choices"][0]["logprobs"] == {"content": [expected], "refusal": None}
    streamed = chunks(ask(site, logprobs=True, top_logprobs=2, stream=True))
    assert [chunk["choices"][0]["logprobs"]["content"] for chunk in streamed if chunk["choices"][0]["logprobs"]] == [
        [expected]
    ]


PARTS = st.sampled_from(["<think>", "</think>", CALLED, "<tool_", "call>", "é😀", " \n", "x"])
SITE = Site(FakeEngine(model=THINKING_MODEL))


@given(text=st.lists(PARTS | st.text(max_size=4), max_size=6).map("".join), cuts=st.lists(st.integers(0, 200), max_size=8))
def test_stream_equals_plain_answer(text: str, cuts: list[int]) -> None:
    at = [0, *sorted(cut % (len(text) + 1) for cut in cuts), len(text)]
    SITE.engine.script = says(*(text[start:end] for start, end in itertools.pairwise(at)))
    message: dict[str, Any] = {"content": "", "refusal": None}
    for chunk in chunks(ask(SITE, tools=[TOOL], stream=True)):
        delta = chunk["choices"][0]["delta"]
        reason = chunk["choices"][0]["finish_reason"]
        for key in ("role", "content", "reasoning_content"):
            if key in delta:
                message[key] = message.get(key, "") + delta[key]
        for call in delta.get("tool_calls", ()):
            calls = message.setdefault("tool_calls", [])
            if "id" in call:
                assert call["index"] == len(calls)
                calls.append({key: value for key, value in call.items() if key != "index"})
            else:
                calls[call["index"]]["function"]["arguments"] += call["function"]["arguments"]
    if "tool_calls" in message and not message["content"]:
        message["content"] = None
    SITE.engine.script = says(text)
    (whole,) = ask(SITE, tools=[TOOL]).json()["choices"]
    assert _without_ids(message) == _without_ids(whole["message"])
    assert reason == whole["finish_reason"]


def _without_ids(message: dict[str, Any]) -> dict[str, Any]:
    calls = [{**call, "id": ""} for call in message.get("tool_calls", ())]
    return {**message, "tool_calls": calls}


@pytest.mark.parametrize("is_streamed", [False, True])
def test_several_answers(is_streamed: bool) -> None:
    script: list[Event] = [
        TextPiece(text="b", index=1),
        TextPiece(text="a", index=0),
        ends(index=1),
        ends("length", index=0),
    ]
    response = ask(Site(FakeEngine(script)), n=2, stream=is_streamed)
    if not is_streamed:
        choices = response.json()["choices"]
        assert [(each["message"]["content"], each["finish_reason"]) for each in choices] == [("a", "length"), ("b", "stop")]
        return
    told = [chunk["choices"][0] for chunk in chunks(response)]
    assert [(each["index"], each["delta"].get("content")) for each in told if each["delta"].get("content")] == [
        (1, "b"),
        (0, "a"),
    ]


def test_failure_before_and_during_a_stream() -> None:
    site = Site(FakeEngine(breaks("Hel")))
    assert ask(site).status_code == 500
    streamed = ask(site, stream=True)
    assert streamed.status_code == 200
    assert "[DONE]" not in streamed.text
    assert chunks(streamed)[-1]["error"]["code"] == "engine_failed"
    site.engine.refusal = QueueFull("Full.", retry_after_seconds=7)
    refused = ask(site, stream=True)
    assert (refused.status_code, refused.headers["retry-after"]) == (503, "7")
    assert site.models.leases == 0


@pytest.mark.parametrize("is_streamed", [False, True])
def test_client_that_goes_away_frees_its_place(is_streamed: bool) -> None:
    site = Site(FakeEngine([TextPiece(text="Hel")]))
    site.leave(CHAT, {"model": "fake", "messages": [USER], "stream": is_streamed})
    assert (site.engine.cancelled, site.engine.running, site.models.leases) == (1, 0, 0)


def test_model_stays_loaded_while_its_answer_is_streamed() -> None:
    site = Site(FakeEngine([TextPiece(text="Hel")]))

    async def go() -> httpx.Response:
        async with httpx.AsyncClient(transport=httpx.ASGITransport(site.app), base_url="http://test") as client:
            body = {"model": "fake", "messages": [USER], "stream": True}
            asking = asyncio.create_task(client.post(CHAT, json=body))
            while not site.engine.generations:
                await asyncio.sleep(0)
            for _ in range(100):
                await asyncio.sleep(0)
            assert (site.models.leases, site.engine.cancelled) == (1, 0)
            site.engine.generations[0].deliver(ends())
            return await asking

    assert asyncio.run(asyncio.wait_for(go(), timeout=20)).text.endswith("[DONE]\n\n")
    assert site.models.leases == 0


def test_adapters_are_asked_for_by_name() -> None:
    site = Site(FakeEngine(says("x")))
    assert ask(site, model="fake:polite").json()["model"] == "fake:polite"
    assert site.engine.requests[0].adapter == "polite"
    assert ask(site, model=None).json()["model"] == "fake"


def test_openai_client() -> None:
    site = Site(FakeEngine(says("<think>Hm.</think>", CALLED), model=THINKING_MODEL))

    async def work(client: openai.AsyncOpenAI) -> Any:
        asked: Any = {"model": "fake", "messages": [USER], "tools": [TOOL]}
        whole = await client.chat.completions.create(**asked)
        async with client.chat.completions.stream(**asked) as stream:
            async for _ in stream:
                pass
            return whole, await stream.get_final_completion()

    for completion in with_client(site, work):
        (choice,) = completion.choices
        assert choice.finish_reason == "tool_calls"
        assert json.loads(choice.message.tool_calls[0].function.arguments) == {"zone": "é"}
    json.dumps(site.app.openapi())
