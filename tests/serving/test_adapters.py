"""LoRA adapters of a running server: asked for by name, as strong as asked, and never mixed up with each other's answers."""

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest

from tests import tiny_gguf
from tests.serving.serving_process import RunningServer, running_server


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RunningServer]:
    folder = tmp_path_factory.mktemp("adapters")
    model = tiny_gguf.write(folder / "tiny.gguf")
    given = [f"{name}={tiny_gguf.write_adapter(folder / f'{name}.gguf', seed=seed)}" for name, seed in (("a", 1), ("b", 2))]
    flags = [flag for each in given for flag in ("--adapter", each)]
    with running_server(model, *flags, "--slots", "4", root=folder) as server:
        yield server
        assert server.stop() == 0


NAMES = ("tiny", "tiny:a", "tiny:b")
TIE = 0.05  # rounding differs with what else is in a batch; it decides between tokens that are as good as equally likely


def ask(server: RunningServer, model: str, text: str = "What is your name?", **fields: Any) -> str:
    return said(server, model, text, **fields)["message"]["content"]


def said(server: RunningServer, model: str, text: str, **fields: Any) -> dict[str, Any]:
    response = server.chat(text, model=model, max_tokens=8, **fields)
    assert response.status_code == 200, response.text
    choice: dict[str, Any] = response.json()["choices"][0]
    return choice


def is_clear(choice: dict[str, Any]) -> bool:
    tops = [token["top_logprobs"] for token in choice["logprobs"]["content"]]
    return all(first["logprob"] - second["logprob"] > TIE for first, second in tops)


def clear_question(server: RunningServer) -> str:
    """One to which no answer has a near-tie."""
    for number in range(100):
        text = f"What is question {number}?"
        if all(is_clear(said(server, name, text, logprobs=True, top_logprobs=2)) for name in NAMES):
            return text
    raise AssertionError("the tiny model has become too undecided for this test")


def test_each_keeps_its_own_answers(server: RunningServer) -> None:
    """The prompt is the same: a cell of one adapter used for another would show."""
    question = clear_question(server)
    alone = {name: ask(server, name, question) for name in NAMES}
    assert len(set(alone.values())) == 3
    with ThreadPoolExecutor(6) as pool:
        mixed = list(pool.map(lambda name: (name, ask(server, name, question)), NAMES * 6))
    assert all(text == alone[name] for name, text in mixed)


def test_scale(server: RunningServer) -> None:
    assert ask(server, "tiny:a", adapter_scale=0.0) == ask(server, "tiny")
    assert ask(server, "tiny:a", adapter_scale=3.0) != ask(server, "tiny:a")


def test_a_scale_without_an_adapter_is_refused(server: RunningServer) -> None:
    response = server.chat("hello", adapter_scale=0.5)
    assert (response.status_code, response.json()["error"]["param"]) == (400, "adapter_scale")


def test_they_are_listed(server: RunningServer) -> None:
    assert [each["id"] for each in server.http.get("/v1/models").json()["data"]] == ["tiny", "tiny:a", "tiny:b"]
    refused = server.chat("hello", model="tiny:c")
    assert (refused.status_code, refused.json()["error"]["code"]) == (404, "model_not_found")
