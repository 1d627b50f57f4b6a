"""`appliance pull` against a hub on this machine: a small server that speaks the hub's protocol."""

import hashlib
import json
import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

COMMIT = "a" * 40
WEIGHTS = bytes(range(256)) * 64
FILES = {
    "config.json": b'{"model_type": "qwen3"}',
    "tokenizer.json": b"{}",
    "model.safetensors": WEIGHTS,
    "pytorch_model.bin": b"code could hide here",
}


class Hub(ThreadingHTTPServer):
    """What the tests change: files on offer, and what is wrong with them."""

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.files = dict(FILES)
        self.sha256 = {name: hashlib.sha256(content).hexdigest() for name, content in FILES.items()}
        self.is_gated = False
        self.downloaded: list[str] = []


class Handler(BaseHTTPRequestHandler):
    server: Hub

    def do_HEAD(self) -> None:
        self._answer(with_body=False)

    def do_GET(self) -> None:
        self._answer(with_body=True)

    def log_message(self, *_: Any) -> None:
        pass

    def _answer(self, *, with_body: bool) -> None:
        path = self.path.partition("?")[0]
        if not path.startswith(("/api/models/org/tiny", "/org/tiny/resolve/")):
            self._send(404, b"{}", {"X-Error-Code": "RepoNotFound"}, with_body)
        elif self.server.is_gated:
            self._send(403, b"{}", {"X-Error-Code": "GatedRepo"}, with_body)
        elif path.startswith("/api/"):
            siblings = [self._sibling(name) for name in self.server.files]
            body = {"id": "org/tiny", "sha": COMMIT, "siblings": siblings}
            self._send(200, json.dumps(body).encode(), {"Content-Type": "application/json"}, with_body)
        else:
            name = path.partition("/resolve/")[2].partition("/")[2]
            if with_body:
                self.server.downloaded.append(name)
            self._send(
                200, self.server.files[name], {"X-Repo-Commit": COMMIT, "ETag": f'"{self.server.sha256[name]}"'}, with_body
            )

    def _sibling(self, name: str) -> dict[str, Any]:
        size = len(self.server.files[name])
        large = {"lfs": {"sha256": self.server.sha256[name], "size": size, "pointerSize": 100}}
        return {"rfilename": name, "size": size, **(large if name.endswith(".safetensors") else {})}

    def _send(self, status: int, body: bytes, headers: dict[str, str], with_body: bool) -> None:
        self.send_response(status)
        for key, value in {"Content-Length": str(len(body)), **headers}.items():
            self.send_header(key, value)
        self.end_headers()
        if with_body:
            self.wfile.write(body)


@pytest.fixture
def hub() -> Iterator[Hub]:
    server = Hub()
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    yield server
    server.shutdown()
    thread.join()
    server.server_close()


def pull(hub: Hub, root: Path, name: str = "org/tiny") -> "subprocess.CompletedProcess[str]":
    hidden = {"HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE", "HF_TOKEN"}
    environment = {key: value for key, value in os.environ.items() if key not in hidden}
    environment |= {"HF_ENDPOINT": f"http://127.0.0.1:{hub.server_port}", "APPLIANCE_ARTIFACTS": str(root), "NO_PROXY": "*"}
    command = [sys.executable, "-m", "appliance", "pull", name, "--json"]
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120, check=False)


def test_fetches_safetensors_and_keeps_hashes(hub: Hub, tmp_path: Path) -> None:
    done = pull(hub, tmp_path)
    assert done.returncode == 0, done.stderr
    folder = Path(json.loads(done.stdout)["artifact"])
    manifest = json.loads((folder / "manifest.json").read_text())
    assert set(manifest["files"]) == {"config.json", "tokenizer.json", "model.safetensors"}
    assert manifest["files"]["model.safetensors"]["sha256"] == hashlib.sha256(WEIGHTS).hexdigest()
    assert manifest["inputs"]["revision"] == COMMIT
    assert json.loads(pull(hub, tmp_path).stdout)["state"] == "unchanged"


def test_of_subfolders_only_the_pooling_of_an_encoder_is_fetched(hub: Hub, tmp_path: Path) -> None:
    for name in ("1_Pooling/config.json", "onnx/config.json", "onnx/model.safetensors"):
        hub.files[name], hub.sha256[name] = b"{}", hashlib.sha256(b"{}").hexdigest()
    folder = Path(json.loads(pull(hub, tmp_path).stdout)["artifact"])
    assert {each.relative_to(folder).as_posix() for each in folder.rglob("*") if each.is_file()} == {
        *("config.json", "tokenizer.json", "model.safetensors", "manifest.json"),
        "1_Pooling/config.json",
    }


def test_an_interrupted_pull_continues(hub: Hub, tmp_path: Path) -> None:
    good, hub.files["model.safetensors"] = hub.files["model.safetensors"], b"x" * len(WEIGHTS)
    damaged = pull(hub, tmp_path)
    assert damaged.returncode == 1
    assert "model.safetensors" in damaged.stderr
    assert not list(tmp_path.glob("base/*/manifest.json"))
    hub.files["model.safetensors"] = good
    hub.downloaded.clear()
    assert pull(hub, tmp_path).returncode == 0
    assert "config.json" not in hub.downloaded


def test_refuses_models_without_safetensors(hub: Hub, tmp_path: Path) -> None:
    del hub.files["model.safetensors"]
    done = pull(hub, tmp_path)
    assert done.returncode == 1
    assert "safetensors" in done.stderr


def test_names_the_cure_for_a_gated_model(hub: Hub, tmp_path: Path) -> None:
    hub.is_gated = True
    done = pull(hub, tmp_path)
    assert done.returncode == 3
    assert "HF_TOKEN" in done.stderr


def test_unknown_model(hub: Hub, tmp_path: Path) -> None:
    done = pull(hub, tmp_path, "org/absent")
    assert done.returncode == 3
    assert "no such model" in done.stderr
