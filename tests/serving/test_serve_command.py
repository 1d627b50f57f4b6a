"""`appliance serve` and `appliance chat` as a person runs them, with a real tiny model and no torch in sight."""

import contextlib
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

from appliance import artifacts, config
from appliance.commands.serve import serve
from appliance.serving import sse
from tests import tiny_gguf
from tests.running import environment
from tests.serving.serving_process import CHAT, RunningServer, chat_body, running_server

WAIT_SECONDS = 60.0
# Runs the command line in a process where importing torch or transformers is an error.
WITHOUT_TORCH = """
import sys
class Refuse:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in ("torch", "transformers", "peft", "trl"):
            raise AssertionError(f"{name} was imported")
sys.meta_path.insert(0, Refuse())
from appliance.cli import main
main(prog_name="appliance")
"""
COMMAND = [sys.executable, "-c", WITHOUT_TORCH]


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An artifacts folder with a promoted model, whose recipe asks for a queue of 2."""
    root = tmp_path_factory.mktemp("artifacts")
    plan = artifacts.Plan(kind="gguf", name="tiny", inputs={}, config={"serve": {"queue_requests": 2}})
    with artifacts.create(plan, root) as draft:
        tiny_gguf.write(draft.path / "model.gguf")
    (root / "current").symlink_to(plan.location(root).relative_to(root))
    return root


ENVIRONMENT = {"APPLIANCE_SERVE_CONTEXT_TOKENS": "1000"}


def run(root: Path, *arguments: str, text: str = "") -> subprocess.CompletedProcess[str]:
    command = [*COMMAND, *arguments]
    options: dict[str, Any] = {"capture_output": True, "text": True, "timeout": WAIT_SECONDS}
    return subprocess.run(command, input=text, env={**environment(root), **ENVIRONMENT}, check=False, **options)


def serving(root: Path, *flags: str) -> contextlib.AbstractContextManager[RunningServer]:
    return running_server(None, *flags, root=root, command=COMMAND, environ=ENVIRONMENT)


@pytest.fixture(scope="module")
def server(root: Path) -> Iterator[RunningServer]:
    with serving(root) as server:
        yield server
        assert server.stop(signal.SIGINT) == 0


def body(text: str = "hello", **fields: Any) -> dict[str, Any]:
    return {"model": "tiny", **chat_body(text, **fields)}


def streamed(server: RunningServer, body: dict[str, Any]) -> tuple[str, dict[str, Any]]:
    with server.http.stream("POST", CHAT, json={**body, "stream": True}) as response:
        chunks = list(sse.decode(response.iter_lines()))
    return "".join(chunk["choices"][0]["delta"].get("content", "") for chunk in chunks), chunks[-1]


def test_ready_line_and_model(server: RunningServer) -> None:
    assert re.fullmatch(r"serving tiny on http://127\.0\.0\.1:\d+", server.ready)
    assert server.http.get("/v1/models").json()["data"][0]["id"] == "tiny"
    assert server.http.get("/readyz").json()["status"] == "ready"


@pytest.mark.parametrize("fields", [{}, {"temperature": 1.5, "seed": 3}, {"stop": ["e", "a"]}])
def test_stream_equals_plain_answer(server: RunningServer, fields: dict[str, Any]) -> None:
    asked = body(max_tokens=60, **fields)
    plain = server.http.post(CHAT, json=asked).json()["choices"][0]
    text, last = streamed(server, asked)
    assert text == plain["message"]["content"]
    assert last["choices"][0]["finish_reason"] == plain["finish_reason"]


def clear_answer(server: RunningServer, text: str) -> str | None:
    """The answer alone, unless a token's lead is so small that cells in another order may decide otherwise."""
    answer = server.http.post(CHAT, json=body(text, max_tokens=30, logprobs=True, top_logprobs=2)).json()["choices"][0]
    tops = [each["top_logprobs"] for each in answer["logprobs"]["content"]]
    is_clear = all(first["logprob"] - second["logprob"] > 0.02 for first, second in tops)
    return answer["message"]["content"] if is_clear else None


def test_more_clients_than_places_all_finish(server: RunningServer) -> None:
    """Four run or wait; the others come back when told to."""
    asked = {text: clear_answer(server, text) for text in (f"client {number}" for number in range(40))}
    alone = {text: answer for text, answer in asked.items() if answer is not None}
    texts = list(alone)[:7]
    assert len(texts) == 7
    answers: dict[str, str] = {}

    def insist(text: str) -> None:
        while (response := server.http.post(CHAT, json=body(text, max_tokens=30))).status_code == 503:
            assert int(response.headers["retry-after"]) >= 1
            time.sleep(0.05)
        answers[text] = response.json()["choices"][0]["message"]["content"]

    threads = [threading.Thread(target=insist, args=(text,)) for text in texts]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert answers == {text: alone[text] for text in texts}


def test_metrics_count_real_work(server: RunningServer) -> None:
    counted = ("appliance_prompt_tokens_total", "appliance_generated_tokens_total", "appliance_queue_seconds_count")
    before = [server.metric(name) for name in counted]
    usage = server.http.post(CHAT, json=body(max_tokens=9)).json()["usage"]
    after = [server.metric(name) for name in counted]
    assert after[0] - before[0] == usage["prompt_tokens"]
    assert after[1] - before[1] == usage["completion_tokens"]
    assert after[2] - before[2] == 1
    assert server.metric("appliance_time_to_first_token_seconds_count") >= 1
    assert server.metric("appliance_inter_token_seconds_count") >= 1


def test_too_long_a_prompt(server: RunningServer) -> None:
    error = server.http.post(CHAT, json=body("x" * 2000)).json()["error"]
    assert error["code"] == "context_length_exceeded"
    assert "1000" in error["message"]


def test_chat_command(root: Path, server: RunningServer) -> None:
    once = run(root, "chat", "hello", "--url", server.url, "--max-tokens", "8")
    assert (once.returncode, once.stderr) == (0, "")
    expected = server.http.post(CHAT, json=body(max_tokens=8)).json()["choices"][0]["message"]["content"]
    assert once.stdout == expected + "\n"
    turns = "hello\n\n/new\nhello\n/exit\nnever asked\n"
    piped = run(root, "chat", "--url", server.url, "--max-tokens", "8", text=turns)
    assert piped.stdout == (expected + "\n") * 2
    refused = run(root, "chat", "x" * 2000, "--url", server.url)
    assert refused.returncode == 1
    assert "tokens; the limit is 1000" in refused.stderr


def test_chat_without_a_server(root: Path) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        result = run(root, "chat", "hello", "--url", f"http://127.0.0.1:{free.getsockname()[1]}")
    assert result.returncode == 1
    assert "appliance serve" in result.stderr
    assert "Traceback" not in result.stderr


def test_port_in_use_is_found_before_the_model_is_loaded(root: Path) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = str(taken.getsockname()[1])
        result = run(root, "serve", "--port", port)
    assert (result.returncode, result.stdout) == (1, "")
    assert port in result.stderr
    assert "--port" in result.stderr


def refusals(root: Path, tmp_path: Path) -> Iterator[tuple[list[str], int, str]]:
    current = (root / "current").resolve()
    cut = tmp_path / "cut.gguf"
    cut.write_bytes((current / "model.gguf").read_bytes()[:20_000])
    cut_adapter = tiny_gguf.write_adapter(tmp_path / "adapter.gguf")
    cut_adapter.write_bytes(cut_adapter.read_bytes()[:-100])
    changed = artifacts.Plan(kind="gguf", name="changed", inputs={})
    with artifacts.create(changed, tmp_path) as draft:
        tiny_gguf.write(draft.path / "model.gguf")
    with (changed.location(tmp_path) / "model.gguf").open("ab") as stream:
        stream.write(b"x")
    yield ["--model", str(cut)], 1, "truncated"
    yield ["--model", str(tmp_path / "none.gguf")], 1, "does not exist"
    yield ["--model", str(changed.location(tmp_path))], 1, "has changed"
    yield ["--model", "unheard-of"], 1, "there: tiny"
    yield ["--host", "0.0.0.0"], 2, "--insecure-no-key"
    yield ["--slots", "0"], 2, "serve.slots"
    yield ["--kv-type", "q4"], 2, "serve.kv_type"
    yield ["--adapter", f"formal={cut_adapter}"], 1, "truncated"
    yield ["--adapter", "formal"], 2, "name=file.gguf"
    yield ["--also", "tiny"], 2, "name of two models"
    yield ["--memory-mib", "10"], 3, "does not fit"


def test_what_cannot_be_served_is_said_in_words(root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(config, "apply_quiet_environment", lambda: None)
    for arguments, code, said in refusals(root, tmp_path):
        result = CliRunner().invoke(serve, ["--port", "0", *arguments], env={**environment(root), **ENVIRONMENT})
        assert (result.exit_code, result.stdout) == (code, ""), result.stderr
        assert said in result.stderr


def test_nothing_promoted(tmp_path: Path) -> None:
    result = run(tmp_path, "serve")
    assert result.returncode == 1
    assert "appliance run RECIPE" in result.stderr


def test_foreign_file_is_served_with_a_warning(root: Path, tmp_path: Path) -> None:
    path = tiny_gguf.write(tmp_path / "found.gguf")
    process = subprocess.Popen(
        [*COMMAND, "serve", "--port", "0", "--model", str(path), "--context-tokens", "4096"],
        env={**environment(root), **ENVIRONMENT},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert process.stdout is not None
    assert process.stdout.readline().startswith("serving found on")
    process.send_signal(signal.SIGTERM)
    _, errors = process.communicate(timeout=WAIT_SECONDS)
    assert process.returncode == 0
    assert "no manifest" in errors
    assert "1024" in errors  # what the model was trained for
