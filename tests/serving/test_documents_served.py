"""Documents in requests to a real server with a real llama.cpp: read once, in files after a restart, or exactly and said."""

import os
import signal
import subprocess
from pathlib import Path
from typing import Any

import pytest

from tests import tiny_gguf
from tests.running import environment
from tests.serving.serving_process import COMMAND, RunningServer, chat_body, running_server, until

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
        shown = server.http.post("/apply-template", json={**chat_body("When?"), "documents": documents("desk")}).json()
        assert '<document id="desk.md">\ndesk: The desk is open' in shown["prompt"]


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


def written(folder: Path, *names: str) -> Path:
    folder.mkdir(exist_ok=True)
    for name in names:
        (folder / f"{name}.md").write_text(DOCUMENTS[name]["text"])
    return folder


def state(server: RunningServer) -> dict[str, int]:
    counts: dict[str, int] = server.ready_state().get("documents", {})
    return counts


def test_a_folder_is_read_before_anybody_asks_followed_and_erased(model: Path, root: Path) -> None:
    folder = written(root / "house", "beds", "food", "desk")
    (folder / "broken.txt").write_bytes(b"one\n\xff")
    settings = {"documents": "stitched", "document_folder": str(folder)}
    with serving(model, root, **settings) as server:
        assert any("broken.txt:2" in line and "UTF-8" in line for line in server.errors)
        until(lambda: state(server) == {"known": 3, "waiting": 0, "refused": 1, "erased": 0, "unerased": 0})
        assert server.metric("appliance_documents", state="known") == 3
        assert server.metric("appliance_documents", state="refused") == 1
        assert told(server, "desk", "beds")["stitched_tokens"] > 150
        assert told(server, "desk", "beds")["reading"] == "stitched"
        files = set(root.rglob("*.prefix"))
        (folder / "beds.md").write_text("beds: There are none.")
        (folder / "food.md").unlink()
        until(lambda: state(server) == {"known": 2, "waiting": 0, "refused": 1, "erased": 2, "unerased": 0})
        assert server.metric("appliance_documents_erased") == 2
        assert any("event=documents_erased documents=2" in line for line in server.errors)
        left = set(root.rglob("*.prefix"))
        assert len(files & left) == 1
        assert told(server, "desk", "beds")["reading"] == "stitched"
    (folder / "desk.md").unlink()
    with serving(model, root, document_folder=str(folder)) as server:  # documents are read exactly now
        assert any("1 documents were removed or edited" in line for line in server.errors)
        assert any("event=documents_not_read_ahead" in line for line in server.errors)
        assert not files & set(root.rglob("*.prefix"))
    with serving(model, root) as server:
        assert not list(root.rglob("documents-*"))


def test_a_folder_that_is_not_there_is_no_start(model: Path, root: Path) -> None:
    arguments = [*COMMAND, "serve", "--model", str(model), "--document-folder", str(root / "nowhere")]
    run = subprocess.run(arguments, env=environment(root), capture_output=True, text=True, check=False)
    assert run.returncode == 3
    assert "serve.document_folder" in run.stderr
    assert "nowhere" in run.stderr


def test_an_engine_that_died_reads_on(model: Path, root: Path) -> None:
    folder = written(root / "house", "beds", "food")
    with serving(model, root, documents="stitched", document_folder=str(folder)) as server:
        until(lambda: state(server).get("known") == 2)
        os.kill(server.engine, signal.SIGKILL)
        (folder / "desk.md").write_text(DOCUMENTS["desk"]["text"])
        until(lambda: state(server).get("known") == 3)
        assert told(server, "desk", "beds", "food")["stitched_tokens"] > 200
