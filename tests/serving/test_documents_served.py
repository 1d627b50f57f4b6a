"""Documents in requests to a real server with a real llama.cpp: read once, in files after a restart, or exactly and said."""

from pathlib import Path
from typing import Any

import pytest

from tests import tiny_gguf
from tests.serving.serving_process import RunningServer, running_server, until

DOCUMENTS = {
    name: {"id": f"{name}.md", "text": f"{name}: {text}"}
    for name, text in {
        "beds": "Beds are given at six in the evening, one for each of those who wait at the door by then.",
        "food": "Soup is at noon, bread in the morning; whoever helps in the kitchen eats first of all.",
        "desk": "The desk is open from eight to ten, and on Mondays in the afternoon until five as well.",
    }.items()
}


def documents(*names: str) -> list[dict[str, str]]:
    return [DOCUMENTS[name] for name in names]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_gguf.write(tmp_path_factory.mktemp("models") / "tiny.gguf")


@pytest.fixture
def root(tmp_path: Path) -> Path:
    return tmp_path


def serving(model: Path, root: Path, **settings: str) -> Any:
    environ = {f"APPLIANCE_SERVE_{name.upper()}": value for name, value in settings.items()}
    return running_server(model, "--context-tokens", "800", root=root, environ=environ)


def told(server: RunningServer, *names: str) -> dict[str, Any]:
    response = server.chat("When?", max_tokens=4, documents=documents(*names))
    assert response.status_code == 200, response.text
    usage: dict[str, Any] = response.json()["usage"]
    details: dict[str, Any] = usage["prompt_tokens_details"]
    assert details["cached_tokens"] == details["restored_tokens"] + details["stitched_tokens"]
    assert usage["prompt_tokens"] == details["cached_tokens"] + details["computed_tokens"]
    return details


def test_documents_are_read_once_and_outlive_a_restart(model: Path, root: Path) -> None:
    with serving(model, root, documents="stitched") as server:
        assert any("documents: each is read by itself" in line for line in server.errors)
        first = told(server, "beds", "food", "desk")
        assert (first["reading"], first["cached_tokens"]) == ("stitched", 0)
        again = told(server, "desk", "beds")
        assert again["stitched_tokens"] > 150
        assert again["computed_tokens"] < 60
        told(server, "food", "desk", "beds")
        assert server.metric("appliance_prompt_tokens_total", source="stitched") >= again["stitched_tokens"]
        assert server.metric("appliance_document_requests_total", reading="stitched") == 3
        until(lambda: len(list(root.rglob("*.prefix"))) >= 3)
    with serving(model, root, documents="stitched") as server:
        restarted = told(server, "food", "beds")
        assert restarted["stitched_tokens"] > 150


def test_documents_are_read_exactly_unless_it_is_proven(model: Path, root: Path) -> None:
    with serving(model, root) as server:
        told(server, "beds", "food")
        again = told(server, "food", "beds")
        assert (again["reading"], again["stitched_tokens"]) == ("exact", 0)
        assert server.metric("appliance_document_requests_total", reading="exact") == 2


def test_model_that_cannot_move_is_served_exactly_and_that_is_said(model: Path, root: Path) -> None:
    with serving(model, root, documents="stitched", kv_type="q8_0") as server:
        assert any("documents: read in their place" in line and "kv_type" in line for line in server.errors)
        assert told(server, "beds", "food")["reading"] == "exact"
