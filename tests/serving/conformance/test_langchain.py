"""`langchain-openai`, unmodified, against a running server."""

from typing import Any, Literal

import pytest
from langchain_openai import ChatOpenAI, OpenAIEmbeddings
from pydantic import BaseModel, SecretStr

from tests.serving.conformance.served import CHAT, VECTORS, Served


class Trip(BaseModel):
    """A trip to a city."""

    city: Literal["Oslo", "Rome"]
    is_long: bool


def model(served: Served, **fields: Any) -> ChatOpenAI:
    settings: dict[str, Any] = {"max_tokens": 100, "max_retries": 0, "temperature": 0, "timeout": 60, **fields}
    return ChatOpenAI(model=CHAT, base_url=f"{served.url}/v1", api_key=SecretStr("none"), **settings)


def test_invoke_and_stream(served: Served) -> None:
    llm = model(served, max_tokens=16)
    conversation = [("system", "Be kind."), ("human", "hello")]
    whole = llm.invoke(conversation)
    assert isinstance(whole.content, str)
    assert whole.usage_metadata is not None
    assert whole.usage_metadata["output_tokens"] <= 16
    chunks = list(llm.stream(conversation, stream_usage=True))
    assert "".join(str(chunk.content) for chunk in chunks) == whole.content
    assert any(chunk.usage_metadata for chunk in chunks)


def test_batch(served: Served) -> None:
    assert len(model(served, max_tokens=4).batch(["one", "two", "three"])) == 3


def test_tools(served: Served) -> None:
    bound = model(served).bind_tools([Trip], tool_choice="Trip")
    (call,) = bound.invoke("hello").tool_calls
    assert call["name"] == "Trip"
    assert Trip.model_validate(call["args"])


@pytest.mark.parametrize("method", ["json_schema", "function_calling"])
def test_structured_output(served: Served, method: Literal["json_schema", "function_calling"]) -> None:
    assert isinstance(model(served).with_structured_output(Trip, method=method).invoke("hello"), Trip)


def test_responses_api(served: Served) -> None:
    answer = model(served, max_tokens=16, use_responses_api=True, store=False).invoke("hello")
    assert isinstance(answer.text, str)


def test_embeddings(served: Served) -> None:
    # Counting tokens beforehand would download OpenAI's tokenizer.
    settings: dict[str, Any] = {"check_embedding_ctx_length": False, "max_retries": 0}
    embedder = OpenAIEmbeddings(model=VECTORS, base_url=f"{served.url}/v1", api_key=SecretStr("none"), **settings)
    first, second = embedder.embed_documents(["one", "two"])
    assert embedder.embed_query("one") == pytest.approx(first, abs=1e-5)
    assert first != second
