"""POST /v1/responses over a fake engine: items in, items out, typed events, refusals, and the `openai` client."""

import asyncio
import itertools
import json
from typing import Any

import httpx
import openai
import pytest
from hypothesis import given
from hypothesis import strategies as st
from openai.types.responses import ResponseStreamEvent
from pydantic import TypeAdapter

from appliance.errors import QueueFull
from appliance.serving import sse
from appliance.serving.events import Event, TextPiece, TokenLogprob
from appliance.serving.requests import ChatPrompt
from tests.serving.api.site import Site
from tests.serving.fakes import THINKING_MODEL, FakeEngine, breaks, ends, says

RESPONSES = "/v1/responses"
TOOL = {
    "type": "function",
    "name": "time",
    "description": "Tells the time.",
    "parameters": {"type": "object", "properties": {}},
}
CALLED = '<tool_call>\n{"name": "time", "arguments": {"zone": "é"}}\n</tool_call>'
TURN = ["<think>\nHm.</think>\n", "I look. ", CALLED]


def ask(site: Site, **fields: Any) -> httpx.Response:
    return site.post(RESPONSES, {"model": "fake", "input": "hello", **fields})


def events(response: httpx.Response) -> list[dict[str, Any]]:
    return list(sse.decode(response.text.split("\n")))


def without_ids(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: without_ids(each) for key, each in value.items() if key not in ("id", "call_id", "created_at")}
    return [without_ids(each) for each in value] if isinstance(value, list) else value


def test_plain_response() -> None:
    site = Site(FakeEngine(says("Hel", "lo.")))
    body = ask(site, instructions="Be brief.", metadata={"a": "b"}, temperature=0.5).json()
    assert body["id"].startswith("resp_")
    (item,) = body["output"]
    assert item.pop("id").startswith("msg_")
    part = {"type": "output_text", "text": "Hello.", "annotations": [], "logprobs": []}
    assert item == {"type": "message", "role": "assistant", "status": "completed", "content": [part]}
    assert (body["object"], body["status"], body["error"], body["incomplete_details"]) == (
        "response",
        "completed",
        None,
        None,
    )
    assert (body["instructions"], body["metadata"], body["temperature"], body["store"]) == (
        "Be brief.",
        {"a": "b"},
        0.5,
        False,
    )
    assert body["usage"] == {
        "input_tokens": 5,
        "input_tokens_details": {"cached_tokens": 0, "cache_write_tokens": 0},
        "output_tokens": 3,
        "output_tokens_details": {"reasoning_tokens": 0},
        "total_tokens": 8,
    }
    assert site.models.leases == 0


def test_input_items_become_one_conversation() -> None:
    site = Site(FakeEngine(says("x")))
    items = [
        {"role": "developer", "content": "Be kind."},
        {"role": "user", "content": [{"type": "input_text", "text": "Time?"}]},
        {"type": "reasoning", "id": "rs_1", "summary": [], "content": [{"type": "reasoning_text", "text": "Hm."}]},
        {
            "type": "message",
            "id": "msg_1",
            "role": "assistant",
            "status": "completed",
            "content": [{"type": "output_text", "text": "I look.", "annotations": [], "logprobs": []}],
        },
        {"type": "function_call", "call_id": "c1", "name": "time", "arguments": "{}", "id": "fc_1", "status": "completed"},
        {"type": "function_call", "call_id": "c2", "name": "time", "arguments": "{}"},
        {"role": "assistant", "content": "Wait."},
        {"type": "function_call_output", "call_id": "c1", "output": "noon"},
        {"type": "function_call_output", "call_id": "c2", "output": [{"type": "input_text", "text": "12:00"}]},
    ]
    assert ask(site, input=items, instructions="Be brief.", tools=[TOOL]).status_code == 200
    prompt = site.engine.requests[0].prompt
    assert isinstance(prompt, ChatPrompt)
    function = {"name": "time", "arguments": "{}"}
    calls = [{"id": each, "type": "function", "function": function} for each in ("c1", "c2")]
    assert prompt.messages == (
        {"role": "system", "content": "Be brief."},
        {"role": "system", "content": "Be kind."},
        {"role": "user", "content": "Time?"},
        {"role": "assistant", "content": "I look.", "reasoning_content": "Hm.", "tool_calls": calls},
        {"role": "assistant", "content": "Wait."},
        {"role": "tool", "content": "noon", "tool_call_id": "c1"},
        {"role": "tool", "content": "12:00", "tool_call_id": "c2"},
    )
    wanted = {key: value for key, value in TOOL.items() if key != "type"}
    assert prompt.tools == ({"type": "function", "function": wanted},)


def test_output_can_be_sent_back() -> None:
    site = Site(FakeEngine(says(*TURN), model=THINKING_MODEL))
    output = ask(site, tools=[TOOL]).json()["output"]
    assert [item["type"] for item in output] == ["reasoning", "message", "function_call"]
    answer = {"type": "function_call_output", "call_id": output[2]["call_id"], "output": "noon"}
    assert ask(site, input=[{"role": "user", "content": "Time?"}, *output, answer]).status_code == 200
    prompt = site.engine.requests[1].prompt
    assert isinstance(prompt, ChatPrompt)
    assert [message["role"] for message in prompt.messages] == ["user", "assistant", "tool"]
    assert prompt.messages[1]["reasoning_content"] == "Hm."
    assert prompt.messages[1]["tool_calls"][0]["function"] == {"name": "time", "arguments": '{"zone": "é"}'}


def test_settings_reach_the_engine() -> None:
    site = Site(FakeEngine(says("{}"), model=THINKING_MODEL))
    form = {"type": "json_schema", "name": "a", "schema": {"type": "integer"}, "strict": True}
    fields = {"max_output_tokens": 4, "top_p": 0.5, "text": {"format": form}, "reasoning": {"effort": "none"}}
    body = ask(site, **fields, include=["message.output_text.logprobs"], top_logprobs=2).json()
    asked = site.engine.requests[0]
    assert (asked.max_tokens, asked.sampling.top_p, asked.top_logprobs) == (4, 0.5, 2)
    assert asked.prompt.template_variables == {"enable_thinking": False}  # type: ignore[union-attr]
    assert asked.grammar is not None
    assert "integer" in asked.grammar.source
    assert body["text"]["format"] == form
    ask(site, tools=[TOOL], tool_choice={"type": "function", "name": "time"})
    assert site.engine.requests[1].grammar.after == "</think>"  # type: ignore[union-attr]


def test_events() -> None:
    site = Site(FakeEngine(says(*TURN), model=THINKING_MODEL))
    response = ask(site, tools=[TOOL], stream=True)
    told = events(response)
    assert [event["sequence_number"] for event in told] == list(range(len(told)))
    lines = [line.removeprefix("event: ") for line in response.text.split("\n") if line.startswith("event: ")]
    assert lines == [event["type"] for event in told]
    part = ["response.output_item.added", "response.content_part.added"]
    end = ["response.content_part.done", "response.output_item.done"]
    assert lines == [
        *("response.created", "response.in_progress"),
        *(*part, "response.reasoning_text.delta", "response.reasoning_text.done", *end),
        *(*part, "response.output_text.delta", "response.output_text.done", *end),
        *("response.output_item.added", "response.function_call_arguments.delta"),
        *("response.function_call_arguments.done", "response.output_item.done", "response.completed"),
    ]
    adapter: TypeAdapter[Any] = TypeAdapter(ResponseStreamEvent)
    for event in told:
        adapter.validate_python(event)
    done = [event["item"] for event in told if event["type"] == "response.output_item.done"]
    assert done == told[-1]["response"]["output"]


PARTS = st.sampled_from(["<think>", "</think>", CALLED, "<tool_", "call>", "é😀", " \n", "x"])
SITE = Site(FakeEngine(model=THINKING_MODEL))


@given(text=st.lists(PARTS, max_size=6).map("".join), cuts=st.lists(st.integers(0, 200), max_size=8))
def test_stream_equals_plain_response(text: str, cuts: list[int]) -> None:
    at = [0, *sorted(cut % (len(text) + 1) for cut in cuts), len(text)]
    SITE.engine.script = says(*(text[start:end] for start, end in itertools.pairwise(at)))
    told = events(ask(SITE, tools=[TOOL], stream=True))
    streamed = told[-1]["response"]
    for place, item in enumerate(streamed["output"]):
        mine = [event for event in told if event.get("output_index") == place and event["type"].endswith(".delta")]
        text_of_item = item["arguments"] if item["type"] == "function_call" else item["content"][0]["text"]
        assert "".join(event["delta"] for event in mine) == text_of_item
    SITE.engine.script = says(text)
    whole = ask(SITE, tools=[TOOL]).json()
    assert without_ids(whole["output"]) == without_ids(streamed["output"])
    assert whole["status"] == streamed["status"]


def test_cut_and_empty_answers() -> None:
    body = ask(Site(FakeEngine(says("Hel", reason="length")))).json()
    assert (body["status"], body["incomplete_details"]) == ("incomplete", {"reason": "max_output_tokens"})
    assert body["output"][0]["status"] == "incomplete"
    empty = ask(Site(FakeEngine(says()))).json()
    assert [item["content"][0]["text"] for item in empty["output"]] == [""]


def test_logprobs() -> None:
    told = TokenLogprob(piece=b"a", logprob=-0.5, top=((b"b", -1.5),))
    script: list[Event] = [TextPiece(text="a", logprobs=(told,)), ends()]
    body = ask(Site(FakeEngine(script)), include=["message.output_text.logprobs"], top_logprobs=1).json()
    top = [{"token": "b", "logprob": -1.5, "bytes": [98]}]
    assert body["output"][0]["content"][0]["logprobs"] == [
        {"token": "a", "logprob": -0.5, "bytes": [97], "top_logprobs": top}
    ]


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"input": []}, "input"),
        ({"input": [{"role": "user", "content": [{"type": "input_image", "image_url": "x"}]}]}, "input"),
        ({"input": [{"type": "file_search_call", "id": "x"}]}, "input"),
        ({"store": True}, "store"),
        ({"previous_response_id": "resp_1"}, "previous_response_id"),
        ({"background": True}, "background"),
        ({"conversation": "c"}, "conversation"),
        ({"truncation": "auto"}, "truncation"),
        ({"tools": [{"type": "web_search"}]}, "tools"),
        ({"tool_choice": "required"}, "tool_choice"),
        ({"include": ["reasoning.encrypted_content"]}, "include"),
        ({"reasoning": {"summary": "auto"}}, "reasoning.summary"),
        ({"max_output_tokens": 0}, "max_output_tokens"),
        ({"text": {"format": {"type": "grammar"}}}, "text.format"),
    ],
)
def test_wrong_values_are_named(fields: dict[str, Any], param: str) -> None:
    site = Site(FakeEngine(says("x")))
    response = ask(site, **fields)
    assert response.status_code == 400
    assert response.json()["error"]["param"].startswith(param)
    assert site.engine.requests == []


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"input": [{"role": "assistant", "content": "x"}]}, "input must end"),
        ({"previous_response_id": "resp_1"}, "every turn in input"),
        ({"top_logprobs": 1}, "include"),
        ({"tools": [TOOL, TOOL]}, "same name"),
        ({"grammar": {"type": "regex", "value": "a"}, "text": {"format": {"type": "json_object"}}}, "both bind"),
    ],
)
def test_contradictions_are_explained(fields: dict[str, Any], said: str) -> None:
    response = ask(Site(FakeEngine(says("x"))), **fields)
    assert response.status_code == 400
    assert said in response.json()["error"]["message"]


def test_failure_before_and_during_a_stream() -> None:
    site = Site(FakeEngine(breaks("Hel")))
    assert ask(site).status_code == 500
    streamed = events(ask(site, stream=True))
    assert [event["type"] for event in streamed[-2:]] == ["error", "response.failed"]
    assert streamed[-2]["code"] == "engine_failed"
    assert streamed[-1]["response"]["error"] == {"code": "server_error", "message": "It broke."}
    site.engine.refusal = QueueFull("Full.", retry_after_seconds=7)
    assert ask(site, stream=True).status_code == 503
    assert site.models.leases == 0


@pytest.mark.parametrize("is_streamed", [False, True])
def test_client_that_goes_away_frees_its_place(is_streamed: bool) -> None:
    site = Site(FakeEngine([TextPiece(text="Hel")]))
    site.leave(RESPONSES, {"model": "fake", "input": "hi", "stream": is_streamed})
    assert (site.engine.cancelled, site.engine.running, site.models.leases) == (1, 0, 0)


def test_openai_client() -> None:
    site = Site(FakeEngine(says(*TURN), model=THINKING_MODEL))

    async def go() -> Any:
        async with (
            httpx.AsyncClient(transport=httpx.ASGITransport(site.app)) as http,
            openai.AsyncOpenAI(base_url="http://test/v1", api_key="x", http_client=http, max_retries=0) as client,
        ):
            asked: Any = {"model": "fake", "input": "Time?", "tools": [TOOL]}
            whole = await client.responses.create(**asked)
            async with client.responses.stream(**asked) as stream:
                async for _ in stream:
                    pass
                return whole, await stream.get_final_response()

    for response in asyncio.run(asyncio.wait_for(go(), timeout=20)):
        assert response.output_text == "I look."
        assert [item.type for item in response.output] == ["reasoning", "message", "function_call"]
        assert json.loads(response.output[2].arguments) == {"zone": "é"}
