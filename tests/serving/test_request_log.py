"""The log of a running server: each request under the id that its client was told, and no word of what it said."""

import json
from pathlib import Path
from typing import Any

from tests import tiny_gguf
from tests.serving.serving_process import running_server, until

SECRET = "my-very-own-words"


def test_requests_can_be_followed_from_the_answer_to_the_log(root: Path, tmp_path: Path) -> None:
    model = tiny_gguf.write(tmp_path / "tiny.gguf")
    flags = ("--log-format", "json", "--log-level", "info")
    with running_server(model, *flags, root=root) as server:
        answer = server.chat(SECRET, max_tokens=4)
        server.http.get(f"/{SECRET}")
        server.http.post("/v1/chat/completions", content=f"{{{SECRET}")
        server.http.request(SECRET, "/v1/models")
        server.http.get("/healthz")
        until(lambda: len(events(server.errors, "request")) == 4)
        assert server.stop() == 0
    (answered,) = events(server.errors, "answered")
    token = answer.headers["x-request-id"].removeprefix("req-")
    assert answered["request"] == answer.json()["id"] == f"chatcmpl-{token}"
    usage = answer.json()["usage"]
    assert (answered["prompt_tokens"], answered["generated_tokens"]) == (usage["prompt_tokens"], usage["completion_tokens"])
    assert answered["seconds"] >= answered["prefill_seconds"] + answered["decode_seconds"] > 0
    said = [(line["method"], line["route"], line["status"]) for line in events(server.errors, "request")]
    assert said == [
        ("POST", "/v1/chat/completions", 200),
        ("GET", "unknown", 404),
        ("POST", "/v1/chat/completions", 400),
        ("other", "/v1/models", 405),
    ]
    assert events(server.errors, "request")[0]["request"] == f"req-{token}"
    assert not any(SECRET in line for line in server.errors)


def events(lines: list[str], name: str) -> list[dict[str, Any]]:
    objects = (json.loads(line) for line in lines if line.startswith("{"))
    return [line for line in objects if line["event"] == name]
