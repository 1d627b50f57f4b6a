"""LoRA adapters of a running server: asked for by name, as strong as asked, and never mixed up with the model's own answers."""

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

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


def ask(server: RunningServer, model: str, scale: float = 1.0) -> str:
    response = server.chat("What is your name?", model=model, adapter_scale=scale, max_tokens=24)
    assert response.status_code == 200, response.text
    answer: str = response.json()["choices"][0]["message"]["content"]
    return answer


def test_each_keeps_its_own_answers(server: RunningServer) -> None:
    """The prompt is the same: a cell of one adapter used for another would show."""
    names = ("tiny", "tiny:a", "tiny:b")
    alone = {name: ask(server, name) for name in names}
    assert len(set(alone.values())) == 3
    with ThreadPoolExecutor(6) as pool:
        mixed = list(pool.map(lambda name: (name, ask(server, name)), names * 6))
    assert all(text == alone[name] for name, text in mixed)


def test_scale(server: RunningServer) -> None:
    assert ask(server, "tiny:a", 0.0) == ask(server, "tiny")
    assert ask(server, "tiny:a", 3.0) != ask(server, "tiny:a")


def test_a_scale_without_an_adapter_is_refused(server: RunningServer) -> None:
    response = server.chat("hello", adapter_scale=0.5)
    assert (response.status_code, response.json()["error"]["param"]) == (400, "adapter_scale")


def test_they_are_listed(server: RunningServer) -> None:
    assert [each["id"] for each in server.http.get("/v1/models").json()["data"]] == ["tiny", "tiny:a", "tiny:b"]
    refused = server.chat("hello", model="tiny:c")
    assert (refused.status_code, refused.json()["error"]["code"]) == (404, "model_not_found")
