"""POST /v1/completions over a fake engine."""

from typing import Any

import pytest

from appliance.serving import sse
from appliance.serving.events import Event, TextPiece, TokenLogprob
from appliance.serving.requests import GenerationRequest, TextPrompt, TokenPrompt
from tests.serving.api.site import Site
from tests.serving.fakes import FakeEngine, breaks, ends, says

PATH = "/v1/completions"


def parrot(request: GenerationRequest) -> list[Event]:
    """Answers i with the prompt and i."""
    prompt = request.prompt
    text = prompt.text if isinstance(prompt, TextPrompt) else "tokens"
    return [event for index in range(request.n) for event in says(text, f"-{index}", index=index)]


def ask(site: Site, **fields: Any) -> dict[str, Any]:
    response = site.post(PATH, {"prompt": "hi", **fields})
    assert response.status_code == 200, response.text
    body: dict[str, Any] = response.json()
    return body


def stream(site: Site, **fields: Any) -> list[dict[str, Any]]:
    response = site.post(PATH, {"prompt": "hi", "stream": True, **fields})
    assert response.headers["content-type"].startswith("text/event-stream")
    return list(sse.decode(response.text.split("\n")))


def test_plain_answer() -> None:
    site = Site(FakeEngine(says("Hel", "lo.")))
    body = ask(site)
    assert (body["object"], body["model"], body["id"][:5]) == ("text_completion", "fake", "cmpl-")
    assert body["choices"] == [{"text": "Hello.", "index": 0, "finish_reason": "stop", "logprobs": None}]
    assert body["usage"]["total_tokens"] == 8
    assert site.engine.requests[0].max_tokens == 33
    assert site.models.leases == 0


def test_request_reaches_the_engine() -> None:
    site = Site(FakeEngine(says("x")))
    ask(site, model="fake:warm", max_tokens=4, temperature=0.5, top_k=3, seed=1, stop="end", logit_bias={"7": -100})
    request = site.engine.requests[0]
    assert (request.max_tokens, request.stop, request.adapter) == (4, ("end",), "warm")
    assert (request.sampling.temperature, request.sampling.top_k, request.sampling.seed) == (0.5, 3, 1)
    assert request.sampling.logit_bias == {7: -100.0}
    assert request.deadline_at is not None
    assert request.deadline_at - request.arrived_at == pytest.approx(site.serve.deadline_seconds)


def test_a_client_may_ask_for_less_time_and_not_for_more() -> None:
    site = Site(FakeEngine(says("x")))
    ask(site, deadline_seconds=5)
    ask(site, deadline_seconds=86400)
    spans = [request.deadline_at - request.arrived_at for request in site.engine.requests if request.deadline_at]
    assert spans == [pytest.approx(5.0), pytest.approx(site.serve.deadline_seconds)]


@pytest.mark.parametrize(
    ("prompt", "sent"),
    [
        ("hi", [TextPrompt(text="hi")]),
        (["a", "b"], [TextPrompt(text="a"), TextPrompt(text="b")]),
        ([1, 2], [TokenPrompt(tokens=(1, 2))]),
        ([[1, 2], [3]], [TokenPrompt(tokens=(1, 2)), TokenPrompt(tokens=(3,))]),
    ],
)
def test_prompts(prompt: Any, sent: list[Any]) -> None:
    site = Site(FakeEngine(says("x")))
    body = ask(site, prompt=prompt)
    assert [request.prompt for request in site.engine.requests] == sent
    assert [choice["index"] for choice in body["choices"]] == list(range(len(sent)))


def test_many_prompts_and_answers_keep_their_order() -> None:
    site = Site(FakeEngine(parrot))
    prompts = [f"p{number}" for number in range(5)]
    body = ask(site, prompt=prompts, n=2)
    expected = [f"{prompt}-{index}" for prompt in prompts for index in range(2)]
    assert [choice["text"] for choice in body["choices"]] == expected
    assert [choice["index"] for choice in body["choices"]] == list(range(10))
    assert body["usage"]["prompt_tokens"] == 5 * 5
    assert body["usage"]["completion_tokens"] == 10 * 3


def test_stream_equals_plain_answer() -> None:
    site = Site(FakeEngine(parrot))
    fields = {"prompt": ["a", "b", "c"], "n": 2, "echo": True}
    plain = ask(site, **fields)
    chunks = stream(site, **fields, stream_options={"include_usage": True})
    texts, reasons = dict.fromkeys(range(6), ""), {}
    for chunk in chunks[:-1]:
        (choice,) = chunk["choices"]
        texts[choice["index"]] += choice["text"]
        reasons[choice["index"]] = choice["finish_reason"]
        assert chunk["usage"] is None
    assert list(texts.values()) == [choice["text"] for choice in plain["choices"]]
    assert texts[2] == "bb-0"
    assert set(reasons.values()) == {"stop"}
    assert (chunks[-1]["choices"], chunks[-1]["usage"]) == ([], plain["usage"])


def test_echoed_tokens_become_text() -> None:
    assert ask(Site(FakeEngine(says("!"))), prompt=[72, 105], echo=True)["choices"][0]["text"] == "Hi!"


@pytest.mark.parametrize("is_streamed", [False, True])
def test_logprobs_in_their_older_shape(is_streamed: bool) -> None:
    told = (TokenLogprob(piece=b"a", logprob=-0.5, top=((b"a", -0.5), (b"\xe2", -1.0))),)
    more = (TokenLogprob(piece=b"bc", logprob=-0.25, top=()), TokenLogprob(piece=b"d", logprob=-1.0, top=()))
    script = [TextPiece(text="a", logprobs=told), TextPiece(text="bcd", logprobs=more), ends(generated_tokens=4)]
    site = Site(FakeEngine(script))
    if is_streamed:
        parts = [chunk["choices"][0]["logprobs"] for chunk in stream(site, logprobs=2)]
        found = {key: [each for part in parts if part for each in part[key]] for key in parts[0]}
    else:
        found = ask(site, logprobs=2)["choices"][0]["logprobs"]
    assert found == {
        "tokens": ["a", "bc", "d"],
        "token_logprobs": [-0.5, -0.25, -1.0],
        "top_logprobs": [{"a": -0.5, "bytes:\\xe2": -1.0}, {}, {}],
        "text_offset": [0, 1, 3],
    }
    assert site.engine.requests[0].top_logprobs == 2


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"suffix": "x"}, "suffix"),
        ({"best_of": 2}, None),
        ({"echo": True, "logprobs": 1}, None),
        ({"stream_options": {}}, None),
        ({"prompt": ""}, "prompt"),
        ({"prompt": []}, "prompt"),
        ({"prompt": ["x"] * 129}, "prompt"),
        ({"prompt": [5000]}, "prompt"),
        ({"prompt": [-1]}, "prompt"),
        ({"prompt": [2**31]}, "prompt"),
        ({"prompt": [1, "x"]}, "prompt"),
        ({"logprobs": 21}, "logprobs"),
        ({"max_tokens": 0}, "max_tokens"),
        ({"n": 9}, "n"),
    ],
)
def test_refused(fields: dict[str, Any], param: str | None) -> None:
    site = Site(FakeEngine(says("x")))
    response = site.post(PATH, {"prompt": "hi", **fields})
    assert (response.status_code, response.json()["error"]["param"]) == (400, param)
    assert site.engine.requests == []


def test_values_that_ask_for_nothing_are_accepted() -> None:
    ask(Site(FakeEngine(parrot)), suffix="", best_of=2, n=2, logprobs=None, user="u", stop=None, logit_bias={})


def test_failure_before_and_during_a_stream() -> None:
    site = Site(FakeEngine(breaks("Hel")))
    plain = site.post(PATH, {"prompt": "hi"})
    assert (plain.status_code, plain.json()["error"]["code"]) == (500, "engine_failed")
    streamed = site.post(PATH, {"prompt": "hi", "stream": True})
    assert "[DONE]" not in streamed.text
    assert list(sse.decode(streamed.text.split("\n")))[-1]["error"]["code"] == "engine_failed"
    assert site.models.leases == 0


@pytest.mark.parametrize("is_streamed", [False, True])
def test_departure_cancels_every_prompt_in_hand(is_streamed: bool) -> None:
    site = Site(FakeEngine())
    site.leave(PATH, {"prompt": ["a", "b", "c", "d"], "stream": is_streamed})
    assert len(site.engine.requests) == site.engine.cancelled <= 2  # of two slots
    assert (site.engine.running, site.models.leases) == (0, 0)
