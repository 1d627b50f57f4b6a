"""Containers as the tests run them: confined, asked from inside, and asked what llama.cpp computes."""

import re
import time
from typing import Any

from tests.images.image_engine import PIP_CONFIG, ImageEngine

CONFINED = (
    *("--read-only", "--tmpfs", "/tmp:rw,noexec,nosuid,nodev,size=64m,mode=1777", "--cap-drop", "ALL"),
    *("--security-opt", "no-new-privileges", "--pids-limit", "256", "--memory", "1g", "--network", "none"),
    *("--volume", "/dev/null:/usr/bin/dash:ro", "--volume", "/dev/null:/usr/bin/bash:ro"),
)
READY_SECONDS = 90.0
SECRET_BYTES = 64 << 10  # no file with a secret of ours is larger; those that are need not be read
PRIVATE_KEY = re.compile(rb"\s*-----BEGIN ([A-Z0-9]+ )*PRIVATE KEY-----")
LIBRARIES = "/opt/venv/lib/python3.11/site-packages/llama_cpp/lib"
ASK = """
import json, pathlib, sys, urllib.error, urllib.request
key = pathlib.Path("/data/keys/chat.key").read_text().strip() if sys.argv[1] == "key" else ""
body = json.dumps({"messages": [{"role": "user", "content": "hello"}], "max_tokens": 4}).encode()
headers = {"Content-Type": "application/json", **({"Authorization": f"Bearer {key}"} if key else {})}
try:
    request = urllib.request.Request("http://127.0.0.1:8080/v1/chat/completions", body, headers)
    with urllib.request.urlopen(request) as answer:
        print(answer.status, json.load(answer)["usage"]["completion_tokens"])
except urllib.error.HTTPError as error:
    print(error.code, 0)
"""
# In one process, since an emulator of user programs does not follow into others. Its last word: the library that was chosen.
COMPUTE = """
import pathlib
from appliance.serving.decoder import Feed
from appliance.serving.engine_settings import EngineSettings
from appliance.serving.llama import Context, Model
from appliance.serving.requests import SamplingSettings

path = pathlib.Path("/model.gguf")
settings = EngineSettings(
    name="tiny", model_path=str(path), sha256="", made_at=0, kind="chat", slots=1, context_tokens=64, threads_decode=1,
    threads_prefill=1, kv_type="f16", is_mapped=True, is_repacked=True, queue_requests=1, queue_tokens=1,
)
context = Context(Model(path, is_mapped=True, is_repacked=True), settings)
context.start(0, SamplingSettings(), None, None)
feed, position = list(b"What do dogs eat?"), 0
for _ in range(8):
    found = context.decode([Feed(0, feed, position, is_sampled=True)], None)[0]
    position += len(feed)
    feed = [found[-1].token]
    print(*feed, end=" ")
maps = pathlib.Path("/proc/self/maps").read_text().split()
print(next(pathlib.Path(part).name for part in maps if "libggml-cpu-" in part))
"""
# The server's compiled packages, likewise in one process: its modules, an encrypted store with a key in it, a grammar.
SERVE_PARTS = """
import importlib, pathlib, pkgutil
import llguidance
import appliance.serving
from appliance import keys, store_key
from appliance.store import Store

modules = [each.name for each in pkgutil.walk_packages(appliance.serving.__path__, "appliance.serving.")]
for name in modules:
    importlib.import_module(name)
key_file, path = pathlib.Path("/tmp/secret/store.key"), pathlib.Path("/tmp/data/store.sqlite")
store_key.create(key_file, path)
with Store.open(path, key_file) as store:
    keys.create(store, "old", ["chat"])
    assert len(keys.list_keys(store)) == 1
assert not path.read_bytes().startswith(b"SQLite format 3")
assert "properties" in llguidance.LLMatcher.grammar_from_json_schema('{"properties": {"a": {"type": "string"}}}')
print(len(modules))
"""


def is_secret(content: bytes) -> bool:
    """Whether a file begins as a private key, or holds what only the build's pip was told."""
    return PRIVATE_KEY.match(content) is not None or PIP_CONFIG.encode() in content


def wait_until_ready(engine: ImageEngine, name: str, started: float) -> float:
    """The seconds since `started`."""
    question = "import urllib.request as u; u.urlopen('http://127.0.0.1:8080/readyz', timeout=2)"
    while engine.run("podman", "exec", name, "python3", "-c", question, is_checked=False).returncode:
        log: Any = engine.run("podman", "logs", name, is_checked=False)
        assert time.monotonic() - started < READY_SECONDS, log.stderr
        time.sleep(0.2)
    return time.monotonic() - started


def ask(engine: ImageEngine, name: str, key: str) -> tuple[int, int]:
    """HTTP status and tokens of the answer, asked from inside: there is no network."""
    status, tokens = engine.run("podman", "exec", name, "python3", "-c", ASK, key).stdout.split()
    return int(status), int(tokens)
