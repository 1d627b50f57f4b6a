"""The official `ollama` client, unmodified, against a running server."""

import json
from collections.abc import Iterator

import ollama
import pytest

from tests.serving.conformance.served import CHAT, VECTORS, Served

HELLO = [{"role": "user", "content": "hello"}]
SHORT = {"num_predict": 16}


@pytest.fixture(scope="module")
def client(served: Served) -> Iterator[ollama.Client]:
    with ollama.Client(host=served.url, trust_env=False) as client:
        yield client


def add(first: int, second: int) -> int:
    """Adds two numbers.

    Args:
      first: One number.
      second: Another number.
    """
    return first + second


def test_models(client: ollama.Client) -> None:
    listed = client.list().models
    assert [model.model for model in listed][:2] == [CHAT, VECTORS]
    assert all(model.size and model.digest and model.modified_at for model in listed)
    assert CHAT in [model.model for model in client.ps().models]
    shown = client.show(CHAT)
    assert shown.capabilities == ["completion", "tools"]
    assert shown.template
    assert shown.modelinfo
    assert shown.modelinfo["general.architecture"] == "qwen3"


def test_chat_whole_and_streamed(client: ollama.Client) -> None:
    whole = client.chat(CHAT, HELLO, options=SHORT)
    parts = list(client.chat(CHAT, HELLO, options=SHORT, stream=True))
    assert "".join(part.message.content or "" for part in parts) == whole.message.content
    assert [part.done for part in parts] == [False] * (len(parts) - 1) + [True]
    for last in (whole, parts[-1]):
        assert last.done_reason in ("stop", "length")
        assert last.prompt_eval_count
        assert last.eval_count
        assert last.total_duration
        assert last.eval_duration is not None


def test_generate(client: ollama.Client) -> None:
    whole = client.generate(CHAT, "hello", system="Be kind.", options=SHORT, keep_alive="5m")
    parts = client.generate(CHAT, "hello", system="Be kind.", options=SHORT, stream=True)
    assert "".join(part.response or "" for part in parts) == whole.response
    assert client.generate(CHAT, "hello", raw=True, options=SHORT).done
    assert client.generate(CHAT).done_reason == "load"


def test_seeds(client: ollama.Client) -> None:
    texts = [
        client.generate(CHAT, "hello", options={**SHORT, "seed": seed, "temperature": 2.0}).response for seed in (1, 1, 2)
    ]
    assert texts[0] == texts[1] != texts[2]


def test_format(client: ollama.Client) -> None:
    schema = {"type": "object", "properties": {"city": {"enum": ["Oslo", "Rome"]}}, "required": ["city"]}
    schema["additionalProperties"] = False
    answer = client.chat(CHAT, HELLO, format=schema, options={"num_predict": 100})
    assert json.loads(answer.message.content or "")["city"] in ("Oslo", "Rome")


def test_tools(client: ollama.Client) -> None:
    answer = client.chat(CHAT, HELLO, tools=[add], options={"num_predict": 40})
    for call in answer.message.tool_calls or ():
        assert call.function.name == "add"
    earlier = [
        *HELLO,
        {"role": "assistant", "tool_calls": [{"function": {"name": "add", "arguments": {"first": 1, "second": 2}}}]},
        {"role": "tool", "tool_name": "add", "content": "3"},
    ]
    assert client.chat(CHAT, earlier, tools=[add], options=SHORT).message.role == "assistant"


def test_vectors(client: ollama.Client) -> None:
    many = client.embed(VECTORS, ["one", "two"])
    assert len(many.embeddings) == 2
    assert many.prompt_eval_count
    one = client.embeddings(VECTORS, "one")
    assert list(one.embedding) == pytest.approx(list(many.embeddings[0]), abs=1e-5)


def test_errors_are_readable(client: ollama.Client) -> None:
    with pytest.raises(ollama.ResponseError, match="mirostat") as refused:
        client.chat(CHAT, HELLO, options={"mirostat": 1})
    assert refused.value.status_code == 400
    with pytest.raises(ollama.ResponseError, match="num_ctx"):
        client.chat(CHAT, HELLO, options={"num_ctx": 1 << 20})
    with pytest.raises(ollama.ResponseError) as missing:
        client.chat("other", HELLO)
    assert missing.value.status_code == 404
