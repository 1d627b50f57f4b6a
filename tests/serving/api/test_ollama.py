"""Ollama's API over a fake engine."""

import json
from typing import Any

import msgspec
import pytest

from appliance import __version__
from appliance.errors import EngineFailed
from appliance.serving.api.ollama_bodies import OllamaBodies
from appliance.serving.chat_turn import (
    ChoiceFinished,
    Content,
    Delta,
    Reasoning,
    ToolCallArguments,
    ToolCallStarted,
)
from appliance.serving.events import TextPiece, TokenLogprob
from appliance.serving.requests import ChatPrompt, TextPrompt
from tests.serving.api.site import Site
from tests.serving.fakes import MODEL, THINKING_MODEL, FakeEngine, breaks, ends, says

CHAT, GENERATE = "/api/chat", "/api/generate"
USER = {"role": "user", "content": "hi"}


def chat(site: Site, **fields: Any) -> list[dict[str, Any]]:
    return lines(site, CHAT, {"model": "fake", "messages": [USER], **fields})


def generate(site: Site, **fields: Any) -> list[dict[str, Any]]:
    return lines(site, GENERATE, {"model": "fake", "prompt": "hi", **fields})


def lines(site: Site, path: str, body: dict[str, Any]) -> list[dict[str, Any]]:
    response = site.post(path, body)
    assert response.status_code == 200, response.text
    if body.get("stream", True) and "done_reason" not in response.text.partition("\n")[0]:
        assert response.headers["content-type"] == "application/x-ndjson"
    return [json.loads(line) for line in response.text.splitlines()]


def test_streamed_chat_and_its_figures() -> None:
    site = Site(FakeEngine(says("Hel", "lo.")))
    told = chat(site)
    assert [each["message"] for each in told] == [
        {"role": "assistant", "content": "Hel"},
        {"role": "assistant", "content": "lo."},
        {"role": "assistant", "content": ""},
    ]
    assert [each["done"] for each in told] == [False, False, True]
    last = told[-1]
    assert (last["done_reason"], last["prompt_eval_count"], last["eval_count"]) == ("stop", 5, 3)
    assert last["total_duration"] >= last["load_duration"] >= 0
    assert {"prompt_eval_duration", "eval_duration"} <= set(last)
    assert site.models.leases == 0


def test_whole_chat_equals_streamed_chat() -> None:
    site = Site(FakeEngine(says("Hel", "lo.", reason="length")))
    (whole,) = chat(site, stream=False)
    assert whole["message"]["content"] == "".join(each["message"]["content"] for each in chat(site))
    assert (whole["done"], whole["done_reason"]) == (True, "length")


def test_generate_uses_the_template_unless_raw() -> None:
    site = Site(FakeEngine(says("x")))
    (whole,) = generate(site, system="Be kind.", stream=False)
    assert whole["response"] == "x"
    assert "message" not in whole
    assert "".join(each["response"] for each in generate(site, raw=True)) == "x"
    templated, raw = (request.prompt for request in site.engine.requests)
    assert isinstance(templated, ChatPrompt)
    assert [dict(message) for message in templated.messages] == [{"role": "system", "content": "Be kind."}, USER]
    assert raw == TextPrompt(text="hi")


def test_options_reach_the_engine() -> None:
    site = Site(FakeEngine(says("x")))
    options = {"num_predict": 4, "temperature": 0.5, "top_k": -1, "top_p": 0.9, "min_p": 0.1, "repeat_penalty": 1.1}
    more = {"seed": 7, "stop": ["end"], "num_ctx": 64, "num_keep": 4, "mirostat": 0, "use_mlock": False}
    chat(site, model="fake:warm", options={**options, **more}, keep_alive="5m")
    generate(site, raw=True, options={"num_predict": -1, "seed": -1}, keep_alive=0)
    first, second = site.engine.requests
    assert (first.max_tokens, first.stop, first.adapter) == (4, ("end",), "warm")
    sampling = first.sampling
    assert (sampling.temperature, sampling.top_k, sampling.top_p, sampling.min_p) == (0.5, 0, 0.9, 0.1)
    assert (sampling.repeat_penalty, sampling.seed) == (1.1, 7)
    assert (second.max_tokens, second.sampling.seed) == (MODEL.context_tokens, None)


@pytest.mark.parametrize("form", ["json", {"type": "object", "properties": {"a": {"type": "integer"}}}])
@pytest.mark.parametrize("path", [CHAT, GENERATE])
def test_format_binds_the_answer(path: str, form: Any) -> None:
    site = Site(FakeEngine(says("{}")))
    lines(site, path, {"model": "fake", "messages": [USER], "format": form} if path == CHAT else
          {"model": "fake", "prompt": "hi", "format": form})  # fmt: skip
    grammar = site.engine.requests[0].grammar
    assert grammar is not None
    assert json.dumps({"type": "object"} if form == "json" else form)[:-1] in grammar.source


def test_tools_and_earlier_calls_are_spelled_as_openai_does() -> None:
    site = Site(FakeEngine(says("x")))
    tool = {"type": "function", "function": {"name": "look", "parameters": {"type": "object", "properties": {}}}}
    earlier = [
        USER,
        {"role": "assistant", "content": "", "tool_calls": [{"function": {"name": "look", "arguments": {"a": 1}}}]},
        {"role": "tool", "content": "seen", "tool_name": "look"},
    ]
    chat(site, messages=earlier, tools=[tool])
    prompt = site.engine.requests[0].prompt
    assert isinstance(prompt, ChatPrompt)
    assert prompt.tools[0]["function"]["name"] == "look"
    call = prompt.messages[1]["tool_calls"][0]
    assert (call["id"], call["function"]["name"]) == ("call_0", "look")
    assert prompt.messages[2]["content"] == "seen"


class Told:
    """Deltas as an answer says them."""

    def __init__(self, *deltas: Delta) -> None:
        self._deltas = deltas

    async def __aiter__(self) -> Any:
        for delta in self._deltas:
            yield delta


CALLS = (
    Reasoning(0, "Hm."),
    Content(0, "Let me see."),
    ToolCallStarted(0, 0, "id0", "look"),
    ToolCallArguments(0, 0, '{"a": '),
    ToolCallArguments(0, 0, "1}"),
    ToolCallStarted(0, 1, "id1", "ask"),
    ToolCallArguments(0, 1, "{}"),
)
FIRST = {"id": "id0", "function": {"name": "look", "arguments": {"a": 1}}}
SECOND = {"id": "id1", "function": {"name": "ask", "arguments": {}}}


@pytest.mark.anyio
async def test_calls_and_thoughts() -> None:
    bodies = OllamaBodies("chat", "fake", 0.0, 0.0)
    told = Told(*CALLS, ChoiceFinished(0, "tool_calls", ends()))
    messages = [line["message"] async for line in bodies.lines(told)]
    assert [message.get("tool_calls") for message in messages] == [None, None, [FIRST], [SECOND], None]
    assert messages[0] == {"role": "assistant", "content": "", "thinking": "Hm."}
    whole = await bodies.whole(told)
    assert whole["message"] == {
        "role": "assistant",
        "content": "Let me see.",
        "thinking": "Hm.",
        "tool_calls": [FIRST, SECOND],
    }
    assert whole["done_reason"] == "stop"


@pytest.mark.anyio
async def test_a_call_that_was_cut_off_is_not_told() -> None:
    bodies = OllamaBodies("chat", "fake", 0.0, 0.0)
    whole = await bodies.whole(Told(*CALLS[:-1], ChoiceFinished(0, "length", ends("length"))))
    assert whole["message"]["tool_calls"] == [FIRST]
    assert whole["done_reason"] == "length"
    with pytest.raises(EngineFailed, match="ask"):
        await bodies.whole(Told(*CALLS[:-1], ChoiceFinished(0, "tool_calls", ends())))


@pytest.fixture
def anyio_backend() -> str:
    return "asyncio"


@pytest.mark.parametrize(
    ("think", "variables"),
    [(None, {}), (True, {"enable_thinking": True}), (False, {"enable_thinking": False}), ("low", {"enable_thinking": True})],
)
def test_thinking_is_a_switch_of_the_template(think: Any, variables: dict[str, Any]) -> None:
    site = Site(FakeEngine(says("x"), model=THINKING_MODEL))
    chat(site, think=think)
    prompt = site.engine.requests[0].prompt
    assert isinstance(prompt, ChatPrompt)
    assert prompt.template_variables == variables


def test_only_a_model_that_cannot_think_refuses_to() -> None:
    site = Site(FakeEngine(says("x")))
    chat(site, think=False)
    assert site.post(CHAT, {"model": "fake", "messages": [USER], "think": True}).status_code == 400


def test_logprobs() -> None:
    told = (TokenLogprob(piece=b"a", logprob=-0.5, top=((b"a", -0.5),)),)
    site = Site(FakeEngine([TextPiece(text="a", logprobs=told), ends()]))
    (whole,) = chat(site, stream=False, logprobs=True, top_logprobs=1)
    token = {"token": "a", "logprob": -0.5, "bytes": [97]}
    assert whole["logprobs"] == [{**token, "top_logprobs": [token]}]


@pytest.mark.parametrize("path", [CHAT, GENERATE])
def test_nothing_to_answer_loads_the_model(path: str) -> None:
    site = Site(FakeEngine())
    (loaded,) = lines(site, path, {"model": "fake"})
    assert (loaded["done"], loaded["done_reason"]) == (True, "load")
    assert site.models.leased == [("fake", "chat")]
    assert site.engine.requests == []


@pytest.mark.parametrize(
    ("path", "fields"),
    [
        (CHAT, {"options": {"mirostat": 1}}),
        (CHAT, {"options": {"num_gpu": 1}}),
        (CHAT, {"options": {"num_ctx": 65}}),
        (CHAT, {"messages": [{**USER, "images": ["aGk="]}]}),
        (CHAT, {"messages": [{"role": "robot", "content": "x"}]}),
        (CHAT, {"template": "x"}),
        (CHAT, {"tools": [{"type": "magic"}]}),
        (CHAT, {"format": "yaml"}),
        (CHAT, {"model": ""}),
        (GENERATE, {"suffix": "x"}),
        (GENERATE, {"images": ["aGk="]}),
        (GENERATE, {"context": [1]}),
        (GENERATE, {"raw": True, "system": "x"}),
        ("/api/embed", {"input": "x", "dimensions": 1}),
        ("/api/embed", {"input": []}),
        ("/api/show", {"model": None}),
    ],
)
def test_refused(path: str, fields: dict[str, Any]) -> None:
    site = Site(FakeEngine(says("x")))
    start: dict[str, Any] = {CHAT: {"messages": [USER]}, GENERATE: {"prompt": "hi"}}.get(path, {})
    response = site.post(path, {"model": "fake", **start, **fields})
    assert response.status_code == 400
    assert isinstance(response.json()["error"], str)
    assert site.engine.requests == []


def test_failure_before_and_during_a_stream() -> None:
    site = Site(FakeEngine(breaks("Hel")))
    plain = site.post(CHAT, {"model": "fake", "messages": [USER], "stream": False})
    assert (plain.status_code, plain.json()) == (500, {"error": "It broke."})
    assert chat(site)[-1] == {"error": "It broke."}


def test_models_as_ollama_lists_them() -> None:
    vectors = msgspec.structs.replace(MODEL, name="vectors", kind="embedding", chat_template="t")
    site = Site(FakeEngine(), FakeEngine(model=vectors))
    tags = site.ask("GET", "/api/tags").json()["models"]
    assert [each["name"] for each in tags] == [each["model"] for each in tags] == ["fake", "vectors"]
    assert tags[0]["digest"] == MODEL.sha256
    assert tags[0]["modified_at"] == "2023-11-14T22:13:20Z"
    assert tags[0]["details"]["quantization_level"] == "Q4_K - Medium"
    assert [each["context_length"] for each in site.ask("GET", "/api/ps").json()["models"]] == [64, 64]
    shown = site.post("/api/show", {"name": "vectors:latest", "verbose": True}).json()
    assert (shown["capabilities"], shown["template"]) == (["embedding"], "t")
    assert shown["model_info"] == {
        "general.architecture": "fake",
        "fake.context_length": 64,
        "fake.embedding_length": 2,
    }
    assert site.post("/api/show", {"model": "other"}).status_code == 404
    assert site.ask("GET", "/api/version").json() == {"version": __version__}


def test_vectors() -> None:
    site = Site(FakeEngine())
    body = site.post("/api/embed", {"model": "fake:latest", "input": ["abc", "d"]}).json()
    assert (body["embeddings"], body["prompt_eval_count"]) == ([[3.0, 1.0], [1.0, 1.0]], 4)
    assert site.post("/api/embeddings", {"model": "fake", "prompt": "ab"}).json() == {"embedding": [2.0, 1.0]}
    assert {kind for _, kind in site.models.leased} == {"embedding"}


def test_long_texts_are_cut_when_asked_for() -> None:
    site = Site(FakeEngine())
    texts = ["short", "x" * 40, "y" * 100]
    site.post("/api/embed", {"model": "fake", "input": texts, "truncate": True})
    site.post("/api/embed", {"model": "fake", "input": texts})
    cut, whole = (request.inputs for request in site.engine.pooled)
    assert cut == ("short", "x" * 40, tuple(b"y" * 64))
    assert whole == tuple(texts)
